"""Numbers that callers pass."""

from __future__ import annotations

import operator
from typing import Any

from vistower.errors import OptionError


def whole_number(name: str, value: Any, least: int) -> int:
    """An integer of any type, NumPy's too.

    Raises:
        OptionError: it is none, or below ``least``.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise OptionError(f"{name}={value!r} was asked for; it is an integer ≥ {least}.")
    return number
