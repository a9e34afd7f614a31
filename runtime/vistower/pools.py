"""Thread pools, used so that nothing waits for a thread that does not come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def submit(
    pool: ThreadPoolExecutor, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
) -> Future[R]:
    """``pool.submit``, or the call itself where the pool takes nothing more.

    So does every pool once the interpreter is exiting, while other threads of it still work.
    """
    try:
        return pool.submit(function, *args, **kwargs)
    except RuntimeError as error:
        # Where a thread cannot be started the same exception comes, but the work was taken.
        if "cannot schedule new futures" not in str(error):
            raise
    done: Future[R] = Future()
    try:
        done.set_result(function(*args, **kwargs))
    except BaseException as error:
        done.set_exception(error)
    return done


class Pool(ThreadPoolExecutor):
    """Threads that can be shut down from anywhere, one of them too."""

    def __init__(self, threads: int, name: str, *, as_needed: bool = False) -> None:
        """Name the threads; they start with their work.

        Args:
            threads: how many at most.
            name: what theirs begin with.
            as_needed: start one when all others are busy, not all with the first work. A signal's
                exception in the caller of `submit` may then leave a lock of Python's held.
        """
        own = self._own = set[threading.Thread]()
        self._as_needed = as_needed
        super().__init__(
            threads,
            thread_name_prefix=name,
            initializer=lambda: own.add(threading.current_thread()),
        )

    def _adjust_thread_count(self) -> None:
        # Python's own counts the idle ones with a semaphore, which is a lock in Python code: where
        # KeyboardInterrupt comes in the middle of it, it stays locked, and the threads wait for it.
        if self._as_needed:
            super()._adjust_thread_count()
            return
        try:
            while len(self._threads) < self._max_workers:
                super()._adjust_thread_count()
        except RuntimeError:  # No more threads can be started: those that were do the work.
            if not self._threads:
                raise

    @property
    def is_calling(self) -> bool:
        """Whether the calling thread is one of them."""
        return threading.current_thread() in self._own

    def end(self, *, wait: bool = True, drop: bool = False) -> None:
        """Take nothing more, and wait for what was taken; one of the threads does not wait.

        Args:
            wait: for the threads to end.
            drop: what has not begun.
        """
        wait = wait and not self.is_calling
        self.shutdown(wait=wait, cancel_futures=drop)
        # Where an exception of a signal's came while it was started, the executor has lost it.
        for thread in tuple(self._own) if wait else ():
            thread.join()
