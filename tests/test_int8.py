"""int8 graphs: exported on request, used on request, and as near to float32 as they say."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import vistower.execution.cpu
from vistower import VisionEncoder
from vistower.bundle import Bundle
from vistower.errors import BundleNotFoundError, PrecisionError
from vistower.execution.device import Device
from vistower.execution.providers import SessionOptions, session_config
from vistower.golden import replay
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle


@pytest.fixture(scope="module")
def bundles(
    clip_checkpoint: Path, dinov3_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    """Both tiny towers with an int8 graph."""
    return {
        path.name: export_bundle(
            resolve_checkpoint(str(path)),
            tmp_path_factory.mktemp("int8") / path.name,
            precisions=["int8"],
        )
        for path in (clip_checkpoint, dinov3_checkpoint)
    }


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-dinov3"])
def test_int8_is_near_float32_and_smaller(name: str, bundles: dict[str, Bundle]) -> None:
    bundle = bundles[name]
    assert bundle.manifest is not None
    record = bundle.manifest.graphs["int8"]
    assert record.precision == "int8"
    assert record.parity.cls.cosine >= 0.999
    assert record.parity.patches.cosine >= 0.999
    assert record.parity.patches.cosine_mean >= record.parity.patches.cosine
    assert "sample pictures" in str(record.calibration)
    # CLIP's pixels are uint8 levels: their product loses nothing in its input.
    first = tuple(product for product in record.float_products if product.startswith("patch"))
    assert first == (() if name == "tiny-clip" else ("patches",))
    exact = VisionEncoder.open(bundle.directory, device="cpu").encode(SAMPLES)
    lossy = VisionEncoder.open(bundle.directory, device="cpu", precision="int8").encode(SAMPLES)
    assert cosines(exact.cls, lossy.cls).min() >= 0.999
    assert cosines(exact.patches, lossy.patches).min() >= 0.999
    assert np.abs(exact.cls - lossy.cls).max() > 1e-4
    assert len(list(replay(bundle))) == 3 + 2 * 3 * 3


def test_int8_is_never_chosen_unasked(bundles: dict[str, Bundle]) -> None:
    directory = bundles["tiny-clip"].directory
    assert VisionEncoder.open(directory, device="cpu").graph.name == "ort"
    assert VisionEncoder.open(directory, device="cpu", precision="fp32").graph.name == "ort"
    assert VisionEncoder.open(directory, device="cpu", precision="int8").graph.name == "int8"


def test_a_precision_the_bundle_lacks_names_the_export(clip_bundle: Path) -> None:
    with pytest.raises(PrecisionError, match="--precision int8"):
        VisionEncoder.open(clip_bundle, device="cpu", precision="int8")
    with pytest.raises(BundleNotFoundError, match="it has portable, ort"):
        VisionEncoder.open(clip_bundle, device="cpu", graph="int8")


def test_an_int8_embedding_does_not_depend_on_its_batch(bundles: dict[str, Bundle]) -> None:
    encoder = VisionEncoder.open(
        bundles["tiny-dinov3"].directory, device="cpu", precision="int8", threads=1
    )
    white = Image.new("RGB", (64, 64), "white")
    together = encoder.encode([SAMPLES[0], SAMPLES[3], white])
    alone = encoder.encode(SAMPLES[0])
    assert np.abs(together.patches[0] - alone.patches[0]).max() <= 1e-5


def test_every_layer_is_quantized_and_shares_its_activations(bundles: dict[str, Bundle]) -> None:
    graph = onnx.load(bundles["tiny-dinov3"].directory / "onnx/model_int8.onnx").graph
    count = {
        op: sum(node.op_type == op for node in graph.node)
        for op in ("MatMulIntegerToFloat", "QuantizeLinear", "MatMul")
    }
    # Q, K, V, O, up, down in two layers; Q, K and V have one input; the patches stay float32.
    assert count == {"MatMulIntegerToFloat": 12, "QuantizeLinear": 8, "MatMul": 1}


def test_calibration_pictures_can_be_given(clip_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_bundle(
        resolve_checkpoint(str(clip_checkpoint)),
        tmp_path / "bundle",
        precisions=["int8"],
        calibration=SAMPLES[:2],
    )
    assert bundle.manifest is not None
    calibration = str(bundle.manifest.graphs["int8"].calibration)
    assert calibration.startswith("2 pictures given at export, quarters")


def test_products_that_lose_too_much_stay_in_float32(
    dinov3_checkpoint: Path, tmp_path: Path
) -> None:
    """A neuron far larger than the others, as trained towers have them, spoils its product."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(dinov3_checkpoint, checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    up = next(name for name in weights if name.endswith("layer.1.mlp.up_proj.bias"))
    down = next(name for name in weights if name.endswith("layer.1.mlp.down_proj.weight"))
    weights[up][0] = 2000.0
    weights[down][:, 0] = 1e-4
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    bundle = export_bundle(
        resolve_checkpoint(str(checkpoint)), tmp_path / "bundle", precisions=["int8"]
    )
    assert bundle.manifest is not None
    record = bundle.manifest.graphs["int8"]
    assert record.float_products == ("patches", "layers.1.down")
    assert record.parity.cosine >= 0.999


CPUS = {
    "AVX2 only": ("fpu avx avx2 fma", True),
    "AVX-512 VNNI": ("fpu avx2 avx512f avx512_vnni", False),
    "AVX-VNNI": ("fpu avx2 avx_vnni", False),
}


@pytest.mark.parametrize("cpu", CPUS)
def test_products_are_widened_where_they_would_saturate(
    cpu: str, bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, saturates = CPUS[cpu]
    directory = bundles["tiny-clip"].directory
    usual = VisionEncoder.open(directory, device="cpu", precision="int8").encode(SAMPLES[0])
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr("vistower.execution.cpu._CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    vistower.execution.cpu.cpu_flags.cache_clear()
    try:
        assert vistower.execution.cpu.int8_saturates() is saturates
        config = session_config(Device("cpu"), SessionOptions(), read_placement=False)
        assert (config.get("session.x64quantprecision") == "1") is saturates
        widened = VisionEncoder.open(directory, device="cpu", precision="int8").encode(SAMPLES[0])
    finally:
        monkeypatch.undo()
        vistower.execution.cpu.cpu_flags.cache_clear()
    # The very same integers, whichever kernel adds them up.
    assert np.abs(widened.patches - usual.patches).max() <= 1e-5


def test_what_saturation_would_do(bundles: dict[str, Bundle]) -> None:
    """AVX2's vpmaddubsw in NumPy, on a graph's own weights: why products are widened."""
    graph = onnx.load(bundles["tiny-clip"].directory / "onnx/model_int8.onnx").graph
    weight = next(
        onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.name == "layers.0.down.weight"
    ).astype(np.int32)
    activation = np.random.default_rng(0).integers(128, 256, (8, len(weight)))
    pairs = (activation[:, :, None] * weight).reshape(8, -1, 2, weight.shape[1]).sum(axis=2)
    exact = pairs.sum(axis=1)
    saturated = np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1)
    assert np.array_equal(exact, activation @ weight)
    assert np.abs(saturated - exact).max() > 1000
