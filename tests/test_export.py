"""The exporter through its public surface: a checkpoint in, a certified bundle out, or nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

import vistower_export.steps as steps
import vistower_export.vit as vit
from conftest import tiny_checkpoint
from vistower import VisionEncoder
from vistower.bundle import Bundle
from vistower.errors import (
    CheckpointError,
    OutputExistsError,
    ParityError,
    ProcessorConfigError,
    UnsupportedArchitectureError,
)
from vistower.families.clip import FAMILY as CLIP
from vistower.families.dinov3 import FAMILY as DINOV3
from vistower.golden import replay
from vistower_export.checkpoint import write_random_checkpoint
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

STANDARD_DOMAINS = {"", "ai.onnx"}


def export(checkpoint: Path, output: Path, **options: object) -> Bundle:
    return export_bundle(resolve_checkpoint(str(checkpoint)), output, **options)  # type: ignore[arg-type]


def operators(path: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        key = f"{node.domain or 'ai.onnx'}::{node.op_type}"
        counts[key] = counts.get(key, 0) + 1
    return counts


@pytest.mark.parametrize("fixture", ["clip_bundle", "dinov3_bundle"])
def test_a_bundle_has_every_file_its_manifest_names(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(fixture)
    manifest = json.loads((directory / "vistower.json").read_text())
    present = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    assert present == set(manifest["files"]) | {"vistower.json"}
    assert {
        "config.json",
        "preprocessor_config.json",
        "onnx/model.onnx",
        "onnx/model_ort.onnx",
        "onnx/model.onnx_data",
    } <= (present)
    assert manifest["source"]["random_weight"] is True
    assert manifest["made_with"]["torch"] == torch.__version__.split("+")[0]
    assert manifest["export_peak_bytes"] > manifest["weight_bytes"] > 0
    for graph in manifest["graphs"].values():
        assert graph["parity"]["max_rel"] <= 1e-4
        assert graph["parity"]["cosine"] >= 0.99999
        assert len(graph["parity"]["images"]) == 8
        model = onnx.load(directory / graph["file"])
        assert graph["nodes"] == len(model.graph.node)


@pytest.mark.parametrize("fixture", ["clip_bundle", "dinov3_bundle"])
def test_the_portable_graph_is_standard_onnx(fixture: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(fixture) / "onnx/model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert {opset.domain for opset in model.opset_import} <= STANDARD_DOMAINS
    assert [output.name for output in model.graph.output] == ["last_hidden_state", "pooler_output"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (CLIP, {"patch_size": 16}),
        (CLIP, {"patch_size": 14}),
        (CLIP, {"hidden_act": "gelu"}),
        (DINOV3, {"num_register_tokens": 0}),
        (DINOV3, {"num_register_tokens": 7, "key_bias": True}),
        (DINOV3, {"use_gated_mlp": True, "hidden_act": "silu"}),
        (DINOV3, {"query_bias": False, "value_bias": False, "mlp_bias": False, "proj_bias": False}),
        (DINOV3, {"use_gated_mlp": True, "hidden_act": "gelu", "patch_size": 14}),
    ],
)
def test_every_variant_of_the_architectures_passes_the_gate(
    family: object, changes: dict[str, object], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", family, **changes)  # type: ignore[arg-type]
    bundle = export(checkpoint, tmp_path / "bundle")
    assert bundle.manifest is not None
    assert bundle.layout.num_register_tokens == changes.get(
        "num_register_tokens", 4 if family is DINOV3 else 0
    )
    assert all(graph.parity.cosine >= 0.99999 for graph in bundle.manifest.graphs.values())


def test_336_pixels(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", CLIP, image_size=336, patch_size=14)
    config = json.loads((checkpoint / "preprocessor_config.json").read_text())
    config |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(config))
    encoder = VisionEncoder.open(export(checkpoint, tmp_path / "bundle").directory, device="cpu")
    assert encoder.encode(SAMPLES[0]).patches.shape == (1, 576, 64)


def test_a_whole_clip_checkpoint_gives_its_vision_tower(tmp_path: Path) -> None:
    vision = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    text = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 99}
    config = transformers.CLIPConfig(
        vision_config={**vision, "intermediate_size": 128},
        text_config={**text, "intermediate_size": 64, "eos_token_id": 2, "bos_token_id": 1},
    )
    torch.manual_seed(3)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    transformers.CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    encoder = VisionEncoder.open(export(tmp_path / "clip", tmp_path / "bundle").directory)
    pixel_values = encoder.preprocess(SAMPLES[1])
    with torch.no_grad():
        expected = model.vision_model(pixel_values=torch.from_numpy(pixel_values))
    difference = encoder.forward(pixel_values) - expected.last_hidden_state.numpy()
    assert np.abs(difference).max() <= 1e-4


def test_the_float_graphs_share_one_weight_file(clip_bundle: Path, tmp_path: Path) -> None:
    weights = clip_bundle / "onnx/model.onnx_data"
    for name in ("model.onnx", "model_ort.onnx"):
        graph = onnx.load(clip_bundle / "onnx" / name, load_external_data=False)
        locations = {
            entry.value
            for tensor in graph.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert locations == {weights.name}
    matrices = 2 * (4 * 64 * 64 + 2 * 64 * 128) + 3 * 32 * 32 * 64
    bundle = Bundle.load(clip_bundle)
    assert bundle.manifest is not None
    assert bundle.manifest.weight_bytes == 4 * matrices
    # Once, with at most one page of 64 KiB lost per matrix.
    assert 4 * matrices <= weights.stat().st_size <= 4 * matrices + 13 * 65536
    shutil.copytree(clip_bundle, tmp_path / "moved")
    embeddings = VisionEncoder.open(tmp_path / "moved", device="cpu").encode(SAMPLES[0])
    assert np.isfinite(embeddings.patches).all()
    assert len(list(replay(Bundle.load(tmp_path / "moved")))) == 15


def test_the_pil_backend_is_recorded_and_differs(clip_checkpoint: Path, tmp_path: Path) -> None:
    pil = VisionEncoder.open(export(clip_checkpoint, tmp_path / "pil", backend="pil").directory)
    torchvision = VisionEncoder.open(export(clip_checkpoint, tmp_path / "tv").directory)
    assert pil.bundle.manifest is not None
    assert pil.bundle.manifest.preprocessing.backend == "pil"
    difference = np.abs(pil.preprocess(SAMPLES[0]) - torchvision.preprocess(SAMPLES[0])).max()
    assert 1e-3 < difference < 0.1


def test_no_bundle_when_a_graph_is_wrong(
    clip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = vit.arrange

    def slightly_wrong(state, *arguments):  # type: ignore[no-untyped-def]
        state = dict(state)
        name = next(key for key in state if key.endswith("fc1.bias"))
        state[name] = state[name] + 0.05
        return honest(state, *arguments)

    monkeypatch.setattr(vit, "arrange", slightly_wrong)
    with pytest.raises(ParityError, match=r"largest difference \d.* smallest cosine 0\.\d+"):
        export(clip_checkpoint, tmp_path / "out" / "bundle")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_bundle_when_the_pixels_are_wrong(
    clip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = steps.load

    def other_mean(*arguments):  # type: ignore[no-untyped-def]
        loaded = honest(*arguments)
        view = loaded.views[0]
        scaling = steps.replace(view.preprocessor.scaling, mean=(0.5, 0.5, 0.5))
        preprocessor = steps.replace(view.preprocessor, scaling=scaling)
        return steps.replace(loaded, views=(steps.replace(view, preprocessor=preprocessor),))

    monkeypatch.setattr(steps, "load", other_mean)
    with pytest.raises(ParityError, match="preprocessing differs"):
        export(clip_checkpoint, tmp_path / "out" / "bundle")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_crash_leaves_nothing_half_made(
    clip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "write_golden", crash)
    with pytest.raises(KeyboardInterrupt):
        export(clip_checkpoint, tmp_path / "out" / "bundle")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_output_is_kept_unless_overwritten(
    clip_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "precious.txt").write_text("keep me")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match=r"--overwrite"):
            export(clip_checkpoint, output, overwrite=overwrite)
        assert (output / "precious.txt").read_text() == "keep me"
    (output / "precious.txt").unlink()
    export(clip_checkpoint, output)
    with pytest.raises(OutputExistsError, match=r"--overwrite"):
        export(clip_checkpoint, output)
    export(clip_checkpoint, output, overwrite=True)
    assert (output / "vistower.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_checkpoint_with_a_missing_weight_is_refused(
    clip_checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = tmp_path / "damaged"
    checkpoint.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (checkpoint / name).write_bytes((clip_checkpoint / name).read_bytes())
    weights = load_file(clip_checkpoint / "model.safetensors")
    lost = next(key for key in weights if key.endswith("layers.1.mlp.fc1.weight"))
    del weights[lost]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 weights"):
        export(checkpoint, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("file", "change", "error"),
    [
        ("config.json", {"model_type": "swin"}, UnsupportedArchitectureError),
        ("config.json", {"hidden_act": "relu"}, UnsupportedArchitectureError),
        ("preprocessor_config.json", {"do_pad": True}, ProcessorConfigError),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 256, "width": 256}},
            UnsupportedArchitectureError,
        ),
    ],
)
def test_what_is_not_reproduced_is_refused_by_name(
    file: str,
    change: dict[str, object],
    error: type[Exception],
    clip_checkpoint: Path,
    tmp_path: Path,
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in clip_checkpoint.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    config = json.loads((checkpoint / file).read_text()) | change
    (checkpoint / file).write_text(json.dumps(config))
    with pytest.raises(error, match=next(iter(change)).replace("size", r"\w*size")):
        export(checkpoint, tmp_path / "bundle")


FUSED = {
    "MultiHeadAttention", "LayerNormalization", "MatMul", "Add", "Pad", "Reshape", "Transpose",
    # Of the pooled token.
    "Gather",
}  # fmt: skip
HALF = FUSED | {"SkipLayerNormalization", "Cast"}
INT8 = FUSED - {"MatMul"} | {"MatMulIntegerToFloat", "QuantizeLinear"}

BUDGETS: dict[str, dict[str, tuple[int, set[str]]]] = {
    "clip-vit-base-patch32": {
        "ort": (201, FUSED | {"QuickGelu"}),
        "ort_uint8": (203, FUSED | {"QuickGelu", "Cast", "Mul"}),
        "fp16": (160, HALF | {"QuickGelu"}),
        "fp16_uint8": (161, HALF | {"QuickGelu", "Mul"}),
        "int8": (205, INT8 | {"QuickGelu", "Mul"}),
        "int8_uint8": (201, INT8 | {"QuickGelu"}),
    },
    "dinov3-vits16": {
        "ort": (200, FUSED | {"RotaryEmbedding", "BiasGelu"}),
        "bf16": (160, HALF | {"RotaryEmbedding", "BiasGelu"}),
        "int8": (225, INT8 | {"MatMul", "RotaryEmbedding", "Gelu"}),
    },
}
"""Real architecture → graph → most nodes, and exactly the operators."""


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGETS)
def test_the_real_architectures_export_within_their_node_budgets(name: str, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(name, tmp_path / name, seed=0)
    # A process of its own, so that the peak is this export's.
    command = [sys.executable, "-m", "vistower.cli", "export", checkpoint]
    subprocess.run([*command, "--output", tmp_path / "plain"], check=True)
    plain = Bundle.load(tmp_path / "plain")
    assert plain.manifest is not None
    # torch, transformers and ONNX Runtime themselves take some 800 MB, and room to run in.
    assert plain.manifest.export_peak_bytes < 4 * plain.manifest.weight_bytes + 1.2e9

    half = "fp16" if name.startswith("clip") else "bf16"
    precisions = ["--precision", "int8", "--precision", half]
    uint8 = ["--uint8"] if name.startswith("clip") else []
    command += ["--output", tmp_path / "bundle", *precisions, *uint8]
    subprocess.run(command, check=True)
    manifest = Bundle.load(tmp_path / "bundle").manifest
    assert manifest is not None
    assert manifest.graphs.keys() == {"portable", *BUDGETS[name]}
    for graph, (nodes, kinds) in BUDGETS[name].items():
        record = manifest.graphs[graph]
        counts = operators(tmp_path / "bundle" / record.file)
        assert sum(counts.values()) == record.nodes <= nodes, graph
        assert {operator.partition("::")[2] for operator in counts} == kinds, graph
        assert counts["com.microsoft::MultiHeadAttention"] == 12
        if name.startswith("dinov3"):
            assert counts["com.microsoft::RotaryEmbedding"] == 2 * 12
        if record.precision == "fp32":
            assert record.parity.max_rel <= 2e-5
    portable = onnxruntime.InferenceSession(tmp_path / "bundle/onnx/model.onnx")
    assert portable.get_inputs()[0].shape == ["batch", 3, 224, 224]
