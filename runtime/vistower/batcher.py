"""Concurrent single-picture calls, merged into batches: for a server with many callers."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from vistower.encoder import Embeddings, VisionEncoder
from vistower.errors import ClosedError, InferenceError, OptionError
from vistower.preprocess.images import ImageInput, detached

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Request:
    """A prepared picture (3, H, W), its answer, and when it began to wait (seconds)."""

    pixel_values: Array
    answer: Future[Embeddings]
    since: float


class DynamicBatcher:
    """Merges the pictures of concurrent callers into forward passes of up to ``max_batch``.

    The tower starts as soon as it is free and no caller is about to add a picture, a batch is
    full, or its oldest picture has waited ``max_wait`` seconds: a lone caller never waits, and
    while one batch runs the next one gathers. Close it, or use it as a context manager.
    Thread-safe.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        *,
        max_batch: int = 32,
        max_wait: float = 0.005,
        workers: int | None = None,
    ) -> None:
        """Start the thread that runs the tower.

        Args:
            encoder: stays open after the batcher is closed.
            max_batch: pictures of a forward pass at most.
            max_wait: seconds a picture waits for others while the tower is free, at most.
            workers: threads that prepare the pictures of `submit` and `aencode`; `encode` does it
                in its caller's. None for a number that fits the device.

        Raises:
            OptionError: a number out of its range.
        """
        if not isinstance(max_batch, int) or max_batch < 1:
            raise OptionError(f"max_batch={max_batch!r} was asked for; it is an integer ≥ 1.")
        if not max_wait >= 0:
            raise OptionError(f"max_wait={max_wait!r} was asked for; it is ≥ 0 seconds.")
        if workers is None:
            workers = encoder.preparing_workers
        if workers < 1:
            raise OptionError(f"workers={workers!r} was asked for; it is an integer ≥ 1.")
        self._encoder = encoder
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._preparing = 0
        self._closed = False
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="vistower-prepare")
        self._model = threading.Thread(target=self._serve, name="vistower-forward", daemon=True)
        self._model.start()

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
            InferenceError: ONNX Runtime failed on its batch.
            ClosedError: the batcher was closed.
        """
        self._announce()
        answer: Future[Embeddings] = Future()
        self._prepare(image, answer)
        return answer.result()

    def submit(self, image: ImageInput) -> Future[Embeddings]:
        """`encode` without waiting: the future gives what it returns or raises.

        Raises:
            ClosedError: the batcher was closed.
        """
        self._announce()
        answer: Future[Embeddings] = Future()
        try:
            self._workers.submit(self._prepare, detached(image), answer)
        except BaseException as error:
            self._give_up()
            answer.set_exception(error)
        return answer

    async def aencode(self, image: ImageInput) -> Embeddings:
        """`encode` for asyncio."""
        import asyncio

        return await asyncio.wrap_future(self.submit(image))

    def close(self) -> None:
        """Refuse new pictures, answer those already taken, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._workers.shutdown(wait=True)
        self._model.join()

    def _announce(self) -> None:
        """Let the tower know that a picture is on its way."""
        with self._changed:
            if self._closed:
                raise ClosedError("The batcher was closed: make another one.")
            self._preparing += 1

    def _give_up(self) -> None:
        with self._changed:
            self._preparing -= 1
            self._changed.notify_all()

    def _prepare(self, image: ImageInput, answer: Future[Embeddings]) -> None:
        if not answer.set_running_or_notify_cancel():
            self._give_up()
            return
        try:
            pixel_values = self._encoder.processor(image)
        except BaseException as error:
            self._give_up()
            answer.set_exception(error)
            return
        with self._changed:
            self._preparing -= 1
            self._waiting.append(_Request(pixel_values, answer, time.monotonic()))
            self._changed.notify_all()

    def _serve(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                state = self._encoder.forward(np.stack([r.pixel_values for r in batch]))
            except BaseException as error:
                for request in batch:
                    # Each caller raises an exception of its own: they add their tracebacks to it.
                    own = InferenceError(f"The batch of this picture failed: {error}")
                    own.__cause__ = error
                    request.answer.set_exception(own)
                continue
            layout = self._encoder.layout
            for row, request in enumerate(batch):
                one = state[row : row + 1].copy()
                request.answer.set_result(Embeddings(layout.cls(one), layout.patches(one)))

    def _next_batch(self) -> list[_Request] | None:
        """Wait for the next batch; None once the batcher is closed and empty."""
        with self._changed:
            while not self._waiting:
                if self._closed and not self._preparing:
                    return None
                self._changed.wait()
            deadline = self._waiting[0].since + self._max_wait
            while self._preparing and len(self._waiting) < self._max_batch:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            count = min(len(self._waiting), self._max_batch)
            return [self._waiting.popleft() for _ in range(count)]
