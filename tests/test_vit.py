"""The plain vision transformer, with its pooler and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import towers
from conftest import tiny_checkpoint
from vistower import DINOv3Mixin, VisionEncoder
from vistower.backbones import find_backbone
from vistower.errors import BundleUnsupportedError, NoSuchOutputError, UnsupportedArchitectureError
from vistower.families.vit import FAMILY
from vistower_export.pictures import SAMPLES

TINY: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "patch_size": 32,
    "processor": ("ViTImageProcessor", {}),
    "scaled": True,
}


@pytest.mark.parametrize("pooled", [True, False])
def test_the_tower_is_transformers(pooled: bool, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(
        tmp_path / "checkpoint", FAMILY, loading={"add_pooling_layer": pooled}, **TINY
    )
    bundle = towers.exported(checkpoint, tmp_path / "bundle")
    towers.require_certified(bundle)
    towers.require_torchs_numbers(bundle, checkpoint, "ViTModel", add_pooling_layer=pooled)
    encoder = VisionEncoder.open(bundle.directory, device="cpu")
    assert encoder.outputs == ("cls", "patches", *(("pooled",) if pooled else ()))
    if not pooled:
        with pytest.raises(NoSuchOutputError, match="its graph or its checkpoint lacks it"):
            _ = encoder.encode(SAMPLES[0]).pooled
    with pytest.raises(BundleUnsupportedError, match="of model type vit, not dinov3_vit"):
        DINOv3Mixin(model_path=str(bundle.directory))


def test_another_size_has_interpolated_positions(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", FAMILY, **TINY)
    bundle = towers.exported(checkpoint, tmp_path / "bundle", resolutions=[(160, 224)])
    towers.require_torchs_numbers(
        bundle,
        checkpoint,
        "ViTModel",
        pixels={"size": {"height": 160, "width": 224}},
        forward={"interpolate_pos_encoding": True},
    )


def test_another_activation_of_the_pooler_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", FAMILY, pooler_act="relu", **TINY)
    with pytest.raises(UnsupportedArchitectureError, match="pooler_act='relu'"):
        towers.exported(checkpoint, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Without a pooler: DINO's published sizes are 21M and 85M.
        ("dino-vits16", 21_665_664),
        ("dino-vitb16", 85_798_656),
        ("vit-large-patch16-224-in21k", 303_301_632),
    ],
)
def test_records_have_the_released_number_of_parameters(name: str, count: int) -> None:
    assert towers.parameters(find_backbone(name)) == count
