"""The Hugging Face model and processor whose numbers a bundle must reproduce."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, ImageProcessingMixin
from transformers.image_utils import load_image

from vistower.bundle.source_files import PROCESSOR_CONFIGS
from vistower.errors import (
    CheckpointError,
    OptionError,
    ProcessorConfigError,
    UnsupportedArchitectureError,
)
from vistower.preprocess.classes import plain_name
from vistower.preprocess.processor import Backend, Transparency
from vistower_export.files import CONFIG, read_json
from vistower_export.towers import TowerFamily, family_of

Array = npt.NDArray[np.float32]

_NAMES_BACKENDS = importlib.util.find_spec("transformers.image_processing_backends") is not None
"""Whether this transformers calls the choice ``backend``, and not ``use_fast``."""


@dataclass(frozen=True)
class Reference:
    """What torch + transformers compute, by picture: ``pixel_values`` (1, 3, H, W) and
    ``last_hidden_state`` (1, T, D), float32."""

    pixel_values: Mapping[str, Array]
    last_hidden_state: Mapping[str, Array]


def load_model(directory: Path) -> Any:
    """Load the vision tower of a checkpoint in float32; of a ``CLIPModel`` only the vision part.

    Raises:
        UnsupportedArchitectureError: its model type belongs to no tower.
        CheckpointError: a weight is missing, has another shape, is not finite, or cannot be read.
            (transformers itself would fill a missing weight with random numbers and only warn.)
    """
    family = family_of(read_json(directory / CONFIG))
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
    _require_every_weight(directory, family, info)
    _require_finite(directory, model)
    return model.eval().requires_grad_(False)


def _require_every_weight(directory: Path, family: TowerFamily, info: Mapping[str, Any]) -> None:
    missing, other = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    unexpected = sorted(info["unexpected_keys"])
    low_rank = [name for name in unexpected if "lora_" in name or ".base_layer." in name]
    if low_rank:
        raise CheckpointError(
            f"{directory} holds a PEFT adapter among its weights ({low_rank[0]}), which "
            f"{family.hf_class} leaves out. Merge it with peft's merge_and_unload(), save the "
            f"model and export that."
        )
    if not missing and not other:
        return
    prefix = next(
        (
            found.removesuffix(name)
            for name in missing[:1]
            for found in unexpected
            if found.endswith(f".{name}")
        ),
        None,
    )
    if prefix is not None:
        raise CheckpointError(
            f"The weights in {directory} are named with {prefix!r} in front of what "
            f"{family.hf_class} calls them ({prefix}{missing[0]}). That is how a wrapped model "
            f"saves them: torch.compile writes _orig_mod., DataParallel module., a model around it "
            f"the name it has there, such as backbone. Save the model inside the wrapper with "
            f"save_pretrained(), or take the prefix off the names in the file."
        )
    raise CheckpointError(
        f"{directory} lacks {len(missing)} weights of {family.hf_class} and has {len(other)} of "
        f"another shape (first: {(missing + other)[0]}). It is damaged, or was saved by a "
        f"transformers that names them differently from {transformers.__version__}."
    )


def _require_finite(directory: Path, model: Any) -> None:
    bad = {
        name: int((~torch.isfinite(weight)).sum())
        for name, weight in model.state_dict().items()
        if weight.is_floating_point() and not torch.isfinite(weight).all()
    }
    if bad:
        name, count = next(iter(bad.items()))
        others = f" So have {len(bad) - 1} more tensors." if len(bad) > 1 else ""
        raise CheckpointError(
            f"{directory} has NaN or infinite weights: {count} in {name}.{others} Its training "
            f"diverged, it overflowed where it was converted to half precision, or the file is "
            f"damaged. Take an earlier checkpoint."
        )


def load_processor(directory: Path, backend: str | None = None) -> Any:
    """Load the image processor that transformers' ``AutoImageProcessor`` gives for a checkpoint.

    transformers reads the files itself: which of ``processor_config.json``,
    ``preprocessor_config.json`` and ``config.json`` decides differs between its majors. Code of
    the checkpoint's own is never run.

    Args:
        directory: the checkpoint.
        backend: the one to ask for; None leaves the choice to transformers. 5 takes torchvision,
            4.57 PIL unless the class named in the file ends in ``Fast``.

    Raises:
        OptionError: there is no such backend.
        CheckpointError: transformers finds no image processor there, or cannot load it.
        ProcessorConfigError: it is the checkpoint's own code, or has no such backend.
    """
    if backend not in (None, *get_args(Backend)):
        raise OptionError(
            f"Processor backend {backend!r} is not known. Use {' or '.join(get_args(Backend))}."
        )
    asked: dict[str, Any] = {}
    if backend is not None:
        asked = {"backend": backend} if _NAMES_BACKENDS else {"use_fast": backend == "torchvision"}
    try:
        _refuse_own_code(directory, _processor_section(directory))
        processor = AutoImageProcessor.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **asked
        )
    except ProcessorConfigError:
        raise
    # A config that is no config raises whatever it happens to run into.
    except Exception as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load an image processor from "
            f"{directory}: {error} If another major of transformers wrote it, install that one, or "
            f"name the backend with --processor-backend."
        ) from error
    if not isinstance(processor, ImageProcessingMixin):
        raise ProcessorConfigError(
            f"{directory} names {type(processor).__name__}, which is no image processor."
        )
    if backend is not None and processor_backend(processor) != backend:
        raise ProcessorConfigError(
            f"{type(processor).__name__} has no backend {backend!r} in transformers "
            f"{transformers.__version__}; it has {processor_backend(processor)}."
        )
    return processor


def _processor_section(directory: Path) -> dict[str, Any]:
    """The options of the image processor, as transformers finds them."""
    section: dict[str, Any]
    section, _ = ImageProcessingMixin.get_image_processor_dict(directory, local_files_only=True)
    return section


def _refuse_own_code(directory: Path, section: Mapping[str, Any]) -> None:
    places = [section]
    if "image_processor_type" not in section:
        # Only then does transformers look further.
        places.append(read_json(directory / CONFIG))
    for place in places:
        code = place.get("auto_map") or {}
        for name in ("AutoImageProcessor", "AutoFeatureExtractor"):
            if name in code:
                raise ProcessorConfigError(
                    f"{directory} brings its own image processor, {code[name]!r} (auto_map, for "
                    f"trust_remote_code). Its code is not run, and so cannot be agreed with. If "
                    f"a processor of transformers gives the same pixels, name that one in a copy "
                    f"of the checkpoint, without auto_map."
                )


def processor_file(directory: Path) -> str:
    """Name of the file in a checkpoint that transformers takes the image processor from."""
    section = _processor_section(directory)
    for name in PROCESSOR_CONFIGS:
        path = directory / name
        if path.is_file():
            content = read_json(path)
            if section in (content, content.get("image_processor")):
                return name
    return CONFIG


def processor_backend(processor: Any) -> Backend:
    """What an image processor resizes with."""
    named = getattr(processor, "backend", None)
    if named is not None:
        return "torchvision" if named == "torchvision" else "pil"
    return "torchvision" if processor.is_fast else "pil"


def processor_config(processor: Any) -> dict[str, Any]:
    """What an image processor saves as ``preprocessor_config.json``.

    Its class by the name that both majors of transformers know, with the ending that 4.57 tells
    the backends apart by: ``Fast`` is torchvision's. (5 calls the PIL one ``...Pil``, a name 4.57
    does not know.)
    """
    config: dict[str, Any] = json.loads(processor.to_json_string())
    ending = "Fast" if processor_backend(processor) == "torchvision" else ""
    return config | {"image_processor_type": plain_name(type(processor).__name__) + ending}


def transparency(processor: Any) -> Transparency:
    """Whether a processor blends an alpha channel onto white, found by trying.

    transformers 4.57 drops alpha, 5 blends; a processor that does not convert to RGB has neither.
    """
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    white = Image.new("RGB", (8, 8), (255, 255, 255))
    try:
        seen = processor(images=clear, return_tensors="pt")["pixel_values"]
        blended = processor(images=white, return_tensors="pt")["pixel_values"]
        return "white" if torch.equal(seen, blended) else "dropped"
    # Whatever a processor raises of a picture it does not take.
    except Exception:
        return "dropped"


def compute(
    model: Any, processor: Any, pictures: Sequence[Path], size: tuple[int, int] | None = None
) -> Reference:
    """Run the reference on picture files, one at a time.

    ``size`` is the (height, width) in pixels to resize to; None for the processor's own.

    Raises:
        CheckpointError: the processor fails on a picture.
    """
    options = {} if size is None else {"size": {"height": size[0], "width": size[1]}}
    pixel_values, states = {}, {}
    for path in pictures:
        try:
            inputs = processor(images=load_image(str(path)), return_tensors="pt", **options)
        # An option that makes no sense fails wherever it is used first.
        except Exception as error:
            raise CheckpointError(
                f"transformers' {type(processor).__name__} fails on {path.name}: {error}"
            ) from error
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
