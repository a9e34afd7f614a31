"""Many callers of one tower, with and without the dynamic batcher."""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vistower import DynamicBatcher, Embeddings, VisionEncoder
from vistower.errors import (
    BatchMemoryError,
    ClosedError,
    ImageDecodeError,
    InferenceError,
    OptionError,
)
from vistower_export.pictures import SAMPLES

IMAGES = [np.full((6 + index, 9, 3), index * 7, np.uint8) for index in range(24)]


@pytest.fixture(scope="module")
def encoder(clip_bundle: Path) -> VisionEncoder:
    return VisionEncoder.open(clip_bundle, device="cpu")


@pytest.fixture(scope="module")
def expected(encoder: VisionEncoder) -> np.ndarray:
    return encoder.encode(IMAGES).cls


@pytest.fixture
def batches(encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of each forward pass, made slow enough for callers to gather."""
    sizes: list[int] = []
    run = encoder.session.compute

    def slow(pixel_values: np.ndarray, wanted: Any) -> Any:
        sizes.append(len(pixel_values))
        time.sleep(0.02)
        return run(pixel_values, wanted)

    monkeypatch.setattr(encoder.session, "compute", slow)
    return sizes


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def close(have: Any, want: np.ndarray) -> bool:
    return bool(np.abs(np.concatenate([one.cls for one in have]) - want).max() <= 1e-5)


def test_one_encoder_is_shared_by_threads(encoder: VisionEncoder, expected: np.ndarray) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert close(list(pool.map(encoder.encode, IMAGES * 4)), np.tile(expected, (4, 1)))


def test_concurrent_calls_are_merged(
    encoder: VisionEncoder, expected: np.ndarray, batches: list[int]
) -> None:
    with DynamicBatcher(encoder, max_batch=8) as batcher, ThreadPoolExecutor(24) as pool:
        have = list(pool.map(batcher.encode, IMAGES))
    assert close(have, expected)
    assert all(one.patches.shape == (1, 49, 64) for one in have)
    assert sum(batches) == 24
    assert max(batches) <= 8
    assert len(batches) < 12


def test_a_lone_caller_does_not_wait(encoder: VisionEncoder) -> None:
    with DynamicBatcher(encoder, max_wait=60) as batcher:
        assert batcher.encode(IMAGES[0]).cls.shape == (1, 64)


def test_futures_and_asyncio(
    encoder: VisionEncoder, expected: np.ndarray, batches: list[int]
) -> None:
    async def run(batcher: DynamicBatcher) -> list[Any]:
        return list(await asyncio.gather(*(batcher.aencode(image) for image in IMAGES)))

    with DynamicBatcher(encoder, workers=3) as batcher:
        futures = [batcher.submit(image) for image in IMAGES]
        assert close([future.result() for future in futures], expected)
        assert close(asyncio.run(run(batcher)), expected)
    assert len(batches) < 24


def test_an_error_reaches_its_own_caller(encoder: VisionEncoder, expected: np.ndarray) -> None:
    with DynamicBatcher(encoder) as batcher:
        futures = [batcher.submit(image) for image in (IMAGES[0], b"no picture", IMAGES[1])]
        with pytest.raises(ImageDecodeError, match="10 bytes"):
            futures[1].result()
        with pytest.raises(ImageDecodeError, match="missing"):
            batcher.encode("missing.png")
        assert close([futures[0].result(), futures[2].result()], expected[:2])


def test_a_failed_batch_reaches_each_of_its_callers(
    encoder: VisionEncoder, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(pixel_values: np.ndarray, wanted: Any) -> Any:
        raise InferenceError("out of memory")

    with DynamicBatcher(encoder) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(encoder.session, "compute", fails)
            futures = [batcher.submit(image) for image in IMAGES[:3]]
            errors = [future.exception() for future in futures]
        assert all(isinstance(error, InferenceError) for error in errors)
        assert len(set(map(id, errors))) == 3
        assert "out of memory" in str(errors[0])
        assert close([batcher.encode(IMAGES[0])], expected[:1])


def test_closing_answers_what_was_taken_and_refuses_the_rest(
    encoder: VisionEncoder, expected: np.ndarray, batches: list[int]
) -> None:
    batcher = DynamicBatcher(encoder, max_batch=4)
    futures = [batcher.submit(image) for image in IMAGES]
    batcher.close()
    assert close([future.result(timeout=0) for future in futures], expected)
    for call in (batcher.encode, batcher.submit):
        with pytest.raises(ClosedError):
            call(SAMPLES[0])
    batcher.close()


def test_a_cancelled_picture_is_left_out(encoder: VisionEncoder, batches: list[int]) -> None:
    with DynamicBatcher(encoder, workers=1) as batcher:
        futures = [batcher.submit(SAMPLES[0]) for _ in range(12)]
        cancelled = [future.cancel() for future in futures[6:]]
    assert sum(cancelled) + sum(batches) == 12


def answered(batcher: DynamicBatcher, expected: np.ndarray) -> None:
    """The batcher still works; a hang is an error."""
    assert close([batcher.submit(IMAGES[0]).result(timeout=30)], expected[:1])


def test_a_callback_may_call_back(encoder: VisionEncoder, expected: np.ndarray) -> None:
    said: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def call_back(future: Future[Embeddings]) -> None:
        said.put(batcher.encode(IMAGES[1]))
        inner = batcher.submit(IMAGES[2])
        said.put(inner.result(timeout=30))
        # The callback of a callback, waited for in it.
        told = threading.Event()
        inner.add_done_callback(lambda _: told.set())
        said.put(told.wait(30))

    with DynamicBatcher(encoder) as batcher:
        batcher.submit(IMAGES[0]).add_done_callback(call_back)
        assert close([said.get(timeout=30), said.get(timeout=30)], expected[1:3])
        assert said.get(timeout=30) is True


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_callback_may_raise(
    error: type[BaseException],
    encoder: VisionEncoder,
    expected: np.ndarray,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def raises(future: Future[Embeddings]) -> None:
        raise error("of the callback")

    with DynamicBatcher(encoder) as batcher:
        for _ in range(2):
            future = batcher.submit(IMAGES[0])
            future.add_done_callback(raises)
            assert close([future.result(timeout=30)], expected[:1])
        answered(batcher, expected)
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [error] * 2


def test_a_callback_may_block(encoder: VisionEncoder, expected: np.ndarray) -> None:
    free = threading.Event()
    with DynamicBatcher(encoder) as batcher:
        for image in IMAGES[:8]:
            batcher.submit(image).add_done_callback(lambda _: free.wait(30))
        answered(batcher, expected)
        free.set()


def test_a_callback_may_close_the_batcher(encoder: VisionEncoder, expected: np.ndarray) -> None:
    batcher = DynamicBatcher(encoder)
    futures = [batcher.submit(image) for image in IMAGES]
    closed = threading.Event()

    def closes(future: Future[Embeddings]) -> None:
        batcher.close()
        closed.set()

    futures[0].add_done_callback(closes)
    assert closed.wait(30)
    assert close([future.result(timeout=30) for future in futures], expected)
    with pytest.raises(ClosedError):
        batcher.encode(IMAGES[0])
    batcher.close()


def test_a_caller_that_prepares_while_it_is_closed_is_answered(
    encoder: VisionEncoder, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, closed = threading.Event(), threading.Event()
    prepare = type(encoder.processor).__call__

    def slow(self: Any, image: Any, out: Any = None) -> Any:
        begun.set()
        closed.wait(30)
        return prepare(self, image, out)

    monkeypatch.setattr(type(encoder.processor), "__call__", slow)
    batcher = DynamicBatcher(encoder)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(batcher.encode, IMAGES[0])
        assert begun.wait(30)
        batcher.close()
        closed.set()
        assert close([answer.result(timeout=30)], expected[:1])


@pytest.mark.parametrize("error", [KeyError, MemoryError, KeyboardInterrupt, SystemExit])
def test_every_kind_of_exception_reaches_its_caller(
    error: type[BaseException],
    encoder: VisionEncoder,
    expected: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare, run = type(encoder.processor).__call__, encoder.session.compute

    def fails(self: Any, image: Any, out: Any = None) -> Any:
        if image is IMAGES[1]:
            raise error("while preparing")
        return prepare(self, image, out)

    def breaks(pixel_values: np.ndarray, wanted: Any) -> Any:
        raise error("while computing")

    with DynamicBatcher(encoder) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(type(encoder.processor), "__call__", fails)
            with pytest.raises(error, match="while preparing"):
                batcher.encode(IMAGES[1])
            with pytest.raises(error, match="while preparing"):
                batcher.submit(IMAGES[1]).result(timeout=30)
            answered(batcher, expected)
            patch.setattr(encoder.session, "compute", breaks)
            with pytest.raises(InferenceError, match="while computing") as caught:
                batcher.encode(IMAGES[0])
            assert type(caught.value.__cause__) is error
        assert encoder.session.compute == run
        answered(batcher, expected)


def test_a_batchs_error_keeps_its_type(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(pixel_values: np.ndarray, wanted: Any) -> Any:
        raise BatchMemoryError("no memory left")

    monkeypatch.setattr(encoder.session, "compute", fails)
    with DynamicBatcher(encoder) as batcher, pytest.raises(BatchMemoryError, match="no memory"):
        batcher.encode(IMAGES[0])


def test_an_answer_that_somebody_else_gave(encoder: VisionEncoder, expected: np.ndarray) -> None:
    with DynamicBatcher(encoder) as batcher:
        future = batcher.submit(IMAGES[0])
        with suppress(InvalidStateError):
            future.set_result(None)  # type: ignore[arg-type]
        answered(batcher, expected)


def test_a_dropped_batcher_leaves_no_thread(encoder: VisionEncoder, expected: np.ndarray) -> None:
    before = set(threading.enumerate())
    batcher = DynamicBatcher(encoder)
    batcher.encode(IMAGES[0])
    # What was asked for is answered; kept futures keep nothing else.
    futures = [batcher.submit(image) for image in IMAGES]
    futures[0].add_done_callback(lambda _: None)
    del batcher
    gc.collect()
    assert close([future.result(timeout=30) for future in futures], expected)
    deadline = time.monotonic() + 30
    while not set(threading.enumerate()) <= before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_batch": 0}, "max_batch=0"),
        ({"max_batch": True}, "max_batch=True"),
        ({"max_wait": None}, "max_wait=None"),
        ({"max_wait": -1}, "max_wait=-1"),
        ({"max_wait": float("nan")}, "max_wait=nan"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], says: str, encoder: VisionEncoder
) -> None:
    with pytest.raises(OptionError, match=says):
        DynamicBatcher(encoder, **options)
