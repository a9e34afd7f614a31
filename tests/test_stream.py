"""Streams: order, bounds, errors in their place, and no thread left behind."""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vistower import VisionEncoder
from vistower.errors import ImageDecodeError, ImageFormatError, InferenceError, OptionError
from vistower_export.pictures import SAMPLES

BAD = b"no picture"


@pytest.fixture(scope="module")
def encoder(dinov3_bundle: Path) -> VisionEncoder:
    return VisionEncoder.open(dinov3_bundle, device="cpu")


@pytest.fixture(scope="module")
def expected(encoder: VisionEncoder) -> np.ndarray:
    return np.concatenate([encoder.encode(path).cls for path in SAMPLES])


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def shapes(count: int) -> Iterator[np.ndarray]:
    """Small pictures that differ in size and content."""
    for index in range(count):
        yield np.full((5 + index % 7, 9, 3), index % 256, np.uint8)


def every_kind(path: Path) -> list[Any]:
    image = Image.open(path).convert("RGB")
    data = path.read_bytes()
    return [
        path,
        str(path),
        data,
        bytearray(data),
        memoryview(data),
        io.BytesIO(data),
        image,
        np.asarray(image),
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize(("workers", "prefetch"), [(1, 0), (3, 2)])
def test_results_come_in_order(
    batch_size: int, workers: int, prefetch: int, encoder: VisionEncoder
) -> None:
    images = list(shapes(40))
    results = list(
        encoder.encode_stream(
            iter(images), batch_size=batch_size, workers=workers, prefetch=prefetch
        )
    )
    want = encoder.encode(images)
    assert [result.index for result in results] == list(range(40))
    assert all(result.source is image for result, image in zip(results, images, strict=True))
    assert np.abs(np.stack([result.cls for result in results]) - want.cls).max() <= 1e-5
    assert np.abs(np.stack([result.patches for result in results]) - want.patches).max() <= 1e-5


def test_every_kind_of_source_is_the_same_picture(
    encoder: VisionEncoder, expected: np.ndarray
) -> None:
    sources = every_kind(SAMPLES[0])
    pixels = encoder.preprocess(sources)
    assert (pixels == pixels[:1]).all()
    assert np.abs(encoder.encode(sources).cls - expected[:1]).max() <= 1e-5
    for one in sources:
        assert np.array_equal(encoder.preprocess(one), pixels[:1])
    results = list(encoder.encode_stream(sources, batch_size=3))
    assert np.abs(np.stack([result.cls for result in results]) - expected[:1]).max() <= 1e-5


def test_a_file_may_be_closed_once_it_is_pulled(
    encoder: VisionEncoder, expected: np.ndarray
) -> None:
    def opened() -> Iterator[io.BufferedReader]:
        for path in SAMPLES:
            with path.open("rb") as file:
                yield file

    results = list(encoder.encode_stream(opened(), batch_size=2))
    assert np.abs(np.stack([result.cls for result in results]) - expected).max() <= 1e-5


def test_a_lazily_opened_image_may_come_many_times(
    encoder: VisionEncoder, expected: np.ndarray
) -> None:
    with Image.open(SAMPLES[0]) as image:
        results = list(encoder.encode_stream([image] * 24, batch_size=4, workers=8))
    assert np.abs(np.stack([result.cls for result in results]) - expected[:1]).max() <= 1e-5


@pytest.mark.parametrize(("batch_size", "prefetch"), [(1, 0), (4, 0), (4, 1), (3, 2)])
def test_an_endless_source_is_never_pulled_far_ahead(
    batch_size: int, prefetch: int, encoder: VisionEncoder
) -> None:
    pulled = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal pulled
        for image in itertools.cycle(shapes(9)):
            pulled += 1
            yield image

    stream = encoder.encode_stream(endless(), batch_size=batch_size, prefetch=prefetch)
    assert pulled == 0
    for given, _ in enumerate(itertools.islice(stream, 50)):
        assert pulled - given <= batch_size * (1 + prefetch)
    time.sleep(0.05)
    assert pulled - 49 <= batch_size * (1 + prefetch)


def test_nothing_gives_nothing(encoder: VisionEncoder) -> None:
    assert list(encoder.encode_stream([])) == []
    assert list(encoder.encode_stream(np.empty((0, 4, 4, 3), np.uint8))) == []


# Errors


def test_raise_comes_after_the_results_before_it(
    encoder: VisionEncoder, expected: np.ndarray
) -> None:
    stream = encoder.encode_stream([*SAMPLES[:3], BAD, SAMPLES[3]], batch_size=2)
    have = [next(stream).cls for _ in range(3)]
    assert np.abs(np.stack(have) - expected[:3]).max() <= 1e-5
    with pytest.raises(ImageDecodeError, match="10 bytes") as caught:
        next(stream)
    assert caught.value.__cause__ is not None
    assert list(stream) == []


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_skip_and_record(batch_size: int, encoder: VisionEncoder, expected: np.ndarray) -> None:
    closed = io.BytesIO(b"x")
    closed.close()
    wrong = np.zeros((4, 4), np.uint8)
    sources = [BAD, SAMPLES[0], closed, wrong, b"", "missing.png", SAMPLES[1], BAD, BAD]
    skipped = list(encoder.encode_stream(sources, batch_size=batch_size, on_error="skip"))
    assert [result.index for result in skipped] == [1, 6]
    recorded = list(encoder.encode_stream(sources, batch_size=batch_size, on_error="record"))
    assert [result.index for result in recorded] == list(range(len(sources)))
    assert [result.error is None for result in recorded].count(True) == 2
    assert isinstance(recorded[3].error, ImageFormatError)
    for result in recorded:
        if result.error is not None:
            with pytest.raises(type(result.error)) as caught:
                _ = result.cls
            assert caught.value is result.error
    for results in (skipped, [recorded[1], recorded[6]]):
        have = np.stack([result.cls for result in results])
        assert np.abs(have - expected[:2]).max() <= 1e-5


@pytest.mark.parametrize("on_error", ["raise", "skip", "record"])
def test_the_sources_own_exception_comes_in_its_place(
    on_error: Any, encoder: VisionEncoder
) -> None:
    def source() -> Iterator[np.ndarray]:
        yield from shapes(5)
        raise KeyError("the source")

    stream = encoder.encode_stream(source(), batch_size=4, on_error=on_error)
    for index in range(5):
        assert next(stream).index == index
    with pytest.raises(KeyError, match="the source"):
        next(stream)


def test_a_failed_forward_is_raised_whatever_the_policy(
    dinov3_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = VisionEncoder.open(dinov3_bundle, device="cpu")
    run, calls = encoder.session.compute, itertools.count()

    def fails_later(pixel_values: np.ndarray, wanted: Any) -> Any:
        if next(calls) == 2:
            raise InferenceError("out of memory")
        return run(pixel_values, wanted)

    monkeypatch.setattr(encoder.session, "compute", fails_later)
    stream = encoder.encode_stream(shapes(20), batch_size=4, on_error="skip")
    assert [next(stream).index for _ in range(8)] == list(range(8))
    with pytest.raises(InferenceError, match="out of memory"):
        next(stream)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"workers": 0}, "workers=0"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"on_error": "ignore"}, "raise, skip, record"),
    ],
)
def test_wrong_options_are_refused_at_the_call(
    options: dict[str, Any], says: str, encoder: VisionEncoder
) -> None:
    for method in (encoder.encode_stream, encoder.aencode_stream):
        with pytest.raises(OptionError, match=says):
            method([], **options)


@pytest.mark.parametrize("index", range(8))
def test_one_picture_is_no_stream(index: int, encoder: VisionEncoder) -> None:
    one = [*every_kind(SAMPLES[0]), 42][index]
    with pytest.raises(ImageFormatError, match="iterable of pictures"):
        encoder.encode_stream(one)


# Ends


def test_stopping_early_ends_the_threads(encoder: VisionEncoder) -> None:
    for result in encoder.encode_stream(itertools.cycle(shapes(9)), batch_size=2, workers=4):
        if result.index == 5:
            break
    stream = encoder.encode_stream(itertools.cycle(shapes(9)), batch_size=2, workers=4)
    next(stream)
    stream.close()
    assert list(stream) == []


def test_a_stream_that_nobody_begins_starts_nothing(encoder: VisionEncoder) -> None:
    before = threading.active_count()
    dropped = [encoder.encode_stream(shapes(3)), encoder.aencode_stream(shapes(3))]
    encoder.encode_stream(shapes(3)).close()
    assert threading.active_count() == before
    del dropped


def test_two_threads_at_one_stream_share_it_or_are_refused(encoder: VisionEncoder) -> None:
    stream = encoder.encode_stream(shapes(40), batch_size=4)
    have: list[int] = []
    said: list[str] = []

    def pull() -> None:
        while True:
            try:
                have.append(next(stream).index)
            except StopIteration:
                return
            except ValueError as error:
                said.append(str(error))

    threads = [threading.Thread(target=pull) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(have) == list(range(40))
    assert set(said) <= {"generator already executing"}


@pytest.mark.parametrize("thread", ["vistower-forward", "vistower-prepare"])
def test_the_garbage_collector_may_end_a_stream_in_its_own_thread(
    thread: str, dinov3_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = VisionEncoder.open(dinov3_bundle, device="cpu")
    run, prepare = encoder.session.compute, type(encoder.processor).__call__
    dropped, collected = threading.Event(), threading.Event()

    def collect_there() -> None:
        if threading.current_thread().name.startswith(thread) and calls.__next__() > 8:
            dropped.wait(30)
            # The tower waits for the picture that this thread prepares.
            while thread == "vistower-prepare" and len(computed) < 9:
                time.sleep(0.01)
            time.sleep(0.1)
            gc.collect()
            collected.set()

    def running(pixel_values: np.ndarray, wanted: Any) -> Any:
        collect_there()
        computed.append(1)
        return run(pixel_values, wanted)

    def preparing(self: Any, image: Any, out: Any = None) -> Any:
        collect_there()
        return prepare(self, image, out)

    monkeypatch.setattr(encoder.session, "compute", running)
    monkeypatch.setattr(type(encoder.processor), "__call__", preparing)
    calls, computed = itertools.count(), list[int]()
    cycle: list[Any] = [encoder.encode_stream(shapes(99), batch_size=1, prefetch=9, workers=1)]
    cycle.append(cycle)
    next(cycle[0])
    before = set(threading.enumerate())
    gc.disable()
    try:
        del cycle
        dropped.set()
        assert collected.wait(30)
    finally:
        gc.enable()
    for one in before:
        if one.name.startswith(("vistower-forward", "vistower-prepare")):
            one.join(30)
            assert not one.is_alive()


def test_many_streams_of_one_encoder_at_once(encoder: VisionEncoder) -> None:
    want = encoder.encode(list(shapes(30))).cls
    have: dict[int, np.ndarray] = {}

    def run(number: int) -> None:
        stream = encoder.encode_stream(shapes(30), batch_size=number + 1)
        have[number] = np.stack([result.cls for result in stream])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(have) == 6
    assert all(np.abs(cls - want).max() <= 1e-5 for cls in have.values())


# asyncio


async def slowly(images: Iterator[np.ndarray]) -> AsyncIterator[np.ndarray]:
    for image in images:
        await asyncio.sleep(0.001)
        yield image


def test_asyncio_gives_the_same(encoder: VisionEncoder) -> None:
    async def run() -> None:
        want = encoder.encode(list(shapes(20))).cls
        for source in (slowly(shapes(20)), shapes(20), list(shapes(20))):
            have = [result.cls async for result in encoder.aencode_stream(source, batch_size=4)]
            assert np.abs(np.stack(have) - want).max() <= 1e-5

    asyncio.run(run())


def test_asyncio_leaves_the_loop_free(encoder: VisionEncoder, monkeypatch: Any) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    run = encoder.session.compute

    def slow(pixel_values: np.ndarray, wanted: Any) -> Any:
        time.sleep(0.05)
        return run(pixel_values, wanted)

    monkeypatch.setattr(encoder.session, "compute", slow)

    async def stream() -> None:
        clock = asyncio.create_task(tick())
        async for result in encoder.aencode_stream(shapes(8), batch_size=4, prefetch=0):
            assert ticks > 0
            assert result.error is None
        clock.cancel()

    asyncio.run(stream())
    assert ticks >= 20


def test_asyncio_errors_and_ends(encoder: VisionEncoder) -> None:
    async def fails() -> AsyncIterator[Any]:
        for image in shapes(3):
            yield image
        raise KeyError("the source")

    async def run() -> None:
        stream = encoder.aencode_stream(fails(), batch_size=2)
        assert [(await anext(stream)).index for _ in range(3)] == [0, 1, 2]
        with pytest.raises(KeyError, match="the source"):
            await anext(stream)

        stream = encoder.aencode_stream([*shapes(3), BAD], batch_size=2)
        for _ in range(3):
            await anext(stream)
        with pytest.raises(ImageDecodeError):
            await anext(stream)

        endless = encoder.aencode_stream(itertools.cycle(shapes(9)), batch_size=2)
        await anext(endless)
        await endless.aclose()

        async def consume() -> None:
            source = itertools.cycle(shapes(9))
            async with aclosing(encoder.aencode_stream(source, batch_size=2)) as results:
                async for _ in results:
                    await asyncio.sleep(0)

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        names = [thread.name for thread in threading.enumerate()]
        # The threads of faked GPUs, which other tests leave, live as long as the process.
        assert not [name for name in names if name.startswith(("vistower-prep", "vistower-forw"))]

    asyncio.run(run())
