"""`python scripts/flags_table.py`: writes docs/flags.md from the schema in cfg/config.py."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from cfg.config import flags_markdown

(ROOT / "docs" / "flags.md").write_text(flags_markdown())
