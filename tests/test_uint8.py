"""Graphs that take uint8 levels: the same numbers as from the processor's float pixels."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest

from vistower import VisionEncoder
from vistower.bundle import Bundle
from vistower.errors import ImageFormatError, ProcessorConfigError
from vistower.golden import replay
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle


@pytest.fixture(scope="module")
def bundle(clip_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    checkpoint = resolve_checkpoint(str(clip_checkpoint))
    output = tmp_path_factory.mktemp("uint8") / "clip"
    return export_bundle(checkpoint, output, uint8=True, precisions=["int8", "fp16"])


def test_every_graph_has_a_twin_that_takes_levels(bundle: Bundle) -> None:
    assert bundle.manifest is not None
    graphs = bundle.manifest.graphs
    assert [name for name in graphs if name.endswith("_uint8")] == [
        "ort_uint8",
        "int8_uint8",
        "fp16_uint8",
    ]
    for name, record in graphs.items():
        assert record.pixels == ("uint8" if name.endswith("_uint8") else "float32")
        (taken,) = onnx.load(bundle.directory / record.file, load_external_data=False).graph.input
        expected = onnx.TensorProto.UINT8 if record.pixels == "uint8" else onnx.TensorProto.FLOAT
        assert taken.type.tensor_type.elem_type == expected
    assert graphs["ort_uint8"].parity.max_rel <= 2e-5
    assert len(list(replay(bundle))) == 3 + 2 * 3 * 5


def test_levels_give_the_same_tokens_as_float_pixels(bundle: Bundle) -> None:
    exact = VisionEncoder.open(bundle.directory, device="cpu")
    levels = VisionEncoder.open(bundle.directory, device="cpu", graph="ort_uint8")
    batch = levels.preprocess(SAMPLES)
    assert batch.dtype == np.uint8
    assert batch.shape == (5, 3, 224, 224)
    want, have = exact.forward(exact.preprocess(SAMPLES)), levels.forward(batch)
    norm = np.linalg.norm(want, axis=-1).min()
    assert np.abs(have - want).max() / norm <= 2e-5
    again = pickle.loads(pickle.dumps(levels))
    assert np.array_equal(again.encode(SAMPLES[0]).cls, levels.encode(SAMPLES[0]).cls)


def test_int8_rounds_no_pixels(bundle: Bundle) -> None:
    """From float pixel values the int8 graph finds the very levels, so both graphs agree."""
    floats = VisionEncoder.open(bundle.directory, device="cpu", precision="int8")
    levels = VisionEncoder.open(bundle.directory, device="cpu", graph="int8_uint8")
    assert floats.graph.name == "int8"
    difference = floats.encode(SAMPLES).patches - levels.encode(SAMPLES).patches
    assert np.abs(difference).max() <= 1e-4


def test_nothing_chooses_levels_by_itself_and_floats_are_refused(bundle: Bundle) -> None:
    assert VisionEncoder.open(bundle.directory, device="cpu").graph.name == "ort"
    levels = VisionEncoder.open(bundle.directory, device="cpu", graph="ort_uint8")
    with pytest.raises(ImageFormatError, match="takes uint8"):
        levels.forward(np.zeros((1, 3, 224, 224), np.float32))


def test_dinov3_has_no_levels(dinov3_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = resolve_checkpoint(str(dinov3_checkpoint))
    with pytest.raises(ProcessorConfigError, match="rescales before it resizes"):
        export_bundle(checkpoint, tmp_path / "bundle", uint8=True)
    assert list(tmp_path.iterdir()) == []
