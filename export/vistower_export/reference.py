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
from safetensors import SafetensorError, safe_open
from transformers import AutoImageProcessor, ImageProcessingMixin
from transformers.image_utils import load_image

from vistower.bundle.source_files import PROCESSOR_CONFIGS
from vistower.errors import (
    CheckpointError,
    OptionError,
    ProcessorConfigError,
    UnsupportedArchitectureError,
)
from vistower.families import Family
from vistower.families.record import OUTPUTS, Variant
from vistower.preprocess.classes import plain_name
from vistower.preprocess.frame import Edges
from vistower.preprocess.processor import Backend, Preprocessor, Transparency
from vistower_export.files import CONFIG, read_json
from vistower_export.towers import family_of, native_size, square_patch
from vistower_export.weights import Positions, canonical_name

Array = npt.NDArray[np.float32]

_NAMES_BACKENDS = importlib.util.find_spec("transformers.image_processing_backends") is not None
"""Whether this transformers calls the choice ``backend``, and not ``use_fast``."""


@dataclass(frozen=True)
class Reference:
    """What torch + transformers compute, float32: ``pixel_values`` (1, 3, H, W) by picture, and
    every output by its name and by picture."""

    pixel_values: Mapping[str, Array]
    outputs: Mapping[str, Mapping[str, Array]]


def load_model(directory: Path) -> Any:
    """Load the vision tower of a checkpoint in float32; of a ``CLIPModel`` only the vision part and
    its projection.

    Raises:
        UnsupportedArchitectureError: its model type belongs to no tower.
        CheckpointError: a weight is missing, has another shape, is not finite, or cannot be read.
            (transformers itself would fill a missing weight with random numbers and only warn.)
    """
    config = read_json(directory / CONFIG)
    family = family_of(config)
    options = {}
    # CLIPModel's projection has the width of the whole model's config, not of the vision part's.
    if "vision_config" in config and "projection_dim" in config:
        options["projection_dim"] = config["projection_dim"]
    names = _weight_names(directory)
    for variant in family.variants:
        last = variant is family.variants[-1]
        if not last and names and not any(need in name for need in variant.needs for name in names):
            # transformers would warn of weights that it makes up.
            continue
        model, info = _loaded(directory, variant, options)
        if last or not any(name.startswith(variant.needs) for name in info["missing_keys"]):
            break
    _require_every_weight(directory, family, info)
    _require_finite(directory, model)
    return model.eval().requires_grad_(False)


def _weight_names(directory: Path) -> set[str]:
    """Names of the weights in a checkpoint; empty where only loading them tells."""
    names: set[str] = set()
    try:
        for path in directory.glob("*.safetensors"):
            with safe_open(path, framework="numpy") as file:
                names.update(file.keys())
    except (OSError, SafetensorError):
        return set()
    return names


def _loaded(directory: Path, variant: Variant, options: Mapping[str, Any]) -> tuple[Any, Any]:
    model_class = getattr(transformers, variant.hf_class, None)
    if model_class is None:
        raise UnsupportedArchitectureError(
            f"transformers {transformers.__version__} has no {variant.hf_class}. Install "
            f"transformers 4.57 or newer."
        )
    try:
        return model_class.from_pretrained(  # type: ignore[no-any-return]
            directory,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            **options,
            **variant.options,
        )
    # safetensors, pickle, torch and transformers each have their own exceptions here.
    except Exception as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load {directory}: {error}"
        ) from error


def _require_every_weight(directory: Path, family: Family, info: Mapping[str, Any]) -> None:
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


def size_options(preprocessor: Preprocessor) -> dict[str, Any]:
    """What to ask a Hugging Face processor for, so that it gives the pictures of ours.

    Args:
        preprocessor: ours for another size, see `Preprocessor.resized`.
    """
    size = preprocessor.size
    sides = ("height", "width")
    options: dict[str, Any] = {}
    if isinstance(size, Edges):
        options["size"] = {"shortest_edge": size.shortest}
    elif size is not None:
        options["size"] = dict(zip(sides, size, strict=True))
    if preprocessor.crop is not None:
        options["crop_size"] = dict(zip(sides, preprocessor.crop.size, strict=True))
    return options


def compute(
    model: Any, processor: Any, pictures: Sequence[Path], options: Mapping[str, Any] | None = None
) -> Reference:
    """Run the reference on picture files, one at a time.

    ``options`` are what to ask of the processor beyond its own, see `size_options`.

    Raises:
        CheckpointError: the processor fails on a picture.
    """
    pixel_values: dict[str, Array] = {}
    outputs: dict[str, dict[str, Array]] = {}
    for path in pictures:
        try:
            inputs = processor(images=load_image(str(path)), return_tensors="pt", **(options or {}))
        # An option that makes no sense fails wherever it is used first.
        except Exception as error:
            raise CheckpointError(
                f"transformers' {type(processor).__name__} fails on {path.name}: {error}"
            ) from error
        pixel_values[path.name] = inputs["pixel_values"].numpy()
        for name, values in forward(model, inputs["pixel_values"]).items():
            outputs.setdefault(name, {})[path.name] = values
    return Reference(pixel_values, outputs)


def forward(model: Any, pixel_values: torch.Tensor) -> dict[str, Array]:
    """Every output that a model of a family gives of ``pixel_values`` (B, 3, H, W), float32.

    The positions of a tower that was trained for another size are interpolated.
    """
    config = model.config.to_dict()
    family = family_of(config)
    variant = next(one for one in family.variants if one.hf_class == type(model).__name__)
    size = native_size(family, config)
    options = {}
    if family.positions == "learned" and size != tuple(pixel_values.shape[2:]):
        options["interpolate_pos_encoding"] = True
    seen: list[Any] = []
    hook = None
    if variant.tower is not None:
        tower = getattr(model, variant.tower)
        hook = tower.register_forward_hook(lambda module, given, found: seen.append(found))
    with torch.inference_mode():
        seen.append(model(pixel_values=pixel_values, **options))
    if hook is not None:
        hook.remove()
    found = {}
    for name in OUTPUTS:
        values = next((x for one in seen if (x := getattr(one, name, None)) is not None), None)
        if values is not None:
            found[name] = values.numpy()
    return found


def state_dict(model: Any) -> dict[str, Array]:
    """The model's weights as float32 arrays that share its memory."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def positions(model: Any, family: Family, image_size: tuple[int, int]) -> Positions:
    """Where the patches of (height, width) pixels lie, computed by the model's own modules."""
    names, config = family.weights, model.config.to_dict()
    if names is not None and names.rotary_module is not None:
        with torch.no_grad():
            cos, sin = getattr(model, names.rotary_module)(torch.zeros(1, 3, *image_size))
        return Positions(rotary=(cos.numpy(), sin.numpy()))
    if names is None or names.position_embedding is None:
        return Positions()
    if family.positions == "learned" and native_size(family, config) == image_size:
        # Its forward adds them as they are.
        state = state_dict(model)
        table = next(
            value
            for name, value in state.items()
            if canonical_name(name, names) == names.position_embedding
        )
        return Positions(table=table.reshape(-1, table.shape[-1]))
    patch = square_patch(family, config, image_size)
    rows = image_size[0] // patch * (image_size[1] // patch) + int(family.has_cls)
    embeddings = next(x for x in model.modules() if hasattr(x, "interpolate_pos_encoding"))
    with torch.no_grad():
        # Only the shape of the first argument is looked at.
        tokens = torch.zeros(1, rows, family.hidden_size(config))
        resized = embeddings.interpolate_pos_encoding(tokens, *image_size)
    return Positions(table=resized[0].numpy())
