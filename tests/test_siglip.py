"""SigLIP: no CLS token, an attention pooling head, patches that need not tile the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from transformers.image_utils import load_image

import towers
from command_line import run
from conftest import tiny_checkpoint
from vistower import CLIPMixin, DINOv3Mixin, VisionEncoder
from vistower.backbones import find_backbone
from vistower.errors import BundleUnsupportedError, NoSuchOutputError, UnsupportedArchitectureError
from vistower.families.siglip import FAMILY
from vistower_export.checkpoint import write_random_checkpoint
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

HF_CLASS = "SiglipVisionModel"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("siglip") / "checkpoint", FAMILY, scaled=True)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Any:
    sizes = [(224, 224), (96, 160)]
    return towers.exported(checkpoint, checkpoint.with_name("bundle"), resolutions=sizes)


def test_the_tower_is_transformers(bundle: Any, checkpoint: Path) -> None:
    towers.require_certified(bundle)
    towers.require_torchs_numbers(bundle, checkpoint, HF_CLASS)
    towers.require_torchs_numbers(
        bundle,
        checkpoint,
        HF_CLASS,
        resolution=(96, 160),
        pixels={"size": {"height": 96, "width": 160}},
        forward={"interpolate_pos_encoding": True},
    )


def test_there_is_no_cls_token(
    bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = VisionEncoder.open(bundle.directory, device="cpu")
    assert encoder.outputs == ("patches", "pooled")
    assert encoder.layout.num_tokens == 49
    with pytest.raises(NoSuchOutputError, match="a siglip_vision_model has none"):
        _ = encoder.encode(SAMPLES[0]).cls
    for mixin in (CLIPMixin, DINOv3Mixin):
        with pytest.raises(
            BundleUnsupportedError, match="siglip_vision_model, which has no CLS token"
        ):
            mixin(model_path=str(bundle.directory))
    code, text, _ = run(
        capsys, "embed", bundle.directory, SAMPLES[0], "--output", tmp_path / "o.npy"
    )
    assert code == 0
    assert "pooled of 64 numbers" in text
    want = encoder.encode(SAMPLES[0], outputs="pooled").pooled
    assert np.allclose(np.load(tmp_path / "o.npy"), want, atol=1e-5)


def test_of_both_towers_the_vision_part_is_taken(tmp_path: Path) -> None:
    """The checkpoints on the hub hold both; ``get_image_features`` is the pooler's output."""
    vision = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    text = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 99}
    torch.manual_seed(0)
    model = transformers.SiglipModel(
        transformers.SiglipConfig(
            vision_config=vision | {"intermediate_size": 128, "image_size": 64, "patch_size": 16},
            text_config=text | {"intermediate_size": 64},
        )
    ).eval()
    model.save_pretrained(tmp_path / "siglip")
    fast = getattr(transformers, "SiglipImageProcessorFast", None)
    processor = (fast or transformers.SiglipImageProcessor)(size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path / "siglip")
    bundle = export_bundle(resolve_checkpoint(str(tmp_path / "siglip")), tmp_path / "bundle")
    assert bundle.model_type == "siglip_vision_model"
    inputs = processor(images=load_image(str(SAMPLES[0])), return_tensors="pt")
    with torch.no_grad():
        want = model.get_image_features(**inputs)
    have = VisionEncoder.open(bundle.directory, device="cpu").encode(SAMPLES[0]).pooled
    towers.require_close(have, getattr(want, "pooler_output", want).numpy())


def test_patches_that_do_not_tile_the_picture(tmp_path: Path) -> None:
    """As so400m-patch14-384, where 27 patches of 14 leave 6 pixels of 384 out."""
    checkpoint = tiny_checkpoint(
        tmp_path / "checkpoint", FAMILY, scaled=True, patch_size=30, image_size=224
    )
    bundle = towers.exported(checkpoint, tmp_path / "bundle", uint8=True)
    assert bundle.layout.grid == (7, 7)
    towers.require_certified(bundle)
    towers.require_torchs_numbers(bundle, checkpoint, HF_CLASS)
    with pytest.raises(UnsupportedArchitectureError, match="no multiple of the patch size 30"):
        towers.exported(checkpoint, tmp_path / "other", resolutions=[(200, 200)])


def test_a_size_it_was_not_made_for_must_be_asked_for(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", FAMILY, scaled=True, image_size=256)
    with pytest.raises(UnsupportedArchitectureError, match="ask for --resolution 224x224"):
        towers.exported(checkpoint, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Vision towers alone; of the checkpoints, half is the text tower's.
        ("siglip-base-patch16-224", 92_884_224),
        ("siglip-so400m-patch14-384", 428_225_600),
    ],
)
def test_records_have_the_released_number_of_parameters(name: str, count: int) -> None:
    assert towers.parameters(find_backbone(name)) == count


def test_a_random_checkpoint_has_the_released_names(tmp_path: Path) -> None:
    weights = load_file(
        write_random_checkpoint("siglip-base-patch16-224", tmp_path / "base") / "model.safetensors"
    )
    assert all(name.startswith("vision_model.") for name in weights)
    assert "vision_model.head.attention.in_proj_weight" in weights
