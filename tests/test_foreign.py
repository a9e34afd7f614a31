"""Bundles without a manifest: checked against their ``config.json`` as far as it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import forged
from vistower import VisionEncoder
from vistower.bundle import Bundle
from vistower.errors import (
    BundleCorruptError,
    BundleError,
    BundleUnsupportedError,
    InferenceError,
    PrecisionError,
    ProcessorConfigError,
)
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle


@pytest.fixture
def bundle(dinov3_bundle: Path, tmp_path: Path) -> Path:
    """A copy without its manifest."""
    return forged.foreign(forged.copied(dinov3_bundle, tmp_path / "bundle"))


def open_sizes(model: onnx.ModelProto) -> None:
    """Leave every size but the last open, as the graphs of other exporters do."""
    for value in (model.graph.input[0], model.graph.output[0]):
        for index, size in enumerate(value.type.tensor_type.shape.dim[:-1]):
            size.dim_param = f"{value.name}{index}"


def test_it_opens_as_it_is(bundle: Path, dinov3_bundle: Path) -> None:
    want = VisionEncoder.open(dinov3_bundle, device="cpu", graph="portable").encode(SAMPLES[0])
    for _ in range(2):
        have = VisionEncoder.open(bundle, device="cpu").encode(SAMPLES[0])
        assert np.array_equal(have.patches, want.patches)
        forged.graph(bundle, open_sizes, "onnx/model.onnx")


@pytest.mark.parametrize("sizes", ["fixed", "open"])
@pytest.mark.parametrize(
    "values",
    [
        {"patch_size": 32},
        {"patch_size": 8},
        {"hidden_size": 128},
        {"num_register_tokens": 0},
        {"num_register_tokens": 5},
        {"patch_size": 32, "num_register_tokens": 151},
    ],
)
def test_a_config_of_another_tower_is_noticed(
    values: dict[str, int], sizes: str, bundle: Path
) -> None:
    """151 registers and 49 patches are as many tokens as 4 and 196."""
    forged.config(bundle, "config.json", **values)
    if sizes == "open":
        forged.graph(bundle, open_sizes, "onnx/model.onnx")
    with pytest.raises((BundleCorruptError, InferenceError), match=r"is said to|its bundle says"):
        VisionEncoder.open(bundle, device="cpu").encode(SAMPLES[0])


@pytest.mark.parametrize(
    ("name", "values", "error"),
    [
        ("config.json", {"model_type": "vit"}, BundleUnsupportedError),
        ("config.json", {"model_type": 7}, BundleCorruptError),
        ("config.json", {"patch_size": [16, 14]}, BundleUnsupportedError),
        ("config.json", {"patch_size": -16}, BundleCorruptError),
        ("config.json", {"patch_size": "16"}, BundleCorruptError),
        ("config.json", {"hidden_size": 64.0}, BundleCorruptError),
        ("config.json", {"num_register_tokens": None}, BundleCorruptError),
        ("config.json", {"vision_config": []}, BundleCorruptError),
        ("config.json", {"vision_config": {"hidden_size": {}}}, BundleCorruptError),
        ("preprocessor_config.json", {"size": {"height": 10**9, "width": 5}}, ProcessorConfigError),
        ("preprocessor_config.json", {"size": {"shortest_edge": 224}}, ProcessorConfigError),
        ("preprocessor_config.json", {"size": {"height": 225, "width": 224}}, BundleCorruptError),
    ],
)
def test_configurations_are_checked(
    name: str, values: dict[str, Any], error: type[Exception], bundle: Path
) -> None:
    forged.config(bundle, name, **values)
    with pytest.raises(error):
        VisionEncoder.open(bundle, device="cpu")


def test_clip_has_positions_for_one_size_only(clip_bundle: Path, tmp_path: Path) -> None:
    bundle = forged.foreign(forged.copied(clip_bundle, tmp_path / "bundle"))
    forged.config(bundle, "config.json", image_size=336)
    with pytest.raises(BundleCorruptError, match="image_size=336"):
        Bundle.load(bundle)


def test_a_reduced_graph_is_not_taken_for_fp32(clip_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = resolve_checkpoint(str(clip_checkpoint))
    exported = export_bundle(checkpoint, tmp_path / "ours", precisions=["int8", "fp16"]).directory
    for precision, file in (("int8", "model_int8.onnx"), ("fp16", "model_ort_fp16.onnx")):
        bundle = forged.foreign(forged.copied(exported, tmp_path / precision))
        (bundle / "onnx" / file).replace(bundle / "onnx/model.onnx")
        assert [graph.precision for graph in Bundle.load(bundle).graphs] == [precision]
        with pytest.raises(PrecisionError, match=rf"no fp32 graph .*it has {precision}"):
            VisionEncoder.open(bundle, device="cpu")
    bundle = tmp_path / "int8"
    have = VisionEncoder.open(bundle, device="cpu", graph="portable").encode(SAMPLES[0])
    want = VisionEncoder.open(exported, device="cpu", graph="int8").encode(SAMPLES[0])
    assert np.array_equal(have.patches, want.patches)


def test_a_manifest_that_is_in_the_way_is_not_passed_over(bundle: Path, tmp_path: Path) -> None:
    for make in (
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(tmp_path / "nowhere"),
        lambda path: path.write_text("{}"),
        lambda path: path.write_bytes(b""),
    ):
        make(bundle / "vistower.json")
        with pytest.raises(BundleError, match=r"vistower\.json"):
            VisionEncoder.open(bundle, device="cpu")
        path = bundle / "vistower.json"
        path.rmdir() if path.is_dir() else path.unlink()
    assert json.loads((bundle / "config.json").read_text())["patch_size"] == 16
