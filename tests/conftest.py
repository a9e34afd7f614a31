"""Tiny random-weight checkpoints of the real architectures, and their bundles, once a session.

torch, transformers and the exporter are imported where a checkpoint is made: where
``VISTOWER_TEST_MODELS`` names a folder that `prepare` wrote, they are taken from there, and the
runtime's tests run in an environment without any of the three.
"""

from __future__ import annotations

import importlib.util
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fake_gpu import gpu  # noqa: F401
from vistower.execution.cuda_problems import problems
from vistower.execution.device import Device

if TYPE_CHECKING:
    from vistower.families import Family

PREPARED = "VISTOWER_TEST_MODELS"
RELEASED_CLIP = "CLIPImageProcessor"

_SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 224,
}
TINY: dict[str, dict[str, Any]] = {
    "clip_vision_model": {**_SMALL, "patch_size": 32, "projection_dim": 24},
    "dinov3_vit": {**_SMALL, "patch_size": 16, "num_register_tokens": 4},
    "dinov2": {**_SMALL, "patch_size": 28, "image_size": 280},
    "dinov2_with_registers": {
        **_SMALL,
        "patch_size": 28,
        "image_size": 280,
        "num_register_tokens": 3,
    },
    "siglip_vision_model": {**_SMALL, "patch_size": 32},
    "dinov3_convnext": {"hidden_sizes": [16, 24, 32, 64], "depths": [1, 2, 1, 1]},
}
"""Model type → settings of its tiny checkpoint."""

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip_vision_model": ("CLIPImageProcessor", {}),
    "dinov3_vit": ("DINOv3ViTImageProcessor", {}),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 256}}),
    "dinov2_with_registers": ("BitImageProcessor", {"size": {"shortest_edge": 256}}),
    "siglip_vision_model": ("SiglipImageProcessor", {}),
    "dinov3_convnext": ("DINOv3ViTImageProcessor", {}),
}
"""Model type → its image processor's class and options."""

# optimum-onnx needs transformers 4.57: scripts/test runs its test in that environment.
collect_ignore = [] if importlib.util.find_spec("optimum") else ["test_optimum.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="Fail, not skip, where a GPU test cannot run."
    )


@lru_cache(maxsize=1)
def no_gpu() -> str:
    """Why CUDA cannot be had here; empty where it can."""
    return "; ".join(map(str, problems(Device("cuda"))))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or not no_gpu():
        return
    if item.config.getoption("--require-gpu"):
        pytest.fail(f"--require-gpu: {no_gpu()}", pytrace=False)
    pytest.skip(no_gpu())


def tiny_checkpoint(
    directory: Path,
    family: Family,
    *,
    seed: int = 0,
    scaled: bool = False,
    hf_class: str | None = None,
    processor: tuple[str, dict[str, Any]] | None = None,
    loading: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Save a two-layer model with non-neutral weights, and its processor.

    ``hf_class`` is another class of transformers than the family's plain one, ``processor`` its
    image processor's class and options where `PROCESSORS` has none, ``loading`` goes to the class.

    With ``scaled``, matrices keep the variance of what passes through them, as trained ones do:
    then float32 rounding reaches the tokens no larger than it does in a real tower.
    """
    import torch
    import transformers

    settings = {"vistower_random_weights": True, **TINY.get(family.model_type, {}), **changes}
    config = getattr(transformers, family.config_class)(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, hf_class or family.hf_class)(config, **(loading or {}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name or name.endswith("gamma"):
                parameter.uniform_(0.2, 0.8)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif scaled and name.endswith("weight") and "position" not in name:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(0, 0.1)
    model.save_pretrained(directory)
    name, options = processor or PROCESSORS[family.model_type]
    # 4.57's name of the torchvision one.
    ending = "" if int(transformers.__version__.split(".")[0]) >= 5 else "Fast"
    getattr(transformers, name + ending)(**options).save_pretrained(directory)
    return directory


def tiny_bundle(checkpoint: Path, output: Path) -> Path:
    """Export a checkpoint of `tiny_checkpoint`."""
    from vistower_export.source import resolve_checkpoint
    from vistower_export.steps import export_bundle

    return export_bundle(resolve_checkpoint(str(checkpoint)), output).directory


def prepare(folder: Path) -> None:
    """Write the checkpoints and bundles of the fixtures below to a folder."""
    from vistower.families.clip import FAMILY as CLIP
    from vistower.families.dinov3 import FAMILY as DINOV3

    for name, family in (("tiny-clip", CLIP), ("tiny-dinov3", DINOV3)):
        checkpoint = tiny_checkpoint(folder / "checkpoints" / name, family)
        tiny_bundle(checkpoint, folder / "bundles" / name)


def prepare_scaled(folder: Path) -> None:
    """Write checkpoints for scores, which need features that differ, and their bundles.

    CLIP's processor is named as the released repositories name it: transformers decides what that
    is.
    """
    from vistower.families.clip import FAMILY as CLIP
    from vistower.families.dinov3 import FAMILY as DINOV3

    sizes = {"hidden_size": 128, "intermediate_size": 256, "scaled": True}
    for name, family in (("scaled-clip", CLIP), ("scaled-dinov3", DINOV3)):
        checkpoint = tiny_checkpoint(folder / "checkpoints" / name, family, **sizes)
        if family is CLIP:
            config = checkpoint / "preprocessor_config.json"
            released = json.loads(config.read_text()) | {"image_processor_type": RELEASED_CLIP}
            config.write_text(json.dumps(released))
        tiny_bundle(checkpoint, folder / "bundles" / name)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny ``checkpoints`` and their ``bundles``."""
    if PREPARED in os.environ:
        return Path(os.environ[PREPARED])
    folder = tmp_path_factory.mktemp("models")
    prepare(folder)
    return folder


@pytest.fixture(scope="session")
def scaled_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare_scaled` writes."""
    if PREPARED in os.environ:
        return Path(os.environ[PREPARED])
    folder = tmp_path_factory.mktemp("scaled")
    prepare_scaled(folder)
    return folder


@pytest.fixture(scope="session")
def clip_checkpoint(models: Path) -> Path:
    """A tiny CLIP vision checkpoint: 2 layers, hidden 64, 4 heads, patch 32, 224 pixels."""
    return models / "checkpoints" / "tiny-clip"


@pytest.fixture(scope="session")
def dinov3_checkpoint(models: Path) -> Path:
    """A tiny DINOv3 checkpoint: 2 layers, hidden 64, 4 heads, 4 registers, patch 16."""
    return models / "checkpoints" / "tiny-dinov3"


@pytest.fixture(scope="session")
def clip_bundle(models: Path) -> Path:
    """The bundle of `clip_checkpoint`."""
    return models / "bundles" / "tiny-clip"


@pytest.fixture(scope="session")
def dinov3_bundle(models: Path) -> Path:
    """The bundle of `dinov3_checkpoint`."""
    return models / "bundles" / "tiny-dinov3"
