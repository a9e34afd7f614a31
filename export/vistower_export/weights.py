"""The weights of a tower, rearranged exactly for inference.

Every change below leaves the function the tower computes unchanged in exact arithmetic; it is
done in float64 and rounded to float32 once, and the parity gate checks the outcome:

- softmax scale folded into the query projection;
- the key bias dropped where no rotary embedding follows: ``q·b_k`` is one number per row of the
  attention scores, and softmax does not see it;
- the value bias folded into the output projection's bias: attention rows sum to one;
- biases that are zero throughout dropped (released DINOv3 weights have zero QKV biases);
- LayerScale folded into the projection before it;
- on request, rescaling and normalization of the pixels folded into the patch embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.errors import CheckpointError
from vistower_export.towers import TowerConfig

Array = npt.NDArray[np.float32]
Lazy = Callable[[], Array]


@dataclass(frozen=True)
class Linear:
    """``x @ weight + bias``: a weight (in, out), made when asked for, and an optional bias (out,).

    Making the weight late keeps one copy of a large checkpoint in memory, not two.
    """

    weight: Lazy
    shape: tuple[int, int]
    bias: Array | None


@dataclass(frozen=True)
class Product:
    """A matrix product of a graph: the name of the value that comes in, and its weights."""

    site: str
    linear: Linear


@dataclass(frozen=True)
class Norm:
    """Scale and bias (D,) of a LayerNorm."""

    scale: Array
    bias: Array


PIXELS_SITE = "patches.flat"
"""The value of a graph that holds a picture's ``pixel_values`` as patch rows."""

LEVELS_SITE = "levels.shares"
"""The value of a graph that holds a picture's levels over 256 as patch rows."""


@dataclass(frozen=True)
class Levels:
    """How a processor makes ``pixel_values`` of levels: ``level * scale + offset`` by channel.

    Folded into a tower, its patch product takes ``level / 256`` instead: exact in every float
    type, and of a size that keeps the folded weights in float16's range.
    """

    scale: tuple[float, ...]
    offset: tuple[float, ...]

    def rows(self, patch_size: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Scale of ``level / 256`` and offset by row of the patch product, each (3 p²,)."""
        area = patch_size**2
        return np.repeat(np.array(self.scale) * 256, area), np.repeat(self.offset, area)


@dataclass(frozen=True)
class Layer:
    """One pre-norm encoder layer."""

    norm1: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    norm2: Norm
    gate: Linear | None
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Tower:
    """All weights of a tower, in the order the graph uses them.

    ``tokens`` (1, T, D) is what is added to the patch products: in the prefix rows the CLS and
    register tokens themselves, in the patch rows the patch bias, each with its position embedding.
    ``rotary`` holds cos and sin, each (T, head_dim / 2), identity in the prefix rows. With
    ``levels`` the patch product takes uint8 levels over 256 in place of ``pixel_values``.
    """

    config: TowerConfig
    levels: Levels | None
    patch: Linear
    tokens: Array
    rotary: tuple[Array, Array] | None
    norm_before: Norm | None
    layers: tuple[Layer, ...]
    norm_after: Norm | None
    pooler_norm: Norm | None


class _Weights:
    """The state dict by canonical name; says which weight is missing."""

    def __init__(self, state: Mapping[str, Array], prefixes: tuple[str, ...]) -> None:
        self._by_name: dict[str, Array] = {}
        for name, value in state.items():
            for prefix in prefixes:
                name = name.removeprefix(prefix)
            self._by_name[name] = value

    def __getitem__(self, name: str) -> Array:
        try:
            return self._by_name[name]
        except KeyError as error:
            raise CheckpointError(
                f"The checkpoint has no weight {name!r}. It is damaged, or its config.json "
                f"belongs to another checkpoint: download it again."
            ) from error

    def get(self, name: str) -> Array | None:
        return self._by_name.get(name)

    def norm(self, name: str | None) -> Norm | None:
        return None if name is None else self.require_norm(name)

    def require_norm(self, name: str) -> Norm:
        return Norm(self[f"{name}.weight"], self[f"{name}.bias"])

    def linear(
        self, name: str, *, scale: Array | float = 1.0, extra_bias: Array | None = None
    ) -> Linear:
        """The projection ``name`` with its outputs multiplied by ``scale`` (a scalar or (out,)).

        ``extra_bias`` (in,) is a constant added to the projection's input.
        """
        weight = self[f"{name}.weight"]
        bias = self.get(f"{name}.bias")
        factor = np.asarray(scale, dtype=np.float64)

        def make() -> Array:
            if factor.ndim == 0 and factor == 1.0:
                return np.ascontiguousarray(weight.T)
            return np.ascontiguousarray((weight.astype(np.float64).T * factor).astype(np.float32))

        total = np.zeros(weight.shape[0], dtype=np.float64)
        if bias is not None:
            total += bias
        if extra_bias is not None:
            total += weight.astype(np.float64) @ extra_bias.astype(np.float64)
        total *= factor
        folded = total.astype(np.float32)
        return Linear(make, (weight.shape[1], weight.shape[0]), folded if folded.any() else None)


def _patch(weights: _Weights, config: TowerConfig, levels: Levels | None) -> tuple[Linear, Array]:
    """The patch embedding as one product over flattened (C, p, p) patches, and the added rows."""
    family = config.family
    kernel = weights[f"{family.patch_embedding}.weight"]
    hidden = kernel.shape[0]
    flat = kernel.reshape(hidden, -1)
    rows = config.grid[0] * config.grid[1]
    tokens = np.zeros((config.num_prefix_tokens + rows, hidden), dtype=np.float64)
    tokens[0] = weights[family.cls_token].reshape(hidden)
    if family.register_tokens and config.num_register_tokens:
        tokens[1 : config.num_prefix_tokens] = weights[family.register_tokens].reshape(-1, hidden)
    bias = weights.get(f"{family.patch_embedding}.bias")
    if bias is not None:
        tokens[config.num_prefix_tokens :] += bias
    if family.position_embedding:
        tokens += weights[family.position_embedding]
    if levels is not None:
        scale, offset = levels.rows(config.patch_size)
        tokens[config.num_prefix_tokens :] += flat.astype(np.float64) @ offset
        flat = (flat * scale).astype(np.float32)
    patch = Linear(lambda: np.ascontiguousarray(flat.T), (flat.shape[1], hidden), None)
    return patch, tokens.astype(np.float32)[None]


def arrange(
    state: Mapping[str, Array],
    config: TowerConfig,
    rotary: tuple[Array, Array] | None,
    levels: Levels | None = None,
) -> Tower:
    """Rearrange a tower's state dict for inference.

    Args:
        state: float32 arrays by the Hugging Face class's own names.
        config: the architecture.
        rotary: cos and sin of the patch tokens, each (N, head_dim), as the class computes them.
        levels: fold the processor's rescaling and normalization into the patch embedding.

    Raises:
        CheckpointError: a weight is missing.
    """
    family = config.family
    weights = _Weights(state, family.strip_prefixes)
    patch, tokens = _patch(weights, config, levels)
    names = family.layer
    layers = []
    for index in range(config.num_hidden_layers):
        at = f"{family.layers}.{index}."
        scale1 = 1.0 if names.scale1 is None else weights[at + names.scale1]
        scale2 = 1.0 if names.scale2 is None else weights[at + names.scale2]
        k = weights.linear(at + names.k)
        if rotary is None:
            k = Linear(k.weight, k.shape, None)
        v = weights.linear(at + names.v)
        gate = None
        if config.gated_mlp:
            if names.gate is None:
                raise CheckpointError(f"{family.hf_class} has no gated MLP, but config.json asks.")
            gate = weights.linear(at + names.gate)
        layers.append(
            Layer(
                norm1=weights.require_norm(at + names.norm1),
                q=weights.linear(at + names.q, scale=config.head_dim**-0.5),
                k=k,
                v=Linear(v.weight, v.shape, None),
                o=weights.linear(at + names.o, scale=scale1, extra_bias=v.bias),
                norm2=weights.require_norm(at + names.norm2),
                gate=gate,
                up=weights.linear(at + names.up),
                down=weights.linear(at + names.down, scale=scale2),
            )
        )
    return Tower(
        config=config,
        levels=levels,
        patch=patch,
        tokens=tokens,
        rotary=None if rotary is None else _with_identity_rows(rotary, config),
        norm_before=weights.norm(family.norm_before),
        layers=tuple(layers),
        norm_after=weights.norm(family.norm_after),
        pooler_norm=weights.norm(family.pooler_norm),
    )


def _with_identity_rows(rotary: tuple[Array, Array], config: TowerConfig) -> tuple[Array, Array]:
    """Half-width cos and sin with rows (1, 0) before them, so that prefix tokens stay as they are.

    The Hugging Face tables repeat their first half in the second; one half is enough.
    """
    half = config.head_dim // 2
    cos, sin = rotary
    if not (np.array_equal(cos[:, :half], cos[:, half:]) and cos.shape[1] == config.head_dim):
        raise CheckpointError("The rotary tables of this tower do not repeat: unknown layout.")
    prefix = np.ones((config.num_prefix_tokens, half), dtype=np.float32)
    return (
        np.concatenate([prefix, cos[:, :half]]),
        np.concatenate([np.zeros_like(prefix), sin[:, :half]]),
    )
