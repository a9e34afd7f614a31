"""DINOv3's ConvNeXt: another kind of tower, whose exporter is a module of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import towers
from conftest import tiny_checkpoint
from vistower import DINOv3Mixin, VisionEncoder
from vistower.backbones import find_backbone
from vistower.errors import BundleUnsupportedError, UnsupportedArchitectureError
from vistower.families.dinov3_convnext import FAMILY
from vistower_export.checkpoint import write_random_checkpoint
from vistower_export.pictures import SAMPLES

HF_CLASS = "DINOv3ConvNextModel"

# The published sizes are 29M, 50M, 89M and 198M.
PARAMETERS = {"tiny": 27_820_128, "small": 49_454_688, "base": 87_566_464, "large": 196_230_336}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("convnext") / "checkpoint", FAMILY, scaled=True)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Any:
    return towers.exported(checkpoint, checkpoint.with_name("bundle"))


def test_the_tower_is_transformers(bundle: Any, checkpoint: Path) -> None:
    towers.require_certified(bundle)
    towers.require_torchs_numbers(bundle, checkpoint, HF_CLASS)
    encoder = VisionEncoder.open(bundle.directory, device="cpu")
    assert encoder.outputs == ("cls", "patches", "pooled")
    assert (encoder.layout.patch_size, encoder.layout.grid) == (32, (7, 7))
    found = encoder.encode(SAMPLES[0])
    assert np.array_equal(found.cls, found.pooled)


def test_other_sizes(checkpoint: Path, tmp_path: Path) -> None:
    bundle = towers.exported(checkpoint, tmp_path / "bundle", resolutions=[(224, 224), (160, 256)])
    towers.require_torchs_numbers(
        bundle,
        checkpoint,
        HF_CLASS,
        resolution=(160, 256),
        pixels={"size": {"height": 160, "width": 256}},
    )
    with pytest.raises(UnsupportedArchitectureError, match="no multiple of the patch size 32"):
        towers.exported(checkpoint, tmp_path / "other", resolutions=[(240, 240)])


def test_with_a_processor_of_levels_it_takes_them(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", FAMILY, scaled=True)
    (checkpoint / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessorFast"}'
    )
    bundle = towers.exported(checkpoint, tmp_path / "bundle", uint8=True)
    towers.require_certified(bundle)
    picture = Image.new("RGB", (300, 200), (200, 30, 90))
    want = VisionEncoder.open(bundle.directory, device="cpu", graph="ort").encode(picture)
    have = VisionEncoder.open(bundle.directory, device="cpu", graph="ort_uint8").encode(picture)
    towers.require_close(have.patches, want.patches)


def test_the_mixin_of_the_transformers_refuses_it_by_name(bundle: Any) -> None:
    with pytest.raises(BundleUnsupportedError, match="of model type dinov3_convnext, not dinov3_v"):
        DINOv3Mixin(model_path=str(bundle.directory))


@pytest.mark.parametrize("name", PARAMETERS)
def test_records_have_the_released_number_of_parameters(name: str) -> None:
    assert towers.parameters(find_backbone(f"dinov3-convnext-{name}")) == PARAMETERS[name]


def test_a_random_checkpoint_has_the_released_names(tmp_path: Path) -> None:
    weights = load_file(
        write_random_checkpoint("dinov3-convnext-tiny", tmp_path / "tiny") / "model.safetensors"
    )
    assert "stages.0.downsample_layers.0.weight" in weights
    assert not [name for name in weights if name.startswith("model.")]
