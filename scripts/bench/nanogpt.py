"""nanoGPT's model.py, for comparison."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from util.errors import UserError


def load_nanogpt(path: Path) -> ModuleType:
    """Imports nanoGPT's model.py. `path` is the file or the folder of a copy of nanoGPT, which is not included here."""
    file = path / "model.py" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--nanogpt={path}: has no model.py; name the folder of a copy of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module
