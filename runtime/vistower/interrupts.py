"""SIGINT, SIGTERM and SIGHUP end a command as an exception does: what is half made is removed."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_asked: list[int] = []
_held: list[None] = []
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Stopped(BaseException):
    """A signal asked for the end; nothing that handles errors catches it."""

    def __init__(self, number: int) -> None:
        """``number`` of the signal."""
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it a signal raises `Stopped`, and ends the program with 128 plus its number.

    A second one ends it at once. Signals that are ignored, or that somebody handles, stay so;
    what the first `stoppable` set is left to it.
    """
    changed = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        changed = {number: was for number, was in handlers.items() if was in _DEFAULTS}
    for number in changed:
        signal.signal(number, _stop)
    try:
        yield
    except (Stopped, KeyboardInterrupt) as stop:
        if not changed:
            raise
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        sys.stderr.write(f"stopped by {signal.Signals(number).name}\n")
        sys.exit(128 + number)
    finally:
        for number, was in changed.items():
            signal.signal(number, was)
            _asked.clear()


def require_going() -> None:
    """Raise `Stopped` if a signal asked for the end: it may have become another exception.

    C++ modules that are being imported turn every exception into an ``ImportError``.
    """
    if _asked:
        raise Stopped(_asked[-1])


@contextmanager
def held() -> Iterator[None]:
    """Within it the first signal waits, and raises at the end: for what must be had or not had.

    What is had belongs to a ``try`` around it, whose ``finally`` gives it back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _held.append(None)
    try:
        yield
    finally:
        _held.pop()
    require_going()


def _stop(number: int, frame: FrameType | None) -> None:
    for each in _SIGNALS:
        if signal.getsignal(each) is _stop:
            signal.signal(each, signal.SIG_DFL)
    _asked.append(number)
    if not _held:
        raise Stopped(number)
