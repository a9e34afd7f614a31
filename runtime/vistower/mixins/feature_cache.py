"""The forward passes of the last pictures, so that two features of one picture cost one.

A picture is known by its ``pixel_values``: what the tower sees. So nothing of the caller's is
kept alive, a changed array, PIL image or file is another picture, and an equal one is the same
picture however it came. The price is preprocessing it again. A list of pictures is kept as one,
and counts as many.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.errors import OptionError

Array = npt.NDArray[np.float32]

SETTING = "VISTOWER_FEATURE_CACHE"
"""Environment variable, read at each call: how many pictures are kept; 0 turns it off."""

DEFAULT_SIZE = 4
"""Consumers compare two pictures, or two crops of each."""


class FeatureCache:
    """``last_hidden_state`` of the last pictures. Thread-safe; pickled empty.

    There is no lock, which a forked child could inherit held: entries are replaced as a whole, and
    of two that come at the same moment one may be lost, and is computed again.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._entries: tuple[tuple[Array, Array], ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureCache, ()

    def forward(self, pixel_values: Array, compute: Callable[[Array], Array]) -> Array:
        """``compute(pixel_values)``, or what it gave for equal values not long ago.

        The result is the caller's own memory.

        Raises:
            OptionError: ``VISTOWER_FEATURE_CACHE`` is not a whole number.
        """
        size = _size()
        if len(pixel_values) > size:
            return compute(pixel_values)
        for entry in self._entries:
            if np.array_equal(entry[0], pixel_values):
                return entry[1].copy()
        state = compute(pixel_values)
        entries = (pixel_values, state), *self._entries
        while sum(len(pixels) for pixels, _ in entries) > size:
            entries = entries[:-1]
        self._entries = entries
        return state.copy()


def _size() -> int:
    text = os.environ.get(SETTING, str(DEFAULT_SIZE))
    if not text.isdecimal():
        raise OptionError(f"{SETTING}={text!r} is not a number of pictures. 0 turns the cache off.")
    return int(text)
