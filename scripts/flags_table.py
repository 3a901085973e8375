"""`python scripts/flags_table.py`: writes docs/flags.md from the schema in cfg/config.py."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from cfg.flags import GROUPS, Config, shown_default, type_name


def flags_markdown() -> str:
    """Returns the content of docs/flags.md."""
    lines = ["# Flags of train_gpt.py", "", "Generated from `cfg/config.py` by `python scripts/flags_table.py`.", ""]
    lines += [f"`--cfg NAME`: {Config.model_fields['cfg'].description}.", ""]
    lines += ["INT: `10000`, `10_000`, `1e4`, `10K` and `0.01M` are equal. B is 10^9, T 10^12.", ""]
    for group in GROUPS:
        lines += [f"## {(group.__doc__ or '').strip()}", "", "| flag | type | default | meaning |", "|---|---|---|---|"]
        for name, field in group.model_fields.items():
            kind = type_name(field).replace("|", "\\|")
            lines.append(f"| `--{name}` | {kind} | `{shown_default(field)}` | {field.description} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(flags_markdown())
