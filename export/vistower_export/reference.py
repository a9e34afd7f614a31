"""The Hugging Face model and processor whose numbers a bundle must reproduce."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image
from transformers.image_utils import load_image

from vistower.errors import CheckpointError, UnsupportedArchitectureError
from vistower.preprocess.processor import Transparency
from vistower_export.towers import TowerFamily, family_of

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """What torch + transformers compute, by picture: ``pixel_values`` (1, 3, H, W) and
    ``last_hidden_state`` (1, T, D), float32."""

    pixel_values: Mapping[str, Array]
    last_hidden_state: Mapping[str, Array]


def read_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's ``config.json``.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds {type(config).__name__}, not a JSON object.")
    return config


def load_model(directory: Path) -> tuple[TowerFamily, Any]:
    """Load the vision tower of a checkpoint in float32; of a ``CLIPModel`` only the vision part.

    Raises:
        UnsupportedArchitectureError: its model type belongs to no tower.
        CheckpointError: a weight is missing, has another shape, or cannot be read. (transformers
            itself would fill a missing weight with random numbers and only warn.)
    """
    family = family_of(read_config(directory))
    model_class = getattr(transformers, family.hf_class, None)
    if model_class is None:
        raise UnsupportedArchitectureError(
            f"transformers {transformers.__version__} has no {family.hf_class}. Install "
            f"transformers 4.57 or newer."
        )
    try:
        model, info = model_class.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    # safetensors, pickle, torch and transformers each have their own exceptions here.
    except Exception as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load {directory}: {error}"
        ) from error
    missing, other = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    if missing or other:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} weights of {family.hf_class} and has "
            f"{len(other)} of another shape (first: {(missing + other)[0]}). It is damaged, or was "
            f"saved by a transformers that names them differently from {transformers.__version__}."
        )
    return family, model.eval().requires_grad_(False)


def load_processor(directory: Path, family: TowerFamily, backend: str) -> Any:
    """Load the Hugging Face image processor of a backend, ``torchvision`` or ``pil``.

    Raises:
        UnsupportedArchitectureError: the family has no such backend.
    """
    names = family.processors.get(backend)
    if names is None:
        raise UnsupportedArchitectureError(
            f"{family.hf_class} has no processor backend {backend!r}; it has "
            f"{', '.join(family.processors)}."
        )
    name = names.v5 if int(transformers.__version__.split(".")[0]) >= 5 else names.v4
    return getattr(transformers, name).from_pretrained(directory, local_files_only=True)


def transparency(processor: Any) -> Transparency:
    """Whether the processor blends an alpha channel onto white, found by trying.

    transformers 4.57 drops alpha, 5 blends; a processor that does not convert to RGB has neither.
    """
    if not processor.do_convert_rgb:
        return "dropped"
    clear = processor(images=Image.new("RGBA", (8, 8), (0, 0, 0, 0)), return_tensors="pt")
    white = processor(images=Image.new("RGB", (8, 8), (255, 255, 255)), return_tensors="pt")
    return "white" if torch.equal(clear["pixel_values"], white["pixel_values"]) else "dropped"


def compute(
    model: Any, processor: Any, pictures: Sequence[Path], size: tuple[int, int] | None = None
) -> Reference:
    """Run the reference on picture files, one at a time.

    ``size`` is the (height, width) in pixels to resize to; None for the processor's own.
    """
    options = {} if size is None else {"size": {"height": size[0], "width": size[1]}}
    pixel_values, states = {}, {}
    for path in pictures:
        inputs = processor(images=load_image(str(path)), return_tensors="pt", **options)
        with torch.inference_mode():
            output = model(pixel_values=inputs["pixel_values"])
        pixel_values[path.name] = inputs["pixel_values"].numpy()
        states[path.name] = output.last_hidden_state.numpy()
    return Reference(pixel_values, states)


def state_dict(model: Any) -> dict[str, Array]:
    """The model's weights as float32 arrays that share its memory."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def rotary_tables(
    model: Any, family: TowerFamily, image_size: tuple[int, int]
) -> tuple[Array, Array] | None:
    """Cos and sin (N, head_dim) of the patch tokens, computed by the model's own module."""
    if family.rotary_module is None:
        return None
    with torch.no_grad():
        cos, sin = getattr(model, family.rotary_module)(torch.zeros(1, 3, *image_size))
    return cos.numpy(), sin.numpy()
