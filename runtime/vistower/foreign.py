"""C++ and Rust code that gives up the interpreter's lock, and the end of the interpreter.

Python 3.10 to 3.13 end a daemon thread that asks for the lock again once the interpreter is gone.
C takes that; C++ and Rust abort the process. So the interpreter waits for what runs, and daemon
threads begin nothing any more.
"""

from __future__ import annotations

import atexit
import threading
import time
from types import TracebackType

from vistower.forks import in_every_child

LONGEST = 60.0
"""Seconds the end of the interpreter waits at most."""


class _ForeignCode:
    """A context manager around a call, for any number of threads at once."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._ending = False

    def __enter__(self) -> None:
        with self._changed:
            # Threads that are no daemons have been waited for by now.
            if not self._ending or threading.current_thread() is threading.main_thread():
                self._running += 1
                return
        while True:
            time.sleep(LONGEST)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._running -= 1
            if self._ending:
                self._changed.notify_all()

    def end(self) -> None:
        """Wait for what runs, and let only the main thread begin anything."""
        with self._changed:
            self._ending = True
            self._changed.wait_for(lambda: self._running <= 0, LONGEST)

    def begin_child(self) -> None:
        """Forget the threads that a forked child does not have."""
        self._changed = threading.Condition()
        self._running = 0


foreign_code = _ForeignCode()
atexit.register(foreign_code.end)
in_every_child(foreign_code.begin_child)
