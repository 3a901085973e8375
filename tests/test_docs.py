"""README.md and docs/: links lead somewhere, and flags and training commands exist."""

import re
import shlex
from pathlib import Path

import pytest

from cfg.config import Config, load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if "train_gpt.py --" in line
]


def anchors(page):
    """Returns the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_link_leads_to_a_file_and_heading(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page, line", COMMANDS)
def test_every_training_command_is_accepted(page, line):
    words = shlex.split(line, comments=True)
    ranks = next((int(word.split("=")[1]) for word in words if word.startswith("--nproc_per_node=")), 1)
    flags = words[words.index("train_gpt.py") + 1 :]
    if any(flag.startswith("--init_from=") or "config.yaml" in flag for flag in flags):  # need files: check the names
        assert {flag.split("=")[0].removeprefix("--") for flag in flags} <= Config.model_fields.keys()
    else:
        load_config(flags, ranks)


def test_the_migration_tables_name_existing_flags():
    rows = re.findall(r"^\| .*? \| (.*?) \|", (ROOT / "docs/migrating.md").read_text(), re.MULTILINE)
    flags = {flag for cell in rows if ".py" not in cell for flag in re.findall(r"--([a-z_0-9]+)", cell)}
    assert len(flags) > 40 and flags <= Config.model_fields.keys()
