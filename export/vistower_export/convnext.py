"""DINOv3's ConvNeXt: how it is read, arranged and written.

The residual stream stays in float32 and channels first, as the depthwise convolutions take it:
CUDA convolves in no bfloat16. Norms and products work on rows of channels, as a transformer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vistower.errors import CheckpointError
from vistower.families import Family
from vistower.tokens import TokenLayout
from vistower_export.graph import Operators, levels_of
from vistower_export.quantize import LEVELS, Statistics, divided, scaled_rows, smoothing_factors
from vistower_export.towers import Activation, activation, square_patch
from vistower_export.weights import Lazy, Levels, Linear, Norm, PoolerWeights, Positions
from vistower_export.writer import Writer

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ConvNextConfig:
    """The architecture: blocks and channels of each stage."""

    family: Family
    image_size: tuple[int, int]
    patch_size: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    layer_norm_eps: float
    activation: Activation

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.widths[-1]

    @property
    def layout(self) -> TokenLayout:
        """The mean, then the patches."""
        return TokenLayout(self.image_size, self.patch_size, 0, self.hidden_size)


@dataclass(frozen=True)
class Convolution:
    """A kernel (out, in / groups, side, side), its bias, stride and padding."""

    kernel: Lazy
    shape: tuple[int, int, int, int]
    bias: Array
    stride: int
    padding: int = 0
    groups: int = 1


@dataclass(frozen=True)
class Block:
    """Depthwise convolution, norm, and an MLP whose scale is folded into ``down``."""

    depthwise: Convolution
    norm: Norm
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Stage:
    """A norm and a convolution that shrinks, in this order but for the first stage; then blocks."""

    norm: Norm
    shrink: Convolution
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class ConvNextTower:
    """All weights; ``pooler`` takes the first token."""

    config: ConvNextConfig
    levels: Levels | None
    stages: tuple[Stage, ...]
    norm: Norm
    pooler: PoolerWeights | None
    projection: Linear | None = None


def tower_config(
    family: Family, config: Mapping[str, Any], image_size: tuple[int, int]
) -> ConvNextConfig:
    """Read the architecture off a ``config.json``.

    Raises:
        UnsupportedArchitectureError: an option that changes the numbers is not reproduced.
    """
    return ConvNextConfig(
        family=family,
        image_size=image_size,
        patch_size=square_patch(family, config, image_size),
        depths=tuple(config["depths"]),
        widths=tuple(config["hidden_sizes"]),
        layer_norm_eps=config["layer_norm_eps"],
        activation=activation(config["hidden_act"]),
    )


def released_name(family: Family, name: str) -> str:
    """The name of a weight in the released files; transformers 5 has an encoder around stages."""
    return name.removeprefix("model.")


def arrange(
    state: Mapping[str, Array],
    config: ConvNextConfig,
    positions: Positions,
    levels: Levels | None = None,
) -> ConvNextTower:
    """Rearrange a state dict for inference; see `vistower_export.weights.arrange`."""
    weights = _Weights({released_name(config.family, name): value for name, value in state.items()})
    stages = []
    for index, depth in enumerate(config.depths):
        at = f"stages.{index}"
        first, second = f"{at}.downsample_layers.0", f"{at}.downsample_layers.1"
        norm, shrink = (second, first) if index == 0 else (first, second)
        convolution = weights.convolution(shrink, stride=4 if index == 0 else 2)
        if index == 0 and levels is not None:
            convolution = _of_levels(convolution, levels)
        blocks = tuple(_block(weights, f"{at}.layers.{number}") for number in range(depth))
        stages.append(Stage(weights.norm(norm), convolution, blocks))
    return ConvNextTower(config, levels, tuple(stages), weights.norm("layer_norm"), PoolerWeights())


def _block(weights: _Weights, at: str) -> Block:
    gamma = weights[f"{at}.gamma"]
    channels = len(gamma)
    return Block(
        depthwise=weights.convolution(f"{at}.depthwise_conv", stride=1, padding=3, groups=channels),
        norm=weights.norm(f"{at}.layer_norm"),
        up=weights.linear(f"{at}.pointwise_conv1"),
        down=weights.linear(f"{at}.pointwise_conv2", gamma),
    )


def _of_levels(stem: Convolution, levels: Levels) -> Convolution:
    """The stem for uint8 levels over 256; it has no padding, so the offset is a bias."""
    kernel = stem.kernel().astype(np.float64)
    scale = np.array(levels.scale).reshape(1, -1, 1, 1) * 256
    offset = np.einsum("oiyx,i->o", kernel, np.array(levels.offset))
    scaled = (kernel * scale).astype(np.float32)
    return replace(stem, kernel=lambda: scaled, bias=(stem.bias + offset).astype(np.float32))


class _Weights:
    def __init__(self, state: Mapping[str, Array]) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Array:
        try:
            return self._state[name]
        except KeyError as error:
            raise CheckpointError(
                f"The checkpoint has no weight {name!r}. It is damaged, or its config.json "
                f"belongs to another checkpoint: download it again."
            ) from error

    def norm(self, name: str) -> Norm:
        return Norm(self[f"{name}.weight"], self[f"{name}.bias"])

    def convolution(
        self, name: str, *, stride: int, padding: int = 0, groups: int = 1
    ) -> Convolution:
        kernel = self[f"{name}.weight"]
        out, channels, height, width = kernel.shape
        shape = (out, channels, height, width)
        return Convolution(lambda: kernel, shape, self[f"{name}.bias"], stride, padding, groups)

    def linear(self, name: str, scale: Array | float = 1.0) -> Linear:
        weight, factor = self[f"{name}.weight"], np.asarray(scale, np.float64)

        def make() -> Array:
            return np.ascontiguousarray((weight.T.astype(np.float64) * factor).astype(np.float32))

        bias = (self[f"{name}.bias"].astype(np.float64) * factor).astype(np.float32)
        return Linear(make, (weight.shape[1], weight.shape[0]), bias if bias.any() else None)


def smooth(
    tower: ConvNextTower, statistics: Mapping[str, Statistics]
) -> tuple[ConvNextTower, dict[str, Statistics]]:
    """Even out the channels of what enters each MLP; see `vistower_export.quantize.smooth`."""
    smoothed = dict(statistics)
    stages = []
    for index, stage in enumerate(tower.stages):
        blocks = []
        for number, block in enumerate(stage.blocks):
            site = f"stages.{index}.{number}.norm.norm"
            factor = smoothing_factors(smoothed[site], [block.up])
            smoothed[site] = smoothed[site].divided(factor)
            norm, up = divided(block.norm, factor), scaled_rows(block.up, factor)
            blocks.append(replace(block, norm=norm, up=up))
        stages.append(replace(stage, blocks=tuple(blocks)))
    return replace(tower, stages=tuple(stages)), smoothed


def write(
    writer: Writer, dialect: Operators, pixel_values: ir.Value, tower: ConvNextTower
) -> ir.Value:
    """The tokens (B, 1 + N, D), in the graph's own float type, of pixel values or uint8 levels."""
    config, eps = tower.config, tower.config.layer_norm_eps
    value = pixel_values
    if tower.levels is not None:
        share = writer.constant("levels.share", np.array(LEVELS.scale, np.float32), narrow=False)
        levels = levels_of(writer, pixel_values, tower.levels)
        value = writer.op("Mul", "levels.shares", writer.to_float32(levels), share)
    height, width = config.image_size
    for index, stage in enumerate(tower.stages):
        at = f"stages.{index}"
        channels = stage.shrink.shape[0]
        if index:
            value = _normed(writer, at, value, stage.norm, eps, (height, width))
        # Graphs with and without levels share a weight file, by name.
        folded = tower.levels is not None and index == 0
        value = _convolved(writer, f"{at}.{'levels' if folded else 'shrink'}", value, stage.shrink)
        height, width = height // stage.shrink.stride, width // stage.shrink.stride
        if not index:
            value = _normed(writer, at, value, stage.norm, eps, (height, width))
        for number, block in enumerate(stage.blocks):
            name = f"{at}.{number}"
            inner = _convolved(writer, f"{name}.depthwise", value, block.depthwise)
            inner = writer.narrowed(_rows(writer, f"{name}.in", inner))
            inner = writer.norm(f"{name}.norm", inner, block.norm, eps)
            inner = dialect.activation(f"{name}.up", inner, block.up)
            inner = writer.widened(writer.linear(f"{name}.down", inner, block.down))
            inner = _image(writer, f"{name}.out", inner, channels, (height, width))
            value = writer.op("Add", f"{name}.residual", value, inner)
    rows = writer.op("Reshape", "tokens.flat", value, _shape(writer, (0, config.hidden_size, -1)))
    axis = writer.constant("tokens.axis", np.array([2], np.int64))
    mean = writer.op("ReduceMean", "tokens.mean", rows, axis, keepdims=1)
    tokens = writer.op("Concat", "tokens.columns", mean, rows, axis=2)
    tokens = writer.op("Transpose", "tokens", tokens, perm=(0, 2, 1))
    return writer.norm("norm", writer.narrowed(tokens), tower.norm, eps)


def _convolved(writer: Writer, name: str, value: ir.Value, layer: Convolution) -> ir.Value:
    return writer.op(
        "Conv",
        name,
        value,
        writer.float32(f"{name}.weight", layer.kernel, layer.shape),
        writer.constant(f"{name}.bias", layer.bias, narrow=False),
        kernel_shape=layer.shape[2:],
        strides=(layer.stride, layer.stride),
        pads=(layer.padding,) * 4,
        group=layer.groups,
    )


def _normed(
    writer: Writer, at: str, value: ir.Value, norm: Norm, eps: float, size: tuple[int, int]
) -> ir.Value:
    """LayerNorm over the channels of (B, C, H, W), which stays in float32."""
    rows = writer.narrowed(_rows(writer, f"{at}.in", value))
    rows = writer.widened(writer.norm(at, rows, norm, eps))
    return _image(writer, f"{at}.out", rows, len(norm.scale), size)


def _rows(writer: Writer, name: str, value: ir.Value) -> ir.Value:
    """(B, C, H, W) → (B, H W, C)."""
    flat = writer.op("Reshape", f"{name}.flat", value, _shape(writer, (0, 0, -1)))
    return writer.op("Transpose", f"{name}.rows", flat, perm=(0, 2, 1))


def _image(
    writer: Writer, name: str, rows: ir.Value, channels: int, size: tuple[int, int]
) -> ir.Value:
    """(B, H W, C) → (B, C, H, W)."""
    columns = writer.op("Transpose", f"{name}.columns", rows, perm=(0, 2, 1))
    return writer.op("Reshape", f"{name}.image", columns, _shape(writer, (0, channels, *size)))


def _shape(writer: Writer, shape: tuple[int, ...]) -> ir.Value:
    name = "shape." + "x".join(map(str, shape))
    return writer.constant(name, np.array(shape, np.int64))
