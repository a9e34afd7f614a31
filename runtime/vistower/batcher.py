"""Concurrent single-picture calls, merged into batches: for a server with many callers.

Nothing of a caller's runs in the thread that runs the tower: the callbacks of futures have threads
of their own. And no thread waits while there is nothing to do, so a batcher that is dropped leaves
none.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.arguments import whole_number
from vistower.embeddings import Embeddings
from vistower.encoder import VisionEncoder
from vistower.errors import ClosedError, ImageError, InferenceError, OptionError, VistowerError
from vistower.forks import Process
from vistower.pools import Pool, submit
from vistower.preprocess.images import ImageInput
from vistower.preprocess.several import detached

logger = logging.getLogger("vistower")

Array = npt.NDArray[np.float32]

_CALLBACK_THREADS = 32
"""Callbacks that may block at the same time before others wait for them."""


@dataclass(frozen=True)
class _Request:
    """A prepared picture (3, H, W), its answer, and when it began to wait (seconds)."""

    pixel_values: Array
    answer: Future[Embeddings]
    since: float


class _Answer(Future[Embeddings]):
    """A future whose callbacks run in threads of their own: they may block, call back or raise."""

    def __init__(self, callbacks: Pool) -> None:
        super().__init__()
        # A future that is kept must not keep the threads of a batcher that is gone.
        self._callbacks = weakref.ref(callbacks)

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        callbacks = self._callbacks
        super().add_done_callback(lambda done: _call_in(callbacks(), fn, done))


def _call_in(
    pool: Pool | None, callback: Callable[[Future[Any]], object], done: Future[Any]
) -> None:
    if pool is None:
        _call(callback, done)
    else:
        submit(pool, _call, callback, done)


def _call(callback: Callable[[Future[Any]], object], done: Future[Any]) -> None:
    try:
        callback(done)
    except BaseException:
        logger.exception("A callback of a batcher's future raised.")


class DynamicBatcher:
    """Merges the pictures of concurrent callers into forward passes of up to ``max_batch``.

    The tower starts as soon as it is free and no caller is about to add a picture, a batch is
    full, or its oldest picture has waited ``max_wait`` seconds: a lone caller never waits, and
    while one batch runs the next one gathers. Close it, or use it as a context manager.
    Thread-safe, and safe to call from the callbacks of its own futures, which run in threads of
    their own.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        *,
        max_batch: int = 32,
        max_wait: float = 0.005,
        workers: int | None = None,
        outputs: Sequence[str] | str | None = None,
        normalize: bool = False,
    ) -> None:
        """Set up the threads; they start with the first picture.

        Args:
            encoder: stays open after the batcher is closed.
            max_batch: pictures of a forward pass at most.
            max_wait: seconds a picture waits for others while the tower is free, at most.
            workers: threads that prepare the pictures of `submit` and `aencode`; `encode` does it
                in its caller's. None for a number that fits the device.
            outputs: the parts wanted of every picture, as for `VisionEncoder.encode`.
            normalize: as for `VisionEncoder.encode`.

        Raises:
            NoSuchOutputError: one of ``outputs`` that the tower has not.
            OptionError: a number out of its range, or no such output at all.
        """
        self._process = Process()
        self._encoder = encoder
        self._wanted = encoder.request(outputs, normalize)
        self._max_batch = whole_number("max_batch", max_batch, 1)
        try:
            self._max_wait = float(max_wait)
        except (TypeError, ValueError):
            self._max_wait = -1
        if not self._max_wait >= 0:
            raise OptionError(f"max_wait={max_wait!r} was asked for; it is ≥ 0 seconds.")
        if workers is None:
            workers = encoder.preparing_workers
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._preparing = 0
        self._serving = False
        self._server: int | None = None
        self._closed = False
        self._workers = Pool(whole_number("workers", workers, 1), "vistower-prepare")
        self._model = Pool(1, "vistower-forward")
        self._callbacks = Pool(_CALLBACK_THREADS, "vistower-callback", as_needed=True)

    def __enter__(self) -> DynamicBatcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def encode(self, image: ImageInput) -> Embeddings:
        """Embed one picture (B = 1), prepared in this thread, beside those of other callers.

        Raises:
            ImageDecodeError, ImageFormatError: the picture cannot be used.
            InferenceError: ONNX Runtime failed on its batch, or the batcher was inherited through
                fork.
            ClosedError: the batcher was closed.
        """
        self._announce()
        answer: Future[Embeddings] = Future()
        if self._server == threading.get_ident():
            # A callback, which has no thread of its own any more: the interpreter is exiting.
            self._arrive(None)
            return self._encoder.embed(self._encoder.preprocess(image), self._wanted)
        self._prepare(image, answer)
        return answer.result()

    def submit(self, image: ImageInput) -> Future[Embeddings]:
        """`encode` without waiting: the future gives what it returns or raises.

        Its callbacks run in threads of their own, one after the other or at the same time; what
        they raise is logged.

        Raises:
            ClosedError: the batcher was closed.
            InferenceError: it was inherited through fork.
        """
        answer = _Answer(self._callbacks)
        self._submit(image, answer)
        return answer

    async def aencode(self, image: ImageInput) -> Embeddings:
        """`encode` for asyncio."""
        import asyncio

        answer: Future[Embeddings] = Future()
        self._submit(image, answer)
        return await asyncio.wrap_future(answer)

    def close(self) -> None:
        """Refuse new pictures, answer those already taken, and end the threads.

        A picture that another thread's `encode` is preparing meanwhile is answered by that thread.
        """
        if not self._process.is_here:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._workers.end()
        # Not where a callback closes it while the interpreter exits.
        self._model.end(wait=self._server != threading.get_ident())
        self._callbacks.end()

    def _submit(self, image: ImageInput, answer: Future[Embeddings]) -> None:
        self._announce()
        taken = False
        try:
            submit(self._workers, self._prepare, detached(image), answer)
            taken = True
        except ImageError as error:
            _settle(answer, error)
        finally:
            if not taken:
                self._arrive(None)

    def _announce(self) -> None:
        """Let the tower know that a picture is on its way; `_arrive` must follow."""
        self._process.require("batcher")
        with self._changed:
            if self._closed:
                raise ClosedError("The batcher was closed: make another one.")
            self._preparing += 1

    def _arrive(self, request: _Request | None) -> None:
        """Queue what was announced, or give it up, and see that the tower runs."""
        with self._changed:
            self._preparing -= 1
            if request is not None:
                self._waiting.append(request)
            start = bool(self._waiting) and not self._serving
            self._serving |= start
            self._changed.notify_all()
        if start:
            try:
                submit(self._model, self._serve)
            except RuntimeError as error:  # No thread can be started.
                with self._changed:
                    self._serving = False
                    waiting, self._waiting = self._waiting, deque()
                for one in waiting:
                    _settle(one.answer, _failed(error))

    def _prepare(self, image: ImageInput, answer: Future[Embeddings]) -> None:
        request = None
        try:
            if answer.set_running_or_notify_cancel():
                pixel_values = self._encoder.processor(image)
                request = _Request(pixel_values, answer, time.monotonic())
        except BaseException as error:
            _settle(answer, error)
        finally:
            self._arrive(request)

    def _serve(self) -> None:
        """Run the tower until nothing waits for it."""
        self._server = threading.get_ident()
        while batch := self._next_batch():
            try:
                pixel_values = np.stack([request.pixel_values for request in batch])
                found = self._encoder.embed(pixel_values, self._wanted)
                results = [found.alone(row) for row in range(len(batch))]
            except BaseException as error:
                for request in batch:
                    _settle(request.answer, _failed(error))
            else:
                for request, result in zip(batch, results, strict=True):
                    _settle(request.answer, result)

    def _next_batch(self) -> list[_Request]:
        """Gather the next batch; empty where there is none, and then `_arrive` starts anew."""
        with self._changed:
            if not self._waiting:
                self._serving, self._server = False, None
                return []
            deadline = self._waiting[0].since + self._max_wait
            while self._preparing and len(self._waiting) < self._max_batch:
                left = min(deadline - time.monotonic(), threading.TIMEOUT_MAX)
                if left <= 0 or not self._changed.wait(left):
                    break
            count = min(len(self._waiting), self._max_batch)
            return [self._waiting.popleft() for _ in range(count)]


def _failed(error: BaseException) -> VistowerError:
    """What one caller raises: an exception of its own, they add their tracebacks to it."""
    kind = type(error) if isinstance(error, VistowerError) else InferenceError
    own = kind(f"The batch of this picture failed: {error}")
    own.__cause__ = error
    return own


def _settle(answer: Future[Embeddings], outcome: Embeddings | BaseException) -> None:
    # Somebody else may have set what is his to wait for.
    with suppress(InvalidStateError):
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)
