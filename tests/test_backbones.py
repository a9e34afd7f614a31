from __future__ import annotations

import dataclasses

import pytest

from vistower.backbones import BACKBONES, EMBED_MODEL_RESOLUTION, find_backbone
from vistower.errors import UnsupportedArchitectureError


@pytest.mark.parametrize(
    ("name", "resolution"),
    [
        ("clip-vit-base-patch32", (224, 32)),
        ("clip-vit-base-patch16", (224, 16)),
        ("clip-vit-large-patch14", (224, 14)),
        ("clip-vit-large-patch14-336", (336, 14)),
        *(
            (f"dinov3-vit{size}16-pretrain-lvd1689m", (224, 16))
            for size in ("s", "splus", "b", "l", "hplus", "7b")
        ),
        ("dinov3-vits16plus-pretrain-lvd1689m", (224, 16)),
        ("dinov3-vith16plus-pretrain-lvd1689m", (224, 16)),
        ("dinov3-vitl16-pretrain-sat493m", (224, 16)),
        ("dinov3-vit7b16-pretrain-sat493m", (224, 16)),
    ],
)
def test_the_resolutions_of_the_contract(name: str, resolution: tuple[int, int]) -> None:
    assert EMBED_MODEL_RESOLUTION[name] == resolution


@pytest.mark.parametrize(
    ("asked", "hub_id"),
    [
        ("clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336"),
        ("/models/dinov3-vitb16-pretrain-lvd1689m/", "facebook/dinov3-vitb16-pretrain-lvd1689m"),
        ("dinov3-vits16", "facebook/dinov3-vits16-pretrain-lvd1689m"),
        ("dinov3-vitsplus16", "facebook/dinov3-vits16plus-pretrain-lvd1689m"),
        ("dinov3-vith16plus", "facebook/dinov3-vith16plus-pretrain-lvd1689m"),
        ("dinov3-vit7b16-pretrain-sat493m", "facebook/dinov3-vit7b16-pretrain-sat493m"),
    ],
)
def test_a_backbone_is_found_by_every_way_of_writing_it(asked: str, hub_id: str) -> None:
    assert find_backbone(asked).hub_id == hub_id


def test_an_unknown_name_gets_the_closest_and_all_known_ones() -> None:
    with pytest.raises(UnsupportedArchitectureError) as caught:
        find_backbone("dinov3-vitx16")
    assert "Did you mean 'dinov3-vit" in str(caught.value)
    assert all(name in str(caught.value) for name in BACKBONES)
    with pytest.raises(UnsupportedArchitectureError):
        find_backbone("")


def test_no_name_or_alias_stands_for_two_records() -> None:
    names = [name for record in BACKBONES.values() for name in (record.name, *record.aliases)]
    assert len(names) == len(set(names)) == len(EMBED_MODEL_RESOLUTION)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_record_is_consistent_and_frozen(name: str) -> None:
    record = BACKBONES[name]
    # so400m-patch14-384: transformers leaves 6 pixels of 384 out.
    assert record.image_size % record.patch_size in (0, 6)
    heads = record.config.get("num_attention_heads")
    if heads is not None:
        assert record.config["hidden_size"] % heads == 0
    assert record.num_patches == (record.image_size // record.patch_size) ** 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.patch_size = 1  # type: ignore[misc]
