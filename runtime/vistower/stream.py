"""Pictures in, embeddings out, in order: decoding, preprocessing and inference at the same time.

A stream has ``workers`` threads that decode and preprocess (Pillow and NumPy release the GIL) and
one thread that runs the graph. The caller's thread pulls the source, so the source needs no locks,
and is never pulled further than ``batch_size * (1 + prefetch)`` pictures past the last result
given out: memory is bounded, for an endless source too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from vistower.arguments import whole_number
from vistower.embeddings import Embeddings, Parts
from vistower.errors import ImageError, OptionError
from vistower.forks import Process
from vistower.pools import Pool, submit
from vistower.preprocess.images import ImageInput
from vistower.preprocess.several import Repeats, detached, plain

Array = npt.NDArray[np.float32]

OnError: TypeAlias = Literal["raise", "skip", "record"]
"""What becomes of a picture that cannot be used: see `StreamOptions`."""


@dataclass(frozen=True)
class StreamOptions:
    """How a stream runs.

    ``batch_size`` is the number of pictures of a forward pass, ``workers`` of threads that
    prepare pictures, ``prefetch`` of batches prepared beyond the one being given out (0: nothing
    overlaps). ``on_error``: a picture that cannot be used (`ImageError`) is raised at its place
    after the results before it, is skipped, or is recorded in its result. Whatever else goes
    wrong is raised.

    Raises:
        OptionError: a number or a policy that is not one.
    """

    batch_size: int
    workers: int
    prefetch: int
    on_error: OnError

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("workers", 1), ("prefetch", 0)):
            number = whole_number(name, getattr(self, name), least)
            object.__setattr__(self, name, number)
        if self.on_error not in get_args(OnError):
            raise OptionError(
                f"on_error={self.on_error!r} is not known. Use {', '.join(get_args(OnError))}."
            )


@dataclass(frozen=True)
class StreamResult(Parts):
    """The embedding of one picture of a stream, or why it has none.

    ``index`` counts the pictures of the source from 0 and ``source`` is the picture as it was
    given. ``error`` is None except under ``on_error="record"``; where it is set, reading any part
    raises it. The parts are those of `Parts` without the leading axis: vectors have memory of their
    own, ``patches`` and ``registers`` are views of their batch: copy what you keep alone.
    """

    index: int
    source: ImageInput
    error: ImageError | None = None
    _parts: Mapping[str, Array] = field(default_factory=dict, repr=False)
    _absent: Mapping[str, str] = field(default_factory=dict, repr=False)

    def _part(self, name: str) -> Array:
        if self.error is not None:
            raise self.error
        return super()._part(name)


@dataclass
class _Batch:
    """Pictures of one forward pass: row i of ``pixel_values`` is written by ``rows[i]``.

    ``outcome`` gets one thing, before the future of the batch is done: waiting for a future in
    Python code, its lock may stay held where ``KeyboardInterrupt`` comes, for ever.
    """

    start: int
    pixel_values: Array
    sources: list[ImageInput] = field(default_factory=list)
    rows: list[Future[object]] = field(default_factory=list)
    outcome: SimpleQueue[_Done | BaseException] = field(default_factory=SimpleQueue)


@dataclass(frozen=True)
class _Done:
    """A batch after its forward pass: errors by row; ``found`` holds the rows without one."""

    errors: list[BaseException | None]
    found: Embeddings | None


class Pipeline:
    """The threads of one stream and the pictures in them; `close` ends both."""

    def __init__(
        self,
        empty: Callable[[int], Array],
        prepare: Callable[[ImageInput, Array], object],
        forward: Callable[[Array], Embeddings],
        options: StreamOptions,
    ) -> None:
        """Join the two stages.

        Args:
            empty: an uninitialized batch (B, 3, H, W).
            prepare: writes the ``pixel_values`` (3, H, W) of a picture; called by many threads.
            forward: (B, 3, H, W) → what is asked of them; called by one thread.
            options: the sizes.
        """
        self._empty = empty
        self._prepare = prepare
        self._forward = forward
        self._options = options
        self._limit = options.batch_size * (1 + options.prefetch)
        self._pulled = 0
        self._given = 0
        self._open: _Batch | None = None
        self._batches: deque[tuple[_Batch, Future[None]]] = deque()
        self._ready: deque[StreamResult | BaseException] = deque()
        self._buffers: deque[Array] = deque()
        self._repeats = Repeats()
        self._process = Process()
        self._workers = Pool(options.workers, "vistower-prepare")
        self._model = Pool(1, "vistower-forward")

    @property
    def has_room(self) -> bool:
        """Whether another picture may be put in."""
        return self._pulled - self._given < self._limit

    def put(self, image: ImageInput) -> None:
        """Start preparing a picture; the batch it completes is queued for the model."""
        batch = self._open
        if batch is None:
            batch = self._open = _Batch(self._pulled, self._buffer())
        out = batch.pixel_values[len(batch.rows)]
        try:
            image = plain(image)
            self._repeats.check(image)
            row = submit(self._workers, self._prepare, detached(image), out)
        except ImageError as error:
            row = Future()
            row.set_exception(error)
        batch.sources.append(image)
        batch.rows.append(row)
        self._pulled += 1
        if len(batch.rows) == self._options.batch_size:
            self.flush()

    def flush(self) -> None:
        """Queue the batch that is not full: the source has ended."""
        if self._open is not None:
            batch, self._open = self._open, None
            self._batches.append((batch, submit(self._model, self._run, batch)))

    def waiting_for(self) -> Future[None] | None:
        """The batch whose results come next; None if results are ready, or nothing is left."""
        return None if self._ready or not self._batches else self._batches[0][1]

    def receive(self) -> None:
        """Wait for the batch of `waiting_for`, and take it in.

        Raises:
            Exception: what its forward pass raised.
        """
        batch, on_error = self._batches[0][0], self._options.on_error
        done = batch.outcome.get()
        self._batches.popleft()
        if isinstance(done, BaseException):
            raise done
        row = 0
        for offset, (source, error) in enumerate(zip(batch.sources, done.errors, strict=True)):
            index = batch.start + offset
            if error is None:
                found = cast("Embeddings", done.found)
                parts = found.row(row)
                self._ready.append(StreamResult(index, source, None, parts, found._absent))
                row += 1
            elif not isinstance(error, ImageError) or on_error == "raise":
                self._ready.append(error)
            elif on_error == "record":
                self._ready.append(StreamResult(index, source, error))
            else:
                self._given += 1
        if len(self._buffers) <= self._options.prefetch:
            self._buffers.append(batch.pixel_values)

    def pop(self) -> StreamResult | None:
        """The next result, or None where none is ready.

        Raises:
            Exception: what went wrong with the next picture.
        """
        if not self._ready:
            return None
        self._given += 1
        result = self._ready.popleft()
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """Drop what is not running yet, wait for what is, and end the threads."""
        if self._process.is_here:
            # The garbage collector may call this in any thread, in one of these too.
            own = self._workers.is_calling or self._model.is_calling
            self._workers.end(wait=False, drop=True)
            self._model.end(wait=not own, drop=True)
            self._workers.end(wait=not own)

    def require_here(self) -> None:
        """Raise where the stream was inherited through fork.

        Raises:
            InferenceError: see there.
        """
        self._process.require("stream")

    def _buffer(self) -> Array:
        # A fresh batch costs page faults; the pictures of the one before have been computed.
        return self._buffers.popleft() if self._buffers else self._empty(self._options.batch_size)

    def _run(self, batch: _Batch) -> None:
        try:
            batch.outcome.put(self._done(batch))
        except BaseException as error:
            batch.outcome.put(error)

    def _done(self, batch: _Batch) -> _Done:
        errors = [row.exception() for row in batch.rows]
        good = [row for row, error in enumerate(errors) if error is None]
        if not good:
            return _Done(errors, None)
        every = len(good) == len(errors)
        rows = batch.pixel_values[: len(good)] if every else batch.pixel_values[good]
        return _Done(errors, self._forward(rows))


def stream(
    images: Iterable[ImageInput], start: Callable[[], Pipeline]
) -> Generator[StreamResult, None, None]:
    """Pull the source through a pipeline; closing the generator closes the pipeline.

    An exception of the source is raised after the results of the pictures before it.
    """
    pipeline = start()
    failure: Exception | None = None
    try:
        source: Iterator[ImageInput] | None = iter(images)
        while True:
            pipeline.require_here()
            while source is not None and pipeline.has_room:
                try:
                    image = next(source)
                except StopIteration:
                    source = None
                    pipeline.flush()
                except Exception as error:
                    source, failure = None, error
                    pipeline.flush()
                else:
                    pipeline.put(image)
            if pipeline.waiting_for() is not None:
                pipeline.receive()
            if (result := pipeline.pop()) is not None:
                yield result
            elif source is None and pipeline.waiting_for() is None:
                break
        if failure is not None:
            raise failure
    finally:
        pipeline.close()


async def astream(
    images: Iterable[ImageInput] | AsyncIterable[ImageInput], start: Callable[[], Pipeline]
) -> AsyncGenerator[StreamResult, None]:
    """`stream` for asyncio: waits without blocking the event loop, which pulls the source."""
    import asyncio  # With it, `import vistower` would take half as long again.

    pipeline = start()
    failure: Exception | None = None
    try:
        source: AsyncIterator[ImageInput] | None = _aiter(images)
        while True:
            pipeline.require_here()
            while source is not None and pipeline.has_room:
                try:
                    image = await anext(source)
                except StopAsyncIteration:
                    source = None
                    pipeline.flush()
                except Exception as error:
                    source, failure = None, error
                    pipeline.flush()
                else:
                    pipeline.put(image)
            if (future := pipeline.waiting_for()) is not None:
                await asyncio.wrap_future(future)
                pipeline.receive()
            if (result := pipeline.pop()) is not None:
                yield result
            elif source is None and pipeline.waiting_for() is None:
                break
        if failure is not None:
            raise failure
    finally:
        try:
            await asyncio.to_thread(pipeline.close)
        except RuntimeError:  # The loop is closed, or its threads have ended.
            pipeline.close()


async def _each(images: Iterable[ImageInput]) -> AsyncIterator[ImageInput]:
    for image in images:
        yield image


def _aiter(images: Iterable[ImageInput] | AsyncIterable[ImageInput]) -> AsyncIterator[ImageInput]:
    if isinstance(images, AsyncIterable):
        return aiter(images)
    return _each(images)
