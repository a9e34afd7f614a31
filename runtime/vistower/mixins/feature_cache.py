"""The forward passes of the last pictures, so that two features of one picture cost one.

A picture is known by its ``pixel_values``: what the tower sees. So nothing of the caller's is
kept alive, a changed array, PIL image or file is another picture, and an equal one is the same
picture however it came. The price is preprocessing it again. A list of pictures is kept as one,
and counts as many.
"""

from __future__ import annotations

import os
import threading
from collections import deque
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
    """``last_hidden_state`` of the last pictures. Thread-safe; pickled empty."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._entries: deque[tuple[Array, Array]] = deque()

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
        with self._lock:
            entries = list(self._entries)
        for entry in entries:
            if np.array_equal(entry[0], pixel_values):
                return entry[1].copy()
        state = compute(pixel_values)
        with self._lock:
            self._entries.appendleft((pixel_values, state))
            while sum(len(pixels) for pixels, _ in self._entries) > size:
                self._entries.pop()
        return state.copy()


def _size() -> int:
    text = os.environ.get(SETTING, str(DEFAULT_SIZE))
    if not text.isdecimal():
        raise OptionError(f"{SETTING}={text!r} is not a number of pictures. 0 turns the cache off.")
    return int(text)
