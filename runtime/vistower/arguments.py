"""Numbers that callers pass, of any integer type."""

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


def height_and_width(name: str, value: Any) -> tuple[int, int]:
    """A pair of integers from 1 in any sequence.

    Raises:
        OptionError: it is none.
    """
    try:
        pair = [] if isinstance(value, (str, bytes)) else list(value)
    except TypeError:
        pair = []
    if len(pair) != 2:
        raise OptionError(f"{name}={value!r} was asked for; it is (height, width) in pixels.")
    height, width = (whole_number(name, side, 1) for side in pair)
    return height, width
