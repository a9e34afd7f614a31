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

    def __init__(self, threads: int, name: str) -> None:
        """Name the threads; they start with their work."""
        own = self._own = set[int]()
        super().__init__(
            threads, thread_name_prefix=name, initializer=lambda: own.add(threading.get_ident())
        )

    @property
    def is_calling(self) -> bool:
        """Whether the calling thread is one of them."""
        return threading.get_ident() in self._own

    def end(self, *, wait: bool = True, drop: bool = False) -> None:
        """Take nothing more, and wait for what was taken; one of the threads does not wait.

        Args:
            wait: for the threads to end.
            drop: what has not begun.
        """
        self.shutdown(wait=wait and not self.is_calling, cancel_futures=drop)
