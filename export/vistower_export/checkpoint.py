"""Random-weight checkpoints of the real architectures, for tests and for measuring speed.

The released DINOv3 weights are gated and all of them are large; a seeded checkpoint has the same
graph, the same sizes and the same preprocessing, and says in every place it can that its weights
mean nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistower.backbones import find_backbone
from vistower.bundle import sha256
from vistower.bundle.manifest import FileRecord
from vistower.families import Family
from vistower.families.record import Backbone, GatedNames
from vistower.places import as_output_error, require_space
from vistower.staging import staged
from vistower_export.ownership import Kind, may_write
from vistower_export.towers import exporter, family_of

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

RANDOM_WEIGHTS_KEY = "vistower_random_weights"
SEED_KEY = "vistower_seed"

_SCALES = ("lambda1", "gamma")
"""Leaves of the names of LayerScale."""

_README = """\
Random weights: a vistower test checkpoint of {name}, not a trained model.

Architecture and preprocessing are those of {hub_id}; the weights were drawn with seed {seed}.
Its embeddings mean nothing. Use it to test an export, to measure speed, and for nothing else.

SHA-256 and size of each file, so that --overwrite knows this folder for its own:

{files}
"""
_FIRST_LINE = re.compile(r"Random weights: a vistower test checkpoint of (\S+), not .*")
_SEED = re.compile(r"with seed (-?\d+)\.$", re.MULTILINE)
_FILE = re.compile(r"^    ([0-9a-f]{64})  (\d+)  (\S+)$", re.MULTILINE)


def _readme(backbone: Backbone, seed: int, files: Mapping[str, FileRecord]) -> str:
    lines = (f"    {record.sha256}  {record.size}  {name}" for name, record in files.items())
    return _README.format(
        name=backbone.name, hub_id=backbone.hub_id, seed=seed, files="\n".join(lines)
    )


def _recorded_files(path: Path) -> Mapping[str, FileRecord]:
    text = path.read_text(encoding="utf-8")
    first, seed = _FIRST_LINE.match(text), _SEED.search(text)
    if first is None or seed is None:
        raise ValueError("it is another README")
    files = {name: FileRecord(int(size), digest) for digest, size, name in _FILE.findall(text)}
    if text != _readme(find_backbone(first[1]), int(seed[1]), files):
        raise ValueError("it was edited")
    return files


CHECKPOINT = Kind("random-weight checkpoint", "README.md", _recorded_files)


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
        overwrite: replace such a checkpoint, where its README proves everything in ``directory``
            to be part of it, see `vistower_export.ownership`.

    Returns:
        ``directory``.

    Raises:
        UnsupportedArchitectureError: the name is not known.
        OutputExistsError: ``directory`` holds something that may not be replaced.
        OutputError: ``directory`` cannot be written, or another process is writing it.
    """
    backbone = find_backbone(name)
    place, replaced = may_write(Path(directory), CHECKPOINT, overwrite=overwrite)
    with staged(place) as staging, as_output_error(place):
        partial = staging.path(place)
        partial.mkdir()
        parameters = sum(parameter.numel() for parameter in _empty_model(backbone).parameters())
        require_space(place, 4 * parameters)
        _write_model(backbone, partial, seed)
        _write_json(partial / "preprocessor_config.json", _processor_config(backbone))
        files = {
            path.name: FileRecord(path.stat().st_size, sha256(path))
            for path in sorted(partial.iterdir())
        }
        (partial / CHECKPOINT.file).write_text(_readme(backbone, seed, files), encoding="utf-8")
        staging.publish({place: replaced})
    return Path(directory)


def _write_model(backbone: Backbone, directory: Path, seed: int) -> None:
    import numpy as np
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    family = family_of({"model_type": backbone.family})
    names = family.weights
    model = _empty_model(backbone)
    layers = getattr(model.config, "num_hidden_layers", 0)
    model.to_empty(device="cpu")
    generator = np.random.default_rng(seed)
    state_dict = {}
    for name, parameter in model.named_parameters():
        name = exporter(family).released_name(family, name)
        _draw(name, parameter.detach().numpy(), backbone, family, layers, generator)
        state_dict[name] = parameter.detach()
    if names is not None and names.layer.gated is not None:
        _join_gates(state_dict, names.layer.gated)
    try:
        save_torch_state_dict(state_dict, directory, max_shard_size="5GB")
    except SafetensorError as error:
        raise OSError(str(error)) from error

    label = {
        "architectures": [type(model).__name__],
        "dtype": "float32",
        RANDOM_WEIGHTS_KEY: True,
        SEED_KEY: seed,
    }
    _write_json(directory / "config.json", model.config.to_diff_dict() | label)


def _empty_model(backbone: Backbone) -> PreTrainedModel:
    """The module on the meta device, where it costs nothing: its weights exist once, as drawn."""
    import torch

    with torch.device("meta"):
        return _build_model(backbone)


def _build_model(backbone: Backbone) -> PreTrainedModel:
    import transformers

    family = family_of({"model_type": backbone.family})
    config = getattr(transformers, family.config_class)(**backbone.config)
    model: PreTrainedModel = getattr(transformers, family.hf_class)(
        config, **family.variants[-1].options
    )
    return model


def _draw(
    name: str,
    values: np.ndarray[Any, Any],
    backbone: Backbone,
    family: Family,
    num_hidden_layers: int,
    generator: np.random.Generator,
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
    if leaf in _SCALES:
        generator.random(out=values, dtype=np.float32)
        values *= 0.95
        values += 0.05
        return
    generator.standard_normal(out=values, dtype=np.float32)
    if leaf == "weight" and values.ndim == 1:
        values *= 0.1
        values += 1.0
    elif leaf.endswith("weight") and "position" not in layer:
        values *= values[0].size ** -0.5
        if family.weights is not None and family.weights.layer.scale1 is None:
            last = (family.weights.layer.o, family.weights.layer.down)
            if owner.endswith(last):
                values *= (2 * num_hidden_layers) ** -0.5
    else:
        values *= 0.1


def _join_gates(state: dict[str, Any], names: GatedNames) -> None:
    """Put gate and up into one tensor, where the released files have them so."""
    import torch

    if names.fused is None:
        return
    for name in [name for name in state if f".{names.gate}." in name]:
        at, _, leaf = name.partition(names.gate)
        parts = state.pop(name), state.pop(f"{at}{names.up}{leaf}")
        state[f"{at}{names.fused}{leaf}"] = torch.cat(parts)


def _processor_config(backbone: Backbone) -> dict[str, Any]:
    """``preprocessor_config.json`` as the released repository has it, in today's spelling."""
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "rescale_factor": 1 / 255,
        **backbone.processor,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
