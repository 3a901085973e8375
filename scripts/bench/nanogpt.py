"""nanoGPT's own model, to measure beside ours."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from cfg.errors import UserError


def load_nanogpt(folder: Path) -> ModuleType:
    """Imports nanoGPT's model.py from a copy of nanoGPT, which is not part of this repository."""
    path = next((p for p in (folder / "model.py", folder / "model_nanogpt.py") if p.is_file()), None)
    if path is None:
        raise UserError(f"--nanogpt={folder}: has no model.py; give the folder of a copy of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
