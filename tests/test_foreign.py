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
    NoSuchOutputError,
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
    with pytest.raises(BundleCorruptError, match=r"is said to|its bundle says"):
        VisionEncoder.open(bundle, device="cpu")


@pytest.mark.parametrize(
    ("name", "values", "error"),
    [
        ("config.json", {"model_type": "swin"}, BundleUnsupportedError),
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
        assert Bundle.load(bundle).graph("portable").precision == precision
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


def test_the_graphs_of_public_repositories_are_found_and_named(
    clip_checkpoint: Path, clip_bundle: Path, tmp_path: Path
) -> None:
    """``model.onnx`` of both towers is passed over for ``vision_model.onnx``."""
    checkpoint = resolve_checkpoint(str(clip_checkpoint))
    exported = export_bundle(checkpoint, tmp_path / "ours", precisions=["int8"]).directory
    bundle = forged.foreign(forged.copied(exported, tmp_path / "bundle"))
    onnx_folder = bundle / "onnx"
    (onnx_folder / "model_int8.onnx").rename(onnx_folder / "vision_model_quantized.onnx")
    (onnx_folder / "model.onnx").rename(onnx_folder / "vision_model.onnx")
    (onnx_folder / "model_ort.onnx").rename(onnx_folder / "model.onnx")
    (onnx_folder / "model.onnx").write_bytes(b"both towers")
    loaded = Bundle.load(bundle)
    assert {graph.name: graph.precision for graph in loaded.graphs} == {
        "portable": "fp32",
        "vision_model_quantized": "int8",
    }
    want = VisionEncoder.open(exported, device="cpu", graph="int8").encode(SAMPLES[0])
    have = VisionEncoder.open(bundle, device="cpu", graph="vision_model_quantized")
    assert np.array_equal(have.encode(SAMPLES[0]).pooled, want.pooled)
    plain = VisionEncoder.open(bundle, device="cpu")
    assert plain.graph.path.name == "vision_model.onnx"
    assert plain.outputs == ("cls", "patches", "pooled")
    # Nothing is taken by precision that its exporter only named.
    with pytest.raises(PrecisionError, match="no int8 graph"):
        VisionEncoder.open(bundle, device="cpu", precision="int8")


def kept(*names: str) -> Any:
    def change(model: onnx.ModelProto) -> None:
        outputs = [value for value in model.graph.output if value.name in names]
        del model.graph.output[:]
        model.graph.output.extend(outputs)

    return change


def test_a_graph_without_tokens_gives_its_vectors(clip_bundle: Path, tmp_path: Path) -> None:
    bundle = forged.foreign(forged.copied(clip_bundle, tmp_path / "bundle"))
    want = VisionEncoder.open(bundle, device="cpu").encode(SAMPLES[0]).pooled
    forged.graph(bundle, kept("pooler_output"), "onnx/model.onnx")
    encoder = VisionEncoder.open(bundle, device="cpu")
    assert encoder.outputs == ("pooled",)
    found = encoder.encode(SAMPLES[0])
    assert np.array_equal(found.pooled, want)
    for read in (lambda: found.cls, lambda: encoder.encode(SAMPLES[0], outputs="patches")):
        with pytest.raises(NoSuchOutputError, match="its graph gives pooler_output only"):
            read()
    with pytest.raises(NoSuchOutputError, match="has no output 'last_hidden_state'"):
        encoder.forward(encoder.preprocess(SAMPLES[0]))
    forged.graph(bundle, kept(), "onnx/model.onnx")
    with pytest.raises(BundleCorruptError):
        VisionEncoder.open(bundle, device="cpu")


def test_dinov3_without_a_pooler_pools_its_first_token(bundle: Path) -> None:
    forged.graph(bundle, kept("last_hidden_state"), "onnx/model.onnx")
    found = VisionEncoder.open(bundle, device="cpu").encode(SAMPLES[0])
    assert np.array_equal(found.pooled, found.cls)


def test_a_fixed_batch_is_refused_at_open(bundle: Path) -> None:
    def fix(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4

    forged.graph(bundle, fix, "onnx/model.onnx")
    with pytest.raises(BundleUnsupportedError, match="batches of exactly 4 pictures"):
        VisionEncoder.open(bundle, device="cpu")


def test_float16_pixels_are_refused_at_open(bundle: Path) -> None:
    def half(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
        cast = onnx.helper.make_node("Cast", ["pixel_values"], ["pixels32"], to=1)
        for node in model.graph.node:
            node.input[:] = ["pixels32" if x == "pixel_values" else x for x in node.input]
        model.graph.node.insert(0, cast)

    forged.graph(bundle, half, "onnx/model.onnx")
    with pytest.raises((BundleCorruptError, PrecisionError), match=r"is float16 of|no fp32 graph"):
        VisionEncoder.open(bundle, device="cpu", graph="portable")
