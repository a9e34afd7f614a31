"""Several input sizes in one bundle, each as torch computes it."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.image_utils import load_image

from vistower import DINOv3Mixin, VisionEncoder
from vistower.bundle import Bundle
from vistower.errors import (
    BundleNotFoundError,
    ProcessorConfigError,
    UnsupportedArchitectureError,
)
from vistower.golden import replay
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

SIZES = ((224, 224), (96, 160), (256, 256))


@pytest.fixture(scope="module")
def bundle(dinov3_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    checkpoint = resolve_checkpoint(str(dinov3_checkpoint))
    output = tmp_path_factory.mktemp("resolutions") / "dinov3"
    return export_bundle(checkpoint, output, resolutions=SIZES, precisions=["int8", "bf16"])


@pytest.mark.parametrize("size", SIZES)
def test_each_resolution_gives_torchs_numbers(
    size: tuple[int, int], bundle: Bundle, dinov3_checkpoint: Path
) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(dinov3_checkpoint)
    model = transformers.DINOv3ViTModel.from_pretrained(dinov3_checkpoint).eval()
    height, width = size
    inputs = processor(
        images=load_image(str(SAMPLES[0])),
        size={"height": height, "width": width},
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state.numpy()
    encoder = VisionEncoder.open(bundle.directory, device="cpu", resolution=size)
    assert encoder.layout.grid == (height // 16, width // 16)
    found = encoder.encode(SAMPLES[0])
    assert found.patches.shape == (1, height * width // 256, 64)
    norm = np.linalg.norm(expected, axis=-1).min()
    assert np.abs(found.patches - expected[:, 5:]).max() / norm <= 2e-5
    assert np.abs(found.cls - expected[:, 0]).max() / norm <= 2e-5
    again = pickle.loads(pickle.dumps(encoder))
    assert again.layout == encoder.layout
    assert np.array_equal(again.encode(SAMPLES[0]).patches, found.patches)


def test_every_graph_has_its_certificate_and_the_weights_are_stored_once(bundle: Bundle) -> None:
    assert bundle.manifest is not None
    names = [name + at for name in ("portable", "ort", "int8", "bf16") for at in ("", "@96x160")]
    assert {*names} <= bundle.manifest.graphs.keys()
    assert len(bundle.manifest.graphs) == 12
    assert bundle.resolutions == SIZES
    assert all(graph.parity.cosine >= 0.999 for graph in bundle.manifest.graphs.values())
    stored = {path.name for path in (bundle.directory / "onnx").glob("*_data")}
    assert stored == {
        "model.onnx_data",
        "model_int8.onnx_data",
        "model_ort_bf16.onnx_data",
    }
    # Pixels of five golden arrays; three pictures at the first size and one at each other, for
    # the three precisions a CPU runs.
    assert len(list(replay(bundle))) == 5 + 2 * 3 * 5


def test_precision_and_resolution_combine(bundle: Bundle) -> None:
    encoder = VisionEncoder.open(
        bundle.directory, device="cpu", precision="int8", resolution=(96, 160)
    )
    assert encoder.graph.name == "int8@96x160"
    assert encoder.encode(SAMPLES[1]).patches.shape == (1, 60, 64)


def test_the_default_is_the_first_and_the_mixin_follows_it(
    dinov3_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = resolve_checkpoint(str(dinov3_checkpoint))
    bundle = export_bundle(checkpoint, tmp_path / "bundle", resolutions=[(256, 256), (224, 224)])
    mixin = DINOv3Mixin(model_path=str(bundle.directory), device="cpu")
    assert (mixin.input_image_size, mixin.patch_size) == (256, 16)
    assert mixin.get_features(load_image(str(SAMPLES[0]))).shape == (256, 64)
    # What reads the bundle without vistower sees the size of its portable graph.
    processor = transformers.AutoImageProcessor.from_pretrained(bundle.directory)
    pixel_values = processor(
        images=load_image(str(SAMPLES[0])), return_tensors="pt"
    ).pixel_values.numpy()
    encoder = VisionEncoder.open(bundle.directory, device="cpu", graph="portable")
    assert encoder.forward(np.asarray(pixel_values)).shape == (1, 261, 64)


def test_a_resolution_the_bundle_lacks_names_those_it_has(
    bundle: Bundle, clip_bundle: Path
) -> None:
    with pytest.raises(BundleNotFoundError, match="it has 224x224, 96x160, 256x256"):
        VisionEncoder.open(bundle.directory, device="cpu", resolution=(512, 768))
    with pytest.raises(BundleNotFoundError, match="it has 224x224"):
        VisionEncoder.open(clip_bundle, device="cpu", resolution=(336, 336))


@pytest.mark.parametrize("size", [(230, 224), (0, 224)])
def test_a_size_the_patches_do_not_tile_is_refused(
    size: tuple[int, int], dinov3_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="multiple of the patch size 16"):
        export_bundle(
            resolve_checkpoint(str(dinov3_checkpoint)), tmp_path / "bundle", resolutions=[size]
        )


def test_clip_at_another_size_is_torch_with_interpolated_positions(
    clip_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = resolve_checkpoint(str(clip_checkpoint))
    bundle = export_bundle(checkpoint, tmp_path / "bundle", resolutions=[(320, 320), (224, 224)])
    processor = transformers.AutoImageProcessor.from_pretrained(clip_checkpoint, use_fast=True)
    model = transformers.CLIPVisionModel.from_pretrained(clip_checkpoint).eval()
    for size in (320, 224):
        inputs = processor(
            images=load_image(str(SAMPLES[0])),
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            return_tensors="pt",
        )
        with torch.no_grad():
            expected = model(**inputs, interpolate_pos_encoding=True)
        found = VisionEncoder.open(bundle.directory, device="cpu", resolution=(size, size)).encode(
            SAMPLES[0]
        )
        tokens = np.concatenate([found.cls[:, None], found.patches], axis=1)
        for have, want in (
            (tokens, expected.last_hidden_state.numpy()),
            (found.pooled, expected.pooler_output.numpy()),
        ):
            norm = np.linalg.norm(want, axis=-1).min()
            assert np.abs(have - want).max() / norm <= 2e-5


def test_a_crop_is_a_square_at_every_size(clip_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ProcessorConfigError, match="cuts the middle 224x224"):
        export_bundle(
            resolve_checkpoint(str(clip_checkpoint)), tmp_path / "bundle", resolutions=[(256, 224)]
        )
