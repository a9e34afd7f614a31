"""What a forked child inherits but must not use: threads, and locks other threads held.

A fork copies the whole memory of a process and only the thread that called it. What waits for
another thread in the child waits for ever, and so does whoever frees a thread pool, which joins
its threads. So an object with threads knows its `Process`, and what must not be freed is
`kept_in_children`.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable

from vistower.errors import InferenceError


class _Line:
    """Forks between the first process that imported this module and this one.

    Unlike a process id the number is never used again in the same line of processes.
    """

    forks = 0


_kept: weakref.WeakSet[object] = weakref.WeakSet()


class Process:
    """The process that made an object."""

    __slots__ = ("_forks",)

    def __init__(self) -> None:
        """Remember this process."""
        self._forks = _Line.forks

    @property
    def is_here(self) -> bool:
        """Whether it is this one, and not a parent of it."""
        return self._forks == _Line.forks

    def require(self, what: str) -> None:
        """Raise unless it is this one.

        Raises:
            InferenceError: naming ``what`` was inherited.
        """
        if not self.is_here:
            raise InferenceError(
                f"This {what} was made before this process was forked, and its threads did not "
                f"survive the fork. Make another one in this process: VisionEncoder.open() works "
                f"here, too. Or start workers by 'spawn' or 'forkserver'."
            )


def in_every_child(renew: Callable[[], object]) -> None:
    """Call a function in each forked child, before anything else of it runs."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)


def kept_in_children(inherited: object) -> None:
    """Let forked children never free an object, not even when they exit."""
    _kept.add(inherited)


def never_free(inherited: object) -> None:
    """Keep an object, and all it holds, until the process is gone."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


def exit_without_destructors() -> None:
    """Let this process, once Python has ended in it, end without the handlers of C libraries.

    Those that were registered before now: a library's destructors join threads that a forked
    child does not have. Nothing is changed where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        # The last to be registered is the first to be called.
        libc.on_exit(libc._exit, None)
        libc.__cxa_atexit(libc.fflush, None, None)


def _begin_child() -> None:
    _Line.forks += 1
    for inherited in list(_kept):
        never_free(inherited)
    _kept.clear()


in_every_child(_begin_child)
