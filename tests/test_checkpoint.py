"""Random-weight checkpoints: the real architectures, labelled, reproducible, not degenerate."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoImageProcessor, CLIPVisionModel, DINOv3ViTModel

from vistower.backbones import BACKBONES, find_backbone
from vistower.errors import OutputError, OutputExistsError, UnsupportedArchitectureError
from vistower.families.record import Backbone
from vistower_export import checkpoint
from vistower_export.checkpoint import is_random_weight, write_random_checkpoint

CLIP = "clip-vit-base-patch32"
DINOV3 = "dinov3-vits16"
HF_CLASS = {"clip_vision_model": CLIPVisionModel, "dinov3_vit": DINOv3ViTModel}

# Counted on the records; rounded, DINOv3's are the published sizes (21M, 29M, 86M, 300M, 840M,
# 6716M), and CLIP's those of the vision towers without the projection.
PARAMETERS = {
    "clip-vit-base-patch32": 87_456_000,
    "clip-vit-base-patch16": 85_799_424,
    "clip-vit-large-patch14": 303_179_776,
    "clip-vit-large-patch14-336": 303_507_456,
    "dinov3-vits16-pretrain-lvd1689m": 21_596_544,
    "dinov3-vits16plus-pretrain-lvd1689m": 28_692_864,
    "dinov3-vitb16-pretrain-lvd1689m": 85_660_416,
    "dinov3-vitl16-pretrain-lvd1689m": 303_129_600,
    "dinov3-vitl16-pretrain-sat493m": 303_129_600,
    "dinov3-vith16plus-pretrain-lvd1689m": 840_592_640,
    "dinov3-vit7b16-pretrain-lvd1689m": 6_716_035_072,
    "dinov3-vit7b16-pretrain-sat493m": 6_716_035_072,
}


@pytest.fixture(scope="module", params=[CLIP, DINOV3])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Backbone, Path]:
    directory = tmp_path_factory.mktemp("checkpoints") / request.param
    assert write_random_checkpoint(request.param, directory) == directory
    return find_backbone(request.param), directory


def picture() -> Image.Image:
    """Colour gradients under coarse random blobs: neighbouring pixels agree, places differ."""
    generator = np.random.default_rng(0)
    blobs = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    y, x = np.mgrid[0:480, 0:640]
    ramp = 255 * np.stack([x / 640, y / 480, (x + y) / 1120], axis=-1)
    blurred = np.asarray(blobs.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray((0.6 * blurred + 0.4 * ramp).clip(0, 255).astype(np.uint8))


def digest(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_record_has_the_released_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = checkpoint._build_model(BACKBONES[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_it_is_labelled_in_the_config_and_in_its_readme(written: tuple[Backbone, Path]) -> None:
    backbone, directory = written
    config = json.loads((directory / "config.json").read_text())
    assert is_random_weight(config)
    assert config["vistower_seed"] == 0
    assert config["model_type"] == backbone.family
    assert "Random weights" in (directory / "README.md").read_text().splitlines()[0]
    assert not is_random_weight({"model_type": backbone.family})


def test_every_weight_is_loaded_by_the_class_of_this_transformers(
    written: tuple[Backbone, Path],
) -> None:
    backbone, directory = written
    model, report = HF_CLASS[backbone.family].from_pretrained(directory, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = load_file(directory / "model.safetensors")
    sums = sorted(float(np.abs(array).sum(dtype=np.float64)) for array in stored.values())
    loaded = sorted(float(p.detach().abs().double().sum()) for p in model.parameters())
    np.testing.assert_allclose(loaded, sums, rtol=1e-12)
    assert model.config.vistower_random_weights is True
    assert model.config.hidden_size == backbone.config["hidden_size"]
    assert model.config.num_hidden_layers == backbone.config["num_hidden_layers"]


def test_the_processor_is_the_released_one(written: tuple[Backbone, Path]) -> None:
    backbone, directory = written
    processor = AutoImageProcessor.from_pretrained(directory, use_fast=True)
    assert type(processor).__name__.startswith(
        "CLIPImageProcessor" if backbone.family == "clip_vision_model" else "DINOv3ViTImage"
    )
    pixels = processor(images=picture(), return_tensors="pt")["pixel_values"]
    assert tuple(pixels.shape) == (1, 3, backbone.image_size, backbone.image_size)
    white = processor(images=Image.new("RGB", (300, 300), "white"), return_tensors="pt")
    expected = (1 - np.array(backbone.processor["image_mean"])) / np.array(
        backbone.processor["image_std"]
    )
    np.testing.assert_allclose(white["pixel_values"][0, :, 0, 0], expected, rtol=1e-5)


def test_embeddings_are_sane_and_tell_patches_apart(written: tuple[Backbone, Path]) -> None:
    backbone, directory = written
    processor = AutoImageProcessor.from_pretrained(directory, use_fast=True)
    model = HF_CLASS[backbone.family].from_pretrained(directory).eval()
    with torch.inference_mode():
        states = model(**processor(images=picture(), return_tensors="pt")).last_hidden_state[0]
    assert torch.isfinite(states).all()
    assert 0.3 < states.std() < 3
    assert states.abs().max() < 30
    patches = torch.nn.functional.normalize(
        states[1 + backbone.config.get("num_register_tokens", 0) :], dim=-1
    )
    assert len(patches) == backbone.num_patches
    cosines = (patches @ patches.T)[~torch.eye(len(patches), dtype=torch.bool)]
    assert cosines.mean() < 0.9
    assert cosines.min() < 0.5


def test_no_parameter_is_one_a_graph_edit_could_lose_unseen(
    written: tuple[Backbone, Path],
) -> None:
    backbone, directory = written
    weights = load_file(directory / "model.safetensors")
    neutral = {name for name, array in weights.items() if np.all(array == array.flat[0])}
    qkv = {name for name in weights if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))}
    assert neutral == (qkv if backbone.zero_qkv_bias else set())
    assert len(qkv) == backbone.config["num_hidden_layers"] * (2 if backbone.zero_qkv_bias else 3)
    for name in neutral:
        assert not weights[name].any()
    scales = [array for name, array in weights.items() if name.endswith("lambda1")]
    assert len(scales) == (
        2 * backbone.config["num_hidden_layers"] if backbone.family == "dinov3_vit" else 0
    )
    assert all(array.min() >= 0.05 and array.max() <= 1 for array in scales)


def test_the_seed_decides_the_weights_to_the_byte(tmp_path: Path) -> None:
    first = write_random_checkpoint(DINOV3, tmp_path / "first", seed=7)
    again = write_random_checkpoint(DINOV3, tmp_path / "again", seed=7)
    other = write_random_checkpoint(DINOV3, tmp_path / "other", seed=8)
    assert digest(first) == digest(again)
    assert digest(first) != digest(other)
    assert (first / "config.json").read_bytes() == (again / "config.json").read_bytes()


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    directory = tmp_path / "tower"
    directory.mkdir()
    (directory / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match=r"not empty .*mine\.txt"):
            write_random_checkpoint(DINOV3, directory, overwrite=overwrite)
    assert (directory / "mine.txt").read_text() == "mine"
    with pytest.raises(OutputExistsError, match="is a file"):
        write_random_checkpoint(DINOV3, directory / "mine.txt", overwrite=True)

    assert [path.name for path in tmp_path.iterdir()] == ["tower"]
    assert [path.name for path in directory.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_random_checkpoint(DINOV3, tmp_path / "tower")
    before = digest(directory)

    def fail(backbone: Backbone) -> dict[str, object]:
        raise OSError(f"no space left for {backbone.name}")

    monkeypatch.setattr(checkpoint, "_processor_config", fail)
    with pytest.raises(OutputError, match="no space left"):
        write_random_checkpoint(DINOV3, directory, seed=5, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]
    assert digest(directory) == before


def test_satellite_towers_have_their_own_picture_statistics() -> None:
    config = checkpoint._processor_config(BACKBONES["dinov3-vitl16-pretrain-sat493m"])
    assert config["image_mean"] == [0.430, 0.411, 0.296]
    assert config["image_std"] == [0.213, 0.156, 0.143]


def test_an_unknown_name_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError):
        write_random_checkpoint("resnet50", tmp_path / "tower")
    assert not list(tmp_path.iterdir())
