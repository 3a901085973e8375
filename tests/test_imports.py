"""Imports go downwards only, and heavy libraries are imported where they are used."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"util", "cfg", "model", "data", "train", "eval", "scripts", "train_gpt", "tests"}
MAY_IMPORT = {
    "util": {"util"},
    "cfg": {"util", "cfg"},
    "model": {"util", "cfg", "model"},
    "data": {"util", "cfg", "model", "data"},
    "eval": {"util", "cfg", "model", "data", "eval"},
    "train": {"util", "cfg", "model", "data", "eval", "train"},
    "scripts": {"util", "cfg", "model", "data", "eval", "train", "scripts", "train_gpt"},  # benchmarks call train_step
    "train_gpt": {"util", "cfg", "model", "data", "eval", "train"},
}
HEAVY = {*"datasets wandb transformers matplotlib pyarrow tensorboard tiktoken tokenizers lm_eval".split()}


def files(package):
    return [ROOT / "train_gpt.py"] if package == "train_gpt" else sorted((ROOT / package).rglob("*.py"))


SOURCES = [(package, path) for package in MAY_IMPORT for path in files(package)]


def for_types_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node, at_import_time=False):
    """Yields the dotted names that a module imports: all, or only those imported with the module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            yield from (f"{base}.{alias.name}" for alias in child.names)
        elif at_import_time and (for_types_only(child) or isinstance(child, ast.FunctionDef | ast.Lambda)):
            continue
        else:
            yield from imports(child, at_import_time)


def parse(path):
    return ast.parse(path.read_text(), str(path))


@pytest.mark.parametrize("package, path", SOURCES, ids=[str(path.relative_to(ROOT)) for _, path in SOURCES])
def test_a_package_imports_only_itself_and_earlier_layers(package, path):
    names = set(imports(parse(path)))
    assert not [name for name in names if name.startswith(".")]  # absolute imports can be searched for
    assert {name.split(".")[0] for name in names} & OURS <= MAY_IMPORT[package]


def without_type_checking(tree):
    tree.body = [node for node in tree.body if not for_types_only(node)]
    return tree


def test_there_are_no_import_cycles():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for _, path in SOURCES}
    graph = {}
    for name, path in modules.items():
        dotted = set(imports(without_type_checking(parse(path))))
        graph[name] = ({d for d in dotted} | {d.rpartition(".")[0] for d in dotted}) & modules.keys()
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules)  # a cycle raises CycleError


@pytest.mark.parametrize("package", ["model", "data"])
def test_model_and_data_do_not_use_ranks(package):
    for path in files(package):
        distributed = {name for name in imports(parse(path)) if name.startswith("torch.distributed")}
        assert distributed <= {"torch.distributed.checkpoint"}, path  # it also reads files without a process group
        assert "WORLD_SIZE" not in path.read_text() and "LOCAL_RANK" not in path.read_text(), path


@pytest.mark.parametrize("package", ["cfg", "model", "data", "train", "eval", "train_gpt"])
def test_nothing_heavy_is_imported_at_import_time(package):
    for path in files(package):
        assert not {name.split(".")[0] for name in imports(parse(path), at_import_time=True)} & HEAVY, path


def test_importing_everything_loads_nothing_heavy_and_prints_nothing():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package, path in SOURCES
        if package != "scripts" and path.name != "__init__.py"
    ]
    code = f"import sys, {', '.join(modules)}; assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_imports_at_import_time_are_distinguished_from_later_ones():
    tree = ast.parse(
        "import a\nif TYPE_CHECKING:\n    import b\ntry:\n    from c.d import e\nexcept ImportError:\n    pass\n"
        "class X:\n    import f\n    def g(self):\n        import h\nfrom . import i\n"
    )
    assert set(imports(tree)) == {"a", "b", "c.d.e", "f", "h", "..i"}
    assert set(imports(tree, at_import_time=True)) == {"a", "c.d.e", "f", "..i"}
