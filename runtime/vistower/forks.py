"""What a forked child inherits but must not use: threads, and locks other threads held.

A fork copies the whole memory of a process and only the thread that called it. What waits for
another thread in the child waits for ever, and so does whoever frees a thread pool, which joins
its threads. So an object with threads knows its `Process`, and what must not be freed is
`kept_in_children`. Locks inside Python's imports and ONNX Runtime cannot be renewed: a fork waits
until nobody is in an `uncut` region, where they are held.
"""

from __future__ import annotations

# The hooks of these hold their locks during a fork. Called in the opposite order of their
# registration, they must not come before ours, which waits for threads that may need them.
import concurrent.futures.thread  # noqa: F401
import ctypes
import logging  # noqa: F401
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import ContextDecorator
from types import TracebackType

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


class _Uncut(ContextDecorator):
    """A context manager and decorator around what a fork by another thread must not interrupt."""

    longest = 30.0
    """Seconds that a fork, or what would begin during one, waits at most."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}
        self._forking = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            # Who is inside goes on: the fork waits for it.
            if me not in self._inside:
                self._changed.wait_for(lambda: not self._forking, self.longest)
            self._inside[me] = self._inside.get(me, 0) + 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        me = threading.get_ident()
        with self._changed:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
                self._changed.notify_all()

    def before(self) -> None:
        """Let nobody in, and wait until every other thread is out."""
        with self._changed:
            self._forking += 1
            mine = {threading.get_ident()}
            self._changed.wait_for(lambda: self._inside.keys() <= mine, self.longest)

    def after_in_parent(self) -> None:
        """Let everybody in again."""
        with self._changed:
            self._forking -= 1
            self._changed.notify_all()

    def after_in_child(self) -> None:
        """The same, where this is the only thread."""
        me = threading.get_ident()
        self._inside = {me: self._inside[me]} if me in self._inside else {}
        self._forking = 0
        self._changed = threading.Condition()


uncut = _Uncut()


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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=uncut.before,
        after_in_parent=uncut.after_in_parent,
        after_in_child=uncut.after_in_child,
    )
in_every_child(_begin_child)
