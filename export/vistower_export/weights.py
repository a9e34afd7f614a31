"""The weights of a tower, rearranged exactly for inference.

Every change below leaves the function the tower computes unchanged in exact arithmetic; it is
done in float64 and rounded to float32 once, and the parity gate checks the outcome:

- softmax scale folded into the query projection;
- the key bias dropped where no rotary embedding follows: ``q·b_k`` is one number per row of the
  attention scores, and softmax does not see it;
- the value bias folded into the output projection's bias: attention rows sum to one;
- biases that are zero throughout dropped (released DINOv3 weights have zero QKV biases);
- LayerScale folded into the projection before it;
- the learned query of an attention pooling head folded into its keys;
- on request, rescaling and normalization of the pixels folded into the patch embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vistower.errors import CheckpointError
from vistower.families import Family
from vistower.families.record import GatedNames, VitNames
from vistower.tokens import TokenLayout
from vistower_export.towers import Activation, TowerConfig

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
class AttentionPooling:
    """An attention pooling head: a learned query looks at all tokens, then a residual MLP.

    The query is a constant, so its product with a key is a product of the token with a column of
    ``scores`` (D, heads). The values are taken of the sum of tokens that attention gives, by the
    matrices ``v`` (heads, D, head_dim) of the heads. Both are the same in exact arithmetic, and
    without a product of D by D numbers for every token.
    """

    scores: Linear
    v: Lazy
    v_shape: tuple[int, int, int]
    o: Linear
    norm: Norm
    up: Linear
    down: Linear


@dataclass(frozen=True)
class PoolerWeights:
    """What makes ``pooler_output``: see `vistower.families.record.Pooler`; at most one is set."""

    norm: Norm | None = None
    dense: Linear | None = None
    attention: AttentionPooling | None = None


@dataclass(frozen=True)
class Positions:
    """Where patches lie, as the tower's own modules compute it.

    ``rotary``: cos and sin of the patch tokens, each (N, head_dim). ``table``: what is added to
    the CLS token, if there is one, and to the patches, (C + N, D).
    """

    rotary: tuple[Array, Array] | None = None
    table: Array | None = None


@dataclass(frozen=True)
class Tower:
    """All weights of a tower, in the order the graph uses them.

    ``pooler`` makes ``pooler_output`` and ``projection`` ``image_embeds`` of that, where there are.
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
    pooler: PoolerWeights | None
    projection: Linear | None


class Configured(Protocol):
    """What is read of any tower's architecture."""

    @property
    def family(self) -> Family:
        """The record."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""

    @property
    def patch_size(self) -> int:
        """Pixels of a patch's side."""

    @property
    def hidden_size(self) -> int:
        """Width of a token."""

    @property
    def layer_norm_eps(self) -> float:
        """Of every norm."""

    @property
    def activation(self) -> Activation:
        """Of every MLP."""

    @property
    def layout(self) -> TokenLayout:
        """Where the tokens lie."""


class Arranged(Protocol):
    """What is read of any tower's arranged weights, those of a `Tower` or of another exporter."""

    @property
    def config(self) -> Configured:
        """The architecture."""

    @property
    def levels(self) -> Levels | None:
        """What is folded into it, see `Levels`."""

    @property
    def pooler(self) -> PoolerWeights | None:
        """What makes ``pooler_output``."""

    @property
    def projection(self) -> Linear | None:
        """What makes ``image_embeds``."""


class _Weights:
    """The state dict by the names of the family's record; says which weight is missing."""

    def __init__(self, state: Mapping[str, Array], names: VitNames) -> None:
        self._by_name = {canonical_name(name, names): value for name, value in state.items()}

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

    def has(self, start: str) -> bool:
        return any(name.startswith(start) for name in self._by_name)

    def put(self, name: str, value: Array) -> None:
        self._by_name[name] = value

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


def _patch(
    weights: _Weights, config: TowerConfig, table: Array | None, levels: Levels | None
) -> tuple[Linear, Array]:
    """The patch embedding as one product over flattened (C, p, p) patches, and the added rows."""
    names, cls = config.names, config.layout.num_cls_tokens
    prefix = config.num_prefix_tokens
    kernel = weights[f"{names.patch_embedding}.weight"]
    hidden = kernel.shape[0]
    flat = kernel.reshape(hidden, -1)
    tokens = np.zeros((config.layout.num_tokens, hidden), dtype=np.float64)
    if names.cls_token is not None:
        tokens[0] = weights[names.cls_token].reshape(hidden)
    if names.register_tokens and config.num_register_tokens:
        tokens[cls:prefix] = weights[names.register_tokens].reshape(-1, hidden)
    bias = weights.get(f"{names.patch_embedding}.bias")
    if bias is not None:
        tokens[prefix:] += bias
    if table is not None:
        tokens[:cls] += table[:cls]
        tokens[prefix:] += table[cls:]
    if levels is not None:
        scale, offset = levels.rows(config.patch_size)
        tokens[prefix:] += flat.astype(np.float64) @ offset
        flat = (flat * scale).astype(np.float32)
    patch = Linear(lambda: np.ascontiguousarray(flat.T), (flat.shape[1], hidden), None)
    return patch, tokens.astype(np.float32)[None]


def arrange(
    state: Mapping[str, Array],
    config: TowerConfig,
    positions: Positions,
    levels: Levels | None = None,
) -> Tower:
    """Rearrange a tower's state dict for inference.

    Args:
        state: float32 arrays by the Hugging Face class's own names.
        config: the architecture.
        positions: as the class computes them for the size of the pictures.
        levels: fold the processor's rescaling and normalization into the patch embedding.

    Raises:
        CheckpointError: a weight is missing.
    """
    names, rotary = config.names, positions.rotary
    weights = _Weights(state, names)
    patch, tokens = _patch(weights, config, positions.table, levels)
    layers = tuple(
        _layer(weights, f"{names.layers}.{index}.", config, has_rotary=rotary is not None)
        for index in range(config.num_hidden_layers)
    )
    projection = None
    if names.projection is not None and weights.has(f"{names.projection}."):
        projection = weights.linear(names.projection)
    return Tower(
        config=config,
        levels=levels,
        patch=patch,
        tokens=tokens,
        rotary=None if rotary is None else _with_identity_rows(rotary, config),
        norm_before=weights.norm(names.norm_before),
        layers=layers,
        norm_after=weights.norm(names.norm_after),
        pooler=_pooler(weights, config),
        projection=projection,
    )


def _layer(weights: _Weights, at: str, config: TowerConfig, *, has_rotary: bool) -> Layer:
    names = config.names.layer
    scale1 = 1.0 if names.scale1 is None else weights[at + names.scale1]
    scale2 = 1.0 if names.scale2 is None else weights[at + names.scale2]
    k = weights.linear(at + names.k)
    if not has_rotary:
        k = Linear(k.weight, k.shape, None)
    v = weights.linear(at + names.v)
    gate, up, down = None, names.up, names.down
    if config.gated_mlp and names.gated is not None:
        _split(weights, at, names.gated)
        gate = weights.linear(at + names.gated.gate)
        up, down = names.gated.up, names.gated.down
    return Layer(
        norm1=weights.require_norm(at + names.norm1),
        q=weights.linear(at + names.q, scale=config.head_dim**-0.5),
        k=k,
        v=Linear(v.weight, v.shape, None),
        o=weights.linear(at + names.o, scale=scale1, extra_bias=v.bias),
        norm2=weights.require_norm(at + names.norm2),
        gate=gate,
        up=weights.linear(at + up),
        down=weights.linear(at + down, scale=scale2),
    )


def _split(weights: _Weights, at: str, names: GatedNames) -> None:
    """Give gate and up their own names where one matrix holds both."""
    for leaf in ("weight", "bias"):
        both = None if names.fused is None else weights.get(f"{at}{names.fused}.{leaf}")
        if both is not None:
            gate, up = np.split(both, 2)
            weights.put(f"{at}{names.gate}.{leaf}", gate)
            weights.put(f"{at}{names.up}.{leaf}", up)


def _pooler(weights: _Weights, config: TowerConfig) -> PoolerWeights | None:
    """The pooler's weights; None where the checkpoint, or the family, has none."""
    name, kind = config.names.pooler, config.family.pooler
    if kind == "first":
        return PoolerWeights()
    if kind is None or name is None or not weights.has(f"{name}."):
        return None
    if kind == "norm":
        return PoolerWeights(norm=weights.require_norm(name))
    if kind == "dense":
        return PoolerWeights(dense=weights.linear(f"{name}.dense"))
    return PoolerWeights(attention=_attention_pooling(weights, name, config))


def _attention_pooling(weights: _Weights, at: str, config: TowerConfig) -> AttentionPooling:
    """SigLIP's head, whose attention is a ``torch.nn.MultiheadAttention``."""
    heads, width, wide = config.num_attention_heads, config.head_dim, config.hidden_size
    stacked = weights[f"{at}.attention.in_proj_weight"]
    q, k, v = np.split(stacked, 3)
    q_bias, _, v_bias = np.split(weights[f"{at}.attention.in_proj_bias"].astype(np.float64), 3)
    probe = weights[f"{at}.probe"].reshape(wide).astype(np.float64)
    query = (q.astype(np.float64) @ probe + q_bias) * width**-0.5
    by_head = k.astype(np.float64).reshape(heads, width, wide)
    scores = np.einsum("hd,hdk->kh", query.reshape(heads, width), by_head).astype(np.float32)

    def values() -> Array:
        return np.ascontiguousarray(v.reshape(heads, width, wide).transpose(0, 2, 1))

    return AttentionPooling(
        scores=Linear(lambda: scores, (wide, heads), None),
        v=values,
        v_shape=(heads, wide, width),
        o=weights.linear(f"{at}.attention.out_proj", extra_bias=v_bias.astype(np.float32)),
        norm=weights.require_norm(f"{at}.layernorm"),
        up=weights.linear(f"{at}.mlp.fc1"),
        down=weights.linear(f"{at}.mlp.fc2"),
    )


def canonical_name(name: str, names: VitNames) -> str:
    """The name of a weight as the family's record has it: transformers 4 and 5 differ."""
    for released, other in names.spellings:
        name = name.replace(other, released)
    return name.removeprefix(names.prefix)


def released_name(name: str, names: VitNames) -> str:
    """The name of a weight in the released files."""
    name = canonical_name(name, names)
    return name if name.startswith(names.unprefixed) else names.prefix + name


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
