"""Memory kept between pictures, because fresh memory costs page faults; bounded in bytes.

The bounds are of the whole process, whatever the number of its threads.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from vistower.forks import in_every_child

Kept = TypeVar("Kept")


class _Store(Generic[Kept]):
    """Things by key, the least recently used dropped where they exceed ``budget`` bytes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._begin()
        _stores.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._items: OrderedDict[Hashable, tuple[Kept, int]] = OrderedDict()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        return self._bytes

    def _add(self, key: Hashable, item: Kept, nbytes: int) -> None:
        if nbytes > self._budget:
            return
        with self._lock:
            if key in self._items:
                return
            self._items[key] = item, nbytes
            self._bytes += nbytes
            while self._bytes > self._budget:
                self._bytes -= self._items.popitem(last=False)[1][1]


_stores: weakref.WeakSet[_Store[Any]] = weakref.WeakSet()


def _begin_child() -> None:
    """A thread the child has not may have held a lock, or stood between two of its steps."""
    for store in _stores:
        store._begin()


in_every_child(_begin_child)


class Cache(_Store[Kept]):
    """Things that several callers may use at the same time."""

    def get(self, key: Hashable, make: Callable[[], Kept], nbytes: Callable[[Kept], int]) -> Kept:
        """What was made for the key; threads that ask at the same time may each make it."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key][0]
        item = make()
        self._add(key, item, nbytes(item))
        return item


class Pool(_Store[Kept]):
    """Things that one caller at a time may use; those in use are not counted."""

    def take(self, kind: Hashable) -> Kept | None:
        """One of the idle things of that kind, if there is one."""
        with self._lock:
            for key in reversed(self._items):
                if key[0] == kind:  # type: ignore[index]
                    item, nbytes = self._items.pop(key)
                    self._bytes -= nbytes
                    return item
        return None

    def give(self, kind: Hashable, item: Kept, nbytes: int) -> None:
        """Leave a thing to the next caller."""
        self._add((kind, id(item)), item, nbytes)


_IDLE_SCRATCH = 1 << 26
"""Bytes of scratch memory kept while no picture uses it: 64 MB."""

_SMALLEST = 1 << 12

_scratch: Pool[npt.NDArray[np.uint8]] = Pool(_IDLE_SCRATCH)


class Scratch:
    """Arrays for the time of a ``with`` block, uninitialized, from memory used before."""

    def __enter__(self) -> Scratch:
        self._taken: list[npt.NDArray[np.uint8]] = []
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for memory in self._taken:
            _scratch.give(memory.size, memory, memory.size)
        self._taken.clear()

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """An array of the shape and dtype; the pages it does not reach cost nothing."""
        needed = math.prod(shape) * np.dtype(dtype).itemsize
        size = max(_SMALLEST, 1 << (needed - 1).bit_length()) if needed else _SMALLEST
        memory = _scratch.take(size)
        if memory is None:
            memory = np.empty(size, np.uint8)
        self._taken.append(memory)
        return memory[:needed].view(dtype).reshape(shape)
