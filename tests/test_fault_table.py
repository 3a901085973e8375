"""docs/reliability.md has one row for each test with the mark `fault`, and no other rows."""

import ast
from pathlib import Path

from tests.fault_table import PAGE, TABLE, named_in

TESTS = Path(__file__).resolve().parent


def fault_tests():
    """Yields the tests with the mark, also where a variable stands for it."""
    for path in TESTS.rglob("test_*.py"):
        if "mark.fault" not in (source := path.read_text()):
            continue
        tree = ast.parse(source)
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        aliases = [
            node for node in tree.body if isinstance(node, ast.Assign) and "mark.fault" in ast.unparse(node.value)
        ]
        marks = {"pytest.mark.fault", *(ast.unparse(target) for alias in aliases for target in alias.targets)}
        for function in functions:
            calls = [node.func for node in function.decorator_list if isinstance(node, ast.Call)]
            if marks & set(map(ast.unparse, calls)):
                yield f"{path.relative_to(TESTS.parent)}::{function.name}"


def test_every_fault_test_has_a_row():
    assert {named_in(row) for row in TABLE.search(PAGE.read_text())[1].splitlines()} == set(fault_tests())
