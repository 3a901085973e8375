"""Values of flags: counts such as 0.5M, and paths that begin with ~."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from pathlib import Path

_COUNT = re.compile(r"([+-]?[\d_.]+(?:e[+-]?\d{1,3})?)([kmbt]?)", re.IGNORECASE)
_POWERS_OF_TEN = {"": 0, "k": 3, "m": 6, "b": 9, "t": 12}


def parse_count(text: str) -> int:
    """Returns the integer that `text` names: 10000, 10_000, 1e4, 10K or 0.01M. Raises ValueError for a fraction,
    or a number of more than 64 bits.

    K, M, B and T stand for thousand, million, billion and trillion.
    """
    with suppress(InvalidOperation):  # from Decimal("1.2.3")
        if match := _COUNT.fullmatch(text.strip()):
            number = Decimal(match[1]).scaleb(_POWERS_OF_TEN[match[2].lower()])
            if abs(number) < 2**63 and number == int(number):
                return int(number)
    raise ValueError(f"{text!r} is not a whole number")


def user_path(text: str) -> Path:
    """Returns the path, with a leading ~ replaced by the home directory: the shell leaves it alone in --flag=~/x."""
    return Path(os.path.expanduser(text))
