"""int8 for the CPU: what is quantized how, from the statistics of calibration pictures.

Activations are quantized to uint8, one scale and zero point a tensor, fixed at export, so that a
picture's embedding does not depend on the others of its batch. Weights are signed int8 with one
scale a column. Three steps keep the loss small, all of them free at run time:

- *smoothing* (SmoothQuant, Xiao et al. 2022): channels of an activation that are much larger than
  the others are scaled down, and the rows of the weights that meet them up by the same factor.
  The factor goes into the LayerNorm before, or into the columns of V before the output
  projection: in exact arithmetic the tower computes the same function;
- the scale of a weight column is the one with the least squared error of the product over the
  calibration pictures, not the one that just holds the largest weight;
- the mean error of a product over the calibration pictures is taken off its bias.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vistower_export.weights import LEVELS_SITE, Layer, Linear, Norm, Product, Tower

Array = npt.NDArray[np.float32]

SMOOTHING = 0.5
"""How much of the activations' spread moves to the weights: 0 is none, 1 is all."""

_CLIPS = np.linspace(1.0, 0.7, 7)
"""Shares of a column's largest weight that are tried as the end of its scale."""

_LEVELS = 127
"""Signed 8 bit without -128, symmetric."""


@dataclass(frozen=True)
class Statistics:
    """What calibration pictures say of one activation, by channel (K,): smallest and largest
    value, mean and variance."""

    low: Array
    high: Array
    mean: Array
    variance: Array

    def divided(self, factor: Array) -> Statistics:
        """The statistics of the activation over ``factor`` (K,), which is positive."""
        return Statistics(
            self.low / factor, self.high / factor, self.mean / factor, self.variance / factor**2
        )

    def shifted(self, by: Array) -> Statistics:
        """The statistics of the activation plus ``by`` (K,)."""
        return replace(self, low=self.low + by, high=self.high + by, mean=self.mean + by)


@dataclass(frozen=True)
class Activation:
    """``x ≈ (q - zero_point) * scale`` with q in 0..255."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class QuantizedLinear:
    """``x @ (weight * scale) + bias``: int8 (K, N), scale (N,), bias (N,)."""

    weight: npt.NDArray[np.int8]
    scale: Array
    bias: Array

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self.weight.shape[0], self.weight.shape[1]


@dataclass(frozen=True)
class Quantization:
    """The int8 products of a graph by name, and the activations that enter them by value name."""

    activations: Mapping[str, Activation]
    linears: Mapping[str, QuantizedLinear]

    def without(self, names: Collection[str]) -> Quantization:
        """The same with some products left in float32."""
        linears = {name: q for name, q in self.linears.items() if name not in names}
        return replace(self, linears=linears)


FLOAT_PRODUCTS = frozenset({"patches"})
"""Products that stay in float32: pixels that were resized as floats have no LayerNorm that could
even out their channels, the error would reach every layer, and the product is 3 % of a tower's
work. Pixels that are uint8 levels lose nothing, and their product has another name."""

HEAD = "head."
"""How the names of a head's products begin, behind the last layer: one row a picture or a few
columns, no work worth an error."""


LEVELS = Activation(1 / 256, 0)
"""uint8 levels, as `vistower_export.weights.Levels` wants them."""


def quantize(products: Mapping[str, Product], statistics: Mapping[str, Statistics]) -> Quantization:
    """The int8 form of a graph's products.

    Args:
        products: by name, as the graph's writer lists them.
        statistics: of the values that enter them, by value name.
    """
    chosen = {
        name: product
        for name, product in products.items()
        if name not in FLOAT_PRODUCTS and not name.startswith(HEAD)
    }
    return Quantization(
        activations={
            site: quantize_activation(statistics[site])
            for site in {product.site: None for product in chosen.values()}
            if site != LEVELS_SITE
        },
        linears={
            name: quantize_linear(product.linear, statistics[product.site])
            for name, product in chosen.items()
        },
    )


def relative_noise(
    products: Mapping[str, Product],
    statistics: Mapping[str, Statistics],
    quantization: Quantization,
) -> dict[str, float]:
    """How much of each product is rounding: its variance over that of the product.

    Channels and roundings are taken as independent; an activation's rounding has the variance of
    an even spread over one step.
    """
    noise = {}
    for name, quantized in quantization.linears.items():
        product = products[name]
        weight = product.linear.weight()
        error = weight - quantized.weight * quantized.scale
        activation = quantization.activations.get(product.site)
        step = 0.0 if activation is None else activation.scale
        variance = statistics[product.site].variance[:, None]
        rounding = step**2 / 12 * float((weight**2).sum()) + float((variance * error**2).sum())
        noise[name] = rounding / max(float((variance * weight**2).sum()), 1e-30)
    return noise


def quantize_activation(statistics: Statistics) -> Activation:
    """One scale and zero point for a tensor; zero is always exact, as ONNX asks."""
    low = min(0.0, float(statistics.low.min()))
    high = max(0.0, float(statistics.high.max()))
    scale = float(np.float32((high - low) / 255)) or 1.0
    return Activation(scale, round(-low / scale))


def quantize_linear(linear: Linear, statistics: Statistics) -> QuantizedLinear:
    """int8 weights of least squared error for an input with these statistics."""
    weight = linear.weight()
    largest = np.abs(weight).max(axis=0)
    largest[largest == 0] = 1.0
    # The bias takes the mean of the error off, so only the spread of the input counts.
    energy = statistics.variance[:, None]
    best = np.full(weight.shape[1], np.inf)
    scale = np.empty(weight.shape[1], np.float32)
    for clip in _CLIPS:
        tried = (largest * np.float32(clip / _LEVELS)).astype(np.float32)
        error = (energy * (weight - _rounded(weight, tried) * tried) ** 2).sum(axis=0)
        better = error < best
        best[better], scale[better] = error[better], tried[better]
    levels = _rounded(weight, scale)
    drift = statistics.mean @ (weight - levels * scale)
    bias = drift if linear.bias is None else linear.bias + drift
    return QuantizedLinear(levels.astype(np.int8), scale, bias.astype(np.float32))


def _rounded(weight: Array, scale: Array) -> Array:
    levels: Array = np.clip(np.rint(weight / scale), -_LEVELS, _LEVELS)
    return levels


def smoothing_factors(
    statistics: Statistics, linears: Iterable[Linear], strength: float = SMOOTHING
) -> Array:
    """What to divide an activation's channels by: (K,), positive, of geometric mean 1."""
    activation = np.maximum(np.abs(statistics.low), np.abs(statistics.high)).astype(np.float64)
    weight = np.max([np.abs(linear.weight()).max(axis=1) for linear in linears], axis=0)
    known = (activation > 0) & (weight > 0)
    factor = np.ones_like(activation)
    factor[known] = activation[known] ** strength / weight[known] ** (1 - strength)
    factor[known] /= np.exp(np.log(factor[known]).mean()) if known.any() else 1.0
    # A channel that hardly ever speaks must not decide the scale of a weight column.
    return np.clip(factor, 1 / 64, 64).astype(np.float32)


def smooth(
    tower: Tower, statistics: Mapping[str, Statistics]
) -> tuple[Tower, dict[str, Statistics]]:
    """Even out the channels of every activation whose scale can move into what comes before it.

    Args:
        tower: the tower whose ``ort`` graph gave the statistics.
        statistics: by value name.

    Returns:
        A tower of the same function, and the statistics of its activations.
    """
    smoothed = dict(statistics)
    layers = []
    for index, layer in enumerate(tower.layers):
        layers.append(_smooth_layer(f"layers.{index}", layer, smoothed))
    return replace(tower, layers=tuple(layers)), smoothed


def _smooth_layer(at: str, layer: Layer, statistics: dict[str, Statistics]) -> Layer:
    def factors(site: str, *linears: Linear) -> Array:
        factor = smoothing_factors(statistics[site], linears)
        statistics[site] = statistics[site].divided(factor)
        return factor

    attention_in = factors(f"{at}.norm1.norm", layer.q, layer.k, layer.v)
    attention_out = factors(f"{at}.attention", layer.o)
    wide = [layer.up] if layer.gate is None else [layer.up, layer.gate]
    mlp_in = factors(f"{at}.norm2.norm", *wide)
    v = _divided_columns(scaled_rows(layer.v, attention_in), attention_out)
    gate, up, down = layer.gate, scaled_rows(layer.up, mlp_in), layer.down
    if gate is not None:
        gate = scaled_rows(gate, mlp_in)
        mlp_out = factors(f"{at}.gated", layer.down)
        up, down = _divided_columns(up, mlp_out), scaled_rows(down, mlp_out)
    return replace(
        layer,
        norm1=divided(layer.norm1, attention_in),
        q=scaled_rows(layer.q, attention_in),
        k=scaled_rows(layer.k, attention_in),
        v=v,
        o=scaled_rows(layer.o, attention_out),
        norm2=divided(layer.norm2, mlp_in),
        gate=gate,
        up=up,
        down=down,
    )


def divided(norm: Norm, factor: Array) -> Norm:
    """A norm whose results are over ``factor`` (K,)."""
    return Norm(norm.scale / factor, norm.bias / factor)


def scaled_rows(linear: Linear, factor: Array) -> Linear:
    """A projection that takes its input over ``factor`` (K,)."""
    return replace(linear, weight=lambda: linear.weight() * factor[:, None])


def _divided_columns(linear: Linear, factor: Array) -> Linear:
    bias = None if linear.bias is None else linear.bias / factor
    return replace(linear, weight=lambda: linear.weight() / factor, bias=bias)
