"""DINOv2, with register tokens and without: positions resized as transformers does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import towers
from conftest import tiny_checkpoint
from vistower import DINOv3Mixin
from vistower.backbones import find_backbone
from vistower.errors import BundleUnsupportedError
from vistower.families import built_in
from vistower_export.checkpoint import write_random_checkpoint

HF_CLASS = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
FAMILIES = pytest.mark.parametrize("name", HF_CLASS)

# The published sizes are 21M, 86M, 300M and 1.1B.
PARAMETERS = {
    "dinov2-small": 22_056_576,
    "dinov2-base": 86_580_480,
    "dinov2-large": 304_368_640,
    "dinov2-giant": 1_136_480_768,
    "dinov2-with-registers-small": 22_058_112,
    "dinov2-with-registers-base": 86_583_552,
    "dinov2-with-registers-large": 304_372_736,
    "dinov2-with-registers-giant": 1_136_486_912,
}


@FAMILIES
@pytest.mark.parametrize("changes", [{}, {"use_swiglu_ffn": True}, {"image_size": 224}])
def test_the_tower_is_transformers_at_every_size(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Positions are for 280 pixels: 224 and 336 are resized, with antialias or not, 280 is not."""
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", built_in()[name], scaled=True, **changes)
    sizes = [(224, 224), (336, 336), (280, 280)] if not changes else []
    options: dict[str, Any] = {}
    if "use_swiglu_ffn" in changes and "registers" in name:
        # Of these random weights int8 is just not good enough; of those without registers it is.
        options["precisions"] = ["bf16"]
    bundle = towers.exported(checkpoint, tmp_path / "bundle", resolutions=sizes, **options)
    towers.require_certified(bundle)
    assert (bundle.layout.num_cls_tokens, bundle.layout.grid) == (1, (8, 8))
    assert bundle.layout.num_register_tokens == (3 if "registers" in name else 0)
    towers.require_torchs_numbers(bundle, checkpoint, HF_CLASS[name])
    for size, _ in sizes[1:]:
        towers.require_torchs_numbers(
            bundle,
            checkpoint,
            HF_CLASS[name],
            resolution=(size, size),
            pixels={
                "size": {"shortest_edge": size * 256 // 224},
                "crop_size": {"height": size, "width": size},
            },
        )


def test_the_mixins_refuse_it_by_name(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", built_in()["dinov2"], scaled=True)
    bundle = towers.exported(checkpoint, tmp_path / "bundle")
    with pytest.raises(BundleUnsupportedError, match="of model type dinov2, not dinov3_vit"):
        DINOv3Mixin(model_path=str(bundle.directory))


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_record_has_the_released_number_of_parameters(name: str) -> None:
    assert towers.parameters(find_backbone(name)) == PARAMETERS[name]


def test_a_random_checkpoint_has_the_released_names(tmp_path: Path) -> None:
    """Those of the files on the hub, whichever major of transformers wrote it."""
    weights = load_file(
        write_random_checkpoint("dinov2-small", tmp_path / "small") / "model.safetensors"
    )
    assert len(weights) == 12 * 18 + 7
    assert {
        "embeddings.cls_token",
        "embeddings.mask_token",
        "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.11.attention.attention.query.weight",
        "encoder.layer.11.attention.output.dense.bias",
        "encoder.layer.11.layer_scale1.lambda1",
        "encoder.layer.11.mlp.fc1.weight",
        "layernorm.bias",
    } <= weights.keys()
