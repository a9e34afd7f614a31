"""`VisionEncoder`: batches, inputs, threads, pickling, fork; the numbers are torch's."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vistower import Embeddings, VisionEncoder, VistowerError
from vistower.errors import EmptyInputError, ImageFormatError, InferenceError, OptionError
from vistower_export.pictures import SAMPLES

TOLERANCE = 1e-5
"""Batch size and thread count change the order of additions, no more."""


@pytest.fixture(scope="module")
def encoder(dinov3_bundle: Path) -> VisionEncoder:
    return VisionEncoder.open(dinov3_bundle, device="cpu")


@pytest.fixture(scope="module")
def expected(encoder: VisionEncoder) -> Embeddings:
    return encoder.encode(SAMPLES)


def assert_close(one: Embeddings, two: Embeddings) -> None:
    assert one.cls.shape == two.cls.shape
    assert np.abs(one.cls - two.cls).max() <= TOLERANCE
    assert np.abs(one.patches - two.patches).max() <= TOLERANCE


def test_tokens_are_those_of_the_hugging_face_class(
    encoder: VisionEncoder, expected: Embeddings, dinov3_checkpoint: Path
) -> None:
    model = transformers.DINOv3ViTModel.from_pretrained(dinov3_checkpoint).eval()
    with torch.inference_mode():
        pixel_values = torch.from_numpy(encoder.preprocess(SAMPLES))
        state = model(pixel_values=pixel_values).last_hidden_state.numpy()
    assert np.abs(expected.cls - state[:, 0]).max() <= 1e-4
    assert np.abs(expected.patches - state[:, 5:]).max() <= 1e-4
    assert len(expected) == len(SAMPLES)
    assert expected.patches.dtype == expected.cls.dtype == np.float32


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_the_batch_size_does_not_change_the_numbers(
    batch_size: int, encoder: VisionEncoder, expected: Embeddings
) -> None:
    assert_close(encoder.encode(SAMPLES, batch_size=batch_size), expected)


@pytest.mark.parametrize("graph", ["portable", "ort"])
def test_both_graphs(graph: str, dinov3_bundle: Path, expected: Embeddings) -> None:
    other = VisionEncoder.open(dinov3_bundle, device="cpu", graph=graph)
    assert_close(other.encode(SAMPLES), expected)


def test_a_picture_comes_as_path_image_or_array(
    encoder: VisionEncoder, expected: Embeddings
) -> None:
    images = [Image.open(path).convert("RGB") for path in SAMPLES]
    arrays = [np.asarray(image) for image in images]
    mixed: list[Any] = [str(SAMPLES[0]), SAMPLES[1], images[2], arrays[3], images[4]]
    for pictures in (images, arrays, mixed, iter(mixed), tuple(mixed)):
        assert_close(encoder.encode(pictures), expected)
    assert encoder.encode(SAMPLES[0]).cls.shape == (1, 64)
    assert encoder.encode(images[0]).patches.shape == (1, 196, 64)
    stacked = np.stack([np.asarray(image.resize((40, 30))) for image in images])
    assert encoder.encode(stacked).cls.shape == (5, 64)


@pytest.mark.parametrize(
    ("images", "batch_size", "error", "says"),
    [
        ([], 32, EmptyInputError, "empty"),
        (iter(()), 32, EmptyInputError, "empty"),
        (np.zeros((0, 5, 5, 3), np.uint8), 32, EmptyInputError, "empty"),
        ([SAMPLES[0]], 0, OptionError, "integer ≥ 1"),
        (np.zeros((5, 5, 3), complex), 32, ImageFormatError, "uint8"),
        (np.zeros((5, 5), np.uint8), 32, ImageFormatError, "H x W x 3"),
        (np.zeros((5, 5, 4), np.uint8), 32, ImageFormatError, "H x W x 3"),
        (42, 32, ImageFormatError, "no picture"),
    ],
    ids=["list", "iterator", "array", "batch-size", "complex", "grey", "four", "number"],
)
def test_what_cannot_be_embedded_is_refused(
    images: Any, batch_size: int, error: type[Exception], says: str, encoder: VisionEncoder
) -> None:
    with pytest.raises(error, match=says) as caught:
        encoder.encode(images, batch_size=batch_size)
    assert isinstance(caught.value, VistowerError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("pixel_values", "says"),
    [
        (np.zeros((1, 3, 224, 225), np.float32), "this tower takes"),
        (np.zeros((3, 224, 224), np.float32), "this tower takes"),
        (np.zeros((0, 3, 224, 224), np.float32), "B ≥ 1"),
        (np.zeros((1, 3, 224, 224), np.float64), "astype"),
    ],
    ids=["size", "no-batch", "empty", "dtype"],
)
def test_forward_takes_pixel_values_and_nothing_else(
    pixel_values: np.ndarray, says: str, encoder: VisionEncoder
) -> None:
    with pytest.raises(ImageFormatError, match=says):
        encoder.forward(pixel_values)


def test_a_strided_batch_is_taken(encoder: VisionEncoder) -> None:
    pixel_values = encoder.preprocess(SAMPLES)
    state = encoder.forward(pixel_values)
    assert np.abs(encoder.forward(pixel_values[::2]) - state[::2]).max() <= TOLERANCE


@pytest.mark.parametrize("resolution", [[224, 224], (np.int64(224), 224), np.array([224, 224])])
def test_a_resolution_is_any_pair_of_integers(resolution: Any, dinov3_bundle: Path) -> None:
    encoder = VisionEncoder.open(dinov3_bundle, device="cpu", resolution=resolution)
    assert encoder.layout.image_size == (224, 224)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"devices": []}, "at least one device"),
        ({"devices": "cpu"}, "at least one device"),
        ({"resolution": "224"}, "height, width"),
        ({"resolution": 224}, "height, width"),
        ({"resolution": (224,)}, "height, width"),
        ({"resolution": []}, "height, width"),
        ({"resolution": (224, 224, 3)}, "height, width"),
        ({"resolution": (224.0, 224)}, "integer"),
        ({"resolution": (0, 0)}, "integer"),
        ({"threads": 0}, "threads=0"),
        ({"threads": "2"}, "threads='2'"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], says: str, dinov3_bundle: Path) -> None:
    with pytest.raises(OptionError, match=says):
        VisionEncoder.open(dinov3_bundle, **options)


def test_many_threads_share_one_encoder(encoder: VisionEncoder, expected: Embeddings) -> None:
    order = [index % len(SAMPLES) for index in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: encoder.encode(SAMPLES[index]), order))
    for index, embeddings in zip(order, found, strict=True):
        assert np.abs(embeddings.cls[0] - expected.cls[index]).max() <= TOLERANCE
        assert np.abs(embeddings.patches[0] - expected.patches[index]).max() <= TOLERANCE


def test_it_is_pickled_as_its_bundle(encoder: VisionEncoder, expected: Embeddings) -> None:
    data = pickle.dumps(encoder)
    assert len(data) < 10_000
    assert_close(pickle.loads(data).encode(SAMPLES), expected)


def _embed_in_a_child(encoder: VisionEncoder, path: Path, answer: Any) -> None:
    try:
        answer.send(encoder.encode(path).cls)
    except Exception as error:
        answer.send(error)


def test_a_spawned_worker_opens_its_own(encoder: VisionEncoder, expected: Embeddings) -> None:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_embed_in_a_child, args=(encoder, SAMPLES[0], sender))
    worker.start()
    answer = receiver.recv()
    worker.join()
    assert np.abs(answer[0] - expected.cls[0]).max() <= TOLERANCE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this platform")
# CPython 3.12 warns of any fork with threads alive; what vistower does about it is the test.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_use_after_fork_is_refused_not_hung(encoder: VisionEncoder) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_embed_in_a_child, args=(encoder, SAMPLES[0], sender))
    worker.start()
    answer = receiver.recv()
    worker.join()
    assert isinstance(answer, InferenceError)
    assert "fork" in str(answer)
