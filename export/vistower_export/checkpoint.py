"""Random-weight checkpoints of the real architectures, for tests and for measuring speed.

The released DINOv3 weights are gated and all of them are large; a seeded checkpoint has the same
graph, the same sizes and the same preprocessing, and says in every place it can that its weights
mean nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistower.backbones import Backbone, find_backbone
from vistower.errors import OutputExistsError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

RANDOM_WEIGHTS_KEY = "vistower_random_weights"
SEED_KEY = "vistower_seed"

_README = """\
Random weights: a vistower test checkpoint of {name}, not a trained model.

Architecture and preprocessing are those of {hub_id}; the weights were drawn with seed {seed}.
Its embeddings mean nothing. Use it to test an export, to measure speed, and for nothing else.
"""


def is_random_weight(config: Mapping[str, Any]) -> bool:
    """Tell whether a ``config.json`` carries the label of a random-weight checkpoint."""
    return config.get(RANDOM_WEIGHTS_KEY) is True


def write_random_checkpoint(
    name: str, directory: Path, *, seed: int = 0, overwrite: bool = False
) -> Path:
    """Write a seeded random-weight checkpoint: float32 weights, config and processor config.

    The same name and seed give byte-identical weights. The directory appears complete or not at
    all. One copy of the weights is held in memory (27 GB for the 7B towers).

    Args:
        name: a known backbone, see :func:`vistower.backbones.find_backbone`.
        directory: where to write; must not exist or be empty.
        seed: of the generator all weights come from.
        overwrite: replace what ``directory`` holds.

    Returns:
        ``directory``.

    Raises:
        UnsupportedArchitectureError: the name is not known.
        OutputExistsError: ``directory`` is a file, or holds something and ``overwrite`` is off.
    """
    backbone = find_backbone(name)
    directory = Path(directory)
    _refuse_existing(directory, overwrite=overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        _write_model(backbone, partial, seed)
        _write_json(partial / "preprocessor_config.json", _processor_config(backbone))
        (partial / "README.md").write_text(
            _README.format(name=backbone.name, hub_id=backbone.hub_id, seed=seed), encoding="utf-8"
        )
        if directory.exists() and overwrite:
            replaced = directory.parent / f".{directory.name}.replaced-{os.getpid()}"
            directory.rename(replaced)
            partial.rename(directory)
            shutil.rmtree(replaced)
        else:
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _refuse_existing(directory: Path, *, overwrite: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise OutputExistsError(
            f"Cannot write a checkpoint to {str(directory)!r}: it is a file. Choose another path."
        )
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise OutputExistsError(
            f"Cannot write a checkpoint to {str(directory)!r}: the directory is not empty. "
            "Choose another one, or ask to overwrite it."
        )


def _write_model(backbone: Backbone, directory: Path, seed: int) -> None:
    import numpy as np
    import torch
    from huggingface_hub import save_torch_state_dict

    # On the meta device the module costs nothing, so the weights exist once, as drawn below.
    with torch.device("meta"):
        model = _build_model(backbone)
    model.to_empty(device="cpu")
    generator = np.random.default_rng(seed)
    state_dict = {}
    for name, parameter in model.named_parameters():
        _draw(name, parameter.detach().numpy(), backbone, generator)
        state_dict[_released_name(name, backbone)] = parameter.detach()
    save_torch_state_dict(state_dict, directory, max_shard_size="5GB")

    label = {
        "architectures": [type(model).__name__],
        "dtype": "float32",
        RANDOM_WEIGHTS_KEY: True,
        SEED_KEY: seed,
    }
    _write_json(directory / "config.json", model.config.to_diff_dict() | label)


def _released_name(name: str, backbone: Backbone) -> str:
    """Name of a tensor in the released files; transformers 4.57 and 5 name modules differently.

    Both majors load the released names. 4.57 would start a tower saved by 5 from scratch, with
    no more than a warning.
    """
    if backbone.family == "clip_vision_model":
        return "vision_model." + name.removeprefix("vision_model.")
    return name.removeprefix("model.")


def _build_model(backbone: Backbone) -> PreTrainedModel:
    from transformers import CLIPVisionConfig, CLIPVisionModel, DINOv3ViTConfig, DINOv3ViTModel

    shared: dict[str, Any] = {
        "image_size": backbone.image_size,
        "patch_size": backbone.patch_size,
        "hidden_size": backbone.hidden_size,
        "intermediate_size": backbone.intermediate_size,
        "num_hidden_layers": backbone.num_hidden_layers,
        "num_attention_heads": backbone.num_attention_heads,
        "hidden_act": backbone.hidden_act,
        "layer_norm_eps": backbone.layer_norm_eps,
    }
    if backbone.family == "clip_vision_model":
        return CLIPVisionModel(CLIPVisionConfig(**shared, projection_dim=backbone.projection_dim))
    return DINOv3ViTModel(
        DINOv3ViTConfig(
            **shared,
            num_register_tokens=backbone.num_register_tokens,
            use_gated_mlp=backbone.use_gated_mlp,
            query_bias=backbone.query_bias,
            key_bias=backbone.key_bias,
            value_bias=backbone.value_bias,
            rope_theta=backbone.rope_theta,
        )
    )


def _draw(
    name: str, values: np.ndarray[Any, Any], backbone: Backbone, generator: np.random.Generator
) -> None:
    """Fill one float32 parameter in place.

    Nothing a graph edit could lose is left neutral: no LayerScale of 1, no bias of 0 (but for
    those the released weights have at 0, so that the exported graph is the released one's), no
    LayerNorm that scales by 1. Matrices keep the variance of what passes through them, and what
    CLIP adds to the residual stream is damped by its depth as LayerScale damps DINOv3's.
    """
    import numpy as np

    owner, _, leaf = name.rpartition(".")
    layer = owner.rpartition(".")[2]
    if leaf == "bias" and layer in {"q_proj", "k_proj", "v_proj"} and backbone.zero_qkv_bias:
        values.fill(0.0)
        return
    if leaf == "lambda1":
        generator.random(out=values, dtype=np.float32)
        values *= 0.95
        values += 0.05
        return
    generator.standard_normal(out=values, dtype=np.float32)
    if "norm" in layer and leaf == "weight":
        values *= 0.1
        values += 1.0
    elif leaf == "weight" and "position" not in layer:
        values *= values[0].size ** -0.5
        if layer in {"out_proj", "fc2"}:
            values *= (2 * backbone.num_hidden_layers) ** -0.5
    else:
        values *= 0.1


def _processor_config(backbone: Backbone) -> dict[str, Any]:
    """``preprocessor_config.json`` as the released repository has it, in today's spelling."""
    shared: dict[str, Any] = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(backbone.image_mean),
        "image_std": list(backbone.image_std),
        "rescale_factor": 1 / 255,
    }
    side = {"height": backbone.image_size, "width": backbone.image_size}
    if backbone.family == "clip_vision_model":
        return shared | {
            "crop_size": side,
            "do_center_crop": True,
            "do_convert_rgb": True,
            "image_processor_type": "CLIPImageProcessor",
            "resample": 3,
            "size": {"shortest_edge": backbone.image_size},
        }
    return shared | {
        "crop_size": None,
        "data_format": "channels_first",
        "default_to_square": True,
        "do_center_crop": None,
        "do_convert_rgb": None,
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "resample": 2,
        "size": side,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
