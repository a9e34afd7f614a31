"""fp16 and bf16 graphs: written for CUDA, certified on the CPU, refused where they cannot run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers

from fake_gpu import FakeGpu
from vistower import CLIPMixin, VisionEncoder
from vistower.bundle import Bundle
from vistower.errors import PrecisionError, UnsupportedArchitectureError
from vistower.execution.device import Device
from vistower.golden import replay
from vistower.precision import choose_precision
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

HALVES = {"fp16": (onnx.TensorProto.FLOAT16, torch.float16)}
HALVES["bf16"] = (onnx.TensorProto.BFLOAT16, torch.bfloat16)


@pytest.fixture(scope="module")
def clip_half(clip_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    checkpoint = resolve_checkpoint(str(clip_checkpoint))
    output = tmp_path_factory.mktemp("half") / "clip"
    return export_bundle(checkpoint, output, precisions=["fp16", "bf16"])


@pytest.fixture(scope="module")
def dinov3_half(dinov3_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    checkpoint = resolve_checkpoint(str(dinov3_checkpoint))
    output = tmp_path_factory.mktemp("half") / "dinov3"
    return export_bundle(checkpoint, output, precisions=["bf16"])


@pytest.mark.parametrize("fixture", ["clip_half", "dinov3_half"])
def test_weights_are_half_and_what_goes_in_and_out_is_float32(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(fixture)
    assert bundle.manifest is not None
    for precision in HALVES.keys() & bundle.manifest.graphs.keys():
        graph = onnx.load(bundle.directory / bundle.manifest.graphs[precision].file).graph
        for value in (*graph.input, *graph.output):
            assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        matrices = {name: t for name, t in types.items() if name.endswith(".weight")}
        assert set(matrices.values()) == {HALVES[precision][0]}
        # CUDA has no Pad in bfloat16.
        producers = {name: node.op_type for node in graph.node for name in node.output}
        pad = next(node for node in graph.node if node.op_type == "Pad")
        assert producers[pad.input[0]] == "Cast"
        assert types["tokens"] == onnx.TensorProto.FLOAT
        operators = [node.op_type for node in graph.node]
        assert operators.count("SkipLayerNormalization") >= 3
        attention = [node for node in graph.node if node.op_type == "MultiHeadAttention"]
        assert all(len(node.input) == 3 for node in attention)
        assert "emulated" not in {path.name for path in bundle.directory.iterdir()}


@pytest.mark.parametrize("precision", HALVES)
def test_the_certificate_is_what_torch_itself_loses_in_that_precision(
    precision: str, clip_half: Bundle, clip_checkpoint: Path
) -> None:
    assert clip_half.manifest is not None
    record = clip_half.manifest.graphs[precision]
    assert record.parity.method.startswith("emulated in float32 on the CPU")
    assert "--device cuda" in record.parity.method
    encoder = VisionEncoder.open(clip_half.directory, device="cpu")
    pixel_values = encoder.preprocess(SAMPLES)
    exact = encoder.forward(pixel_values)
    dtype = HALVES[precision][1]
    model = transformers.CLIPVisionModel.from_pretrained(clip_checkpoint, dtype=dtype).eval()
    with torch.no_grad():
        output = model(pixel_values=torch.from_numpy(pixel_values).to(dtype))
    half = output.last_hidden_state.float().numpy()
    loss = np.abs(half - exact).max() / np.linalg.norm(exact, axis=-1).min()
    assert 0.3 * loss <= record.parity.max_rel <= 3 * loss


def test_the_fp16_graph_itself_computes_the_same_on_the_cpu(clip_half: Bundle) -> None:
    # ONNX Runtime casts around what the CPU has no fp16 kernel for; slow, but the very graph.
    exact = VisionEncoder.open(clip_half.directory, device="cpu").encode(SAMPLES)
    half = VisionEncoder.open(clip_half.directory, device="cpu", graph="fp16").encode(SAMPLES)
    difference = np.abs(exact.patches - half.patches).max()
    assert 0 < difference <= 0.02


def test_half_precision_is_refused_on_the_cpu(clip_half: Bundle) -> None:
    for precision in HALVES:
        with pytest.raises(PrecisionError, match="cpu computes in fp32, int8"):
            VisionEncoder.open(clip_half.directory, device="cpu", precision=precision)


def test_a_gpu_takes_half_precision_by_itself_and_the_cpu_does_not(
    clip_half: Bundle, dinov3_half: Bundle, clip_bundle: Path
) -> None:
    def auto(bundle: Bundle, device: str) -> str:
        graphs = bundle.graphs_at()
        choice = choose_precision(
            "auto",
            Device(device),
            family=bundle.family,
            available=tuple(graphs),
            compute_capability=(9, 0),
        )
        return graphs[choice.graph].name

    assert auto(clip_half, "cuda") == "fp16"
    assert auto(dinov3_half, "cuda") == "bf16"
    assert auto(Bundle.load(clip_bundle), "cuda") == "ort"
    assert auto(dinov3_half, "cpu") == "ort"
    # TensorRT reads standard operators only, and those are float32.
    assert {g.name for g in clip_half.graphs_at(portable=True).values()} == {"portable"}


def test_opening_on_a_gpu_follows_the_rules_and_the_mixin_stays_in_float32(
    gpu: FakeGpu, clip_half: Bundle
) -> None:
    directory = str(clip_half.directory)
    assert VisionEncoder.open(directory, device="cuda").graph.name == "fp16"
    assert VisionEncoder.open(directory, device="cuda", precision="fp32").graph.name == "ort"
    assert CLIPMixin(model_path=directory, device="cuda").model.encoder.graph.name == "ort"
    encoder = VisionEncoder.open(directory, device="cuda", precision="tf32")
    assert encoder.graph.name == "ort"
    assert gpu.opened[-1]["CUDAExecutionProvider"]["use_tf32"] == "1"
    with pytest.raises(PrecisionError, match="cuda computes in fp32, tf32, fp16, bf16"):
        VisionEncoder.open(directory, device="cuda", precision="int8")


def test_verify_leaves_out_what_the_device_does_not_run(dinov3_half: Bundle) -> None:
    compared = [replayed.what for replayed in replay(dinov3_half, device="cpu")]
    assert len(compared) == 3 + 2 * 2 * 3
    assert not any("bf16" in what for what in compared)


def test_dinov3_in_fp16_is_refused_with_the_reason(dinov3_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = resolve_checkpoint(str(dinov3_checkpoint))
    with pytest.raises(UnsupportedArchitectureError, match="rule float16 out"):
        export_bundle(checkpoint, tmp_path / "bundle", precisions=["fp16"])
    assert list(tmp_path.iterdir()) == []
