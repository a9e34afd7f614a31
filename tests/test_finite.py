"""NaN and infinity of a reduced precision never reach a caller unnoticed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from vistower import SessionOptions, VisionEncoder
from vistower.bundle import sha256
from vistower.errors import NonFiniteError
from vistower.execution.finite import all_finite

BAD = 10.0
"""A pixel above this makes the overflowing graph give NaN for its picture."""


def make_overflowing(path: Path) -> None:
    """Add 0 * sqrt(BAD - largest pixel) to the tokens of each picture, the factor in float16."""
    model = onnx.load(path)
    graph = model.graph
    for node in graph.node:
        node.output[:] = [name.replace("last_hidden_state", "bad.tokens") for name in node.output]
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([1, 2, 3]), "bad.axes"),
            numpy_helper.from_array(np.array([0, 1, 1]), "bad.shape"),
            numpy_helper.from_array(np.array(BAD, np.float32), "bad.limit"),
            numpy_helper.from_array(np.array(0, np.float16), "bad.half"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("ReduceMax", ["pixel_values", "bad.axes"], ["bad.largest"]),
            helper.make_node("Reshape", ["bad.largest", "bad.shape"], ["bad.each"]),
            helper.make_node("Sub", ["bad.limit", "bad.each"], ["bad.left"]),
            helper.make_node("Sqrt", ["bad.left"], ["bad.root"]),
            helper.make_node("Cast", ["bad.half"], ["bad.zero"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["bad.root", "bad.zero"], ["bad.nan"]),
            helper.make_node("Add", ["bad.tokens", "bad.nan"], ["last_hidden_state"]),
        ]
    )
    onnx.save(model, path)


@pytest.fixture(scope="module")
def overflowing(clip_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose ort graph is called fp16 and overflows for bright pictures."""
    bundle = tmp_path_factory.mktemp("bundles") / "overflowing"
    shutil.copytree(clip_bundle, bundle)
    manifest = json.loads((bundle / "vistower.json").read_text())
    name = manifest["graphs"]["ort"]["file"]
    make_overflowing(bundle / name)
    manifest["graphs"]["ort"]["precision"] = "fp16"
    manifest["graphs"]["ort"]["nodes"] += 7
    size = (bundle / name).stat().st_size
    manifest["files"][name] = {"size": size, "sha256": sha256(bundle / name)}
    (bundle / "vistower.json").write_text(json.dumps(manifest))
    return bundle


def batch() -> np.ndarray[Any, np.dtype[np.float32]]:
    values = np.random.default_rng(0).random((3, 3, 224, 224), dtype=np.float32)
    values[1] += BAD
    return values


def open_with(bundle: Path, policy: Any) -> VisionEncoder:
    options = SessionOptions(non_finite=policy)
    return VisionEncoder.open(bundle, device="cpu", graph="ort", options=options)


def test_it_is_an_error_that_counts_the_pictures(overflowing: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"in fp16 on cpu .* for 1 of 3 pictures.*precision="):
        open_with(overflowing, "error").forward(batch())
    assert all_finite(open_with(overflowing, "error").forward(batch()[:1]))


def test_only_the_bad_pictures_are_computed_again_in_fp32(
    overflowing: Path, clip_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = pickle.loads(pickle.dumps(open_with(overflowing, "fp32")))
    have = encoder.forward(batch())
    want = VisionEncoder.open(clip_bundle, device="cpu").forward(batch())
    assert np.abs(have - want).max() <= 1e-4
    assert "for 1 of 3 pictures; they are computed again in fp32" in caplog.text


def test_it_can_be_ignored(overflowing: Path) -> None:
    have = open_with(overflowing, "ignore").forward(batch())
    assert np.isnan(have[1]).all()
    assert np.isfinite(have[[0, 2]]).all()


def test_damaged_weights_are_not_retried_for_ever(overflowing: Path) -> None:
    values = batch()
    values[2, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="and the fp32 graph too"):
        open_with(overflowing, "fp32").forward(values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_is_found(value: float) -> None:
    tokens = np.zeros((2, 50, 64), np.float32)
    assert all_finite(tokens)
    assert all_finite(np.full((2, 50, 64), 3e38, np.float32))
    tokens[1, 49, 63] = value
    assert not all_finite(tokens)
