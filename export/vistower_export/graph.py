"""Writes a tower's ONNX graph, node by node, in one of two dialects.

``portable`` uses standard operators only (opset 20), for every ONNX runtime. ``ort`` uses ONNX
Runtime's fused operators (domain ``com.microsoft``): attention, rotary embedding and activations
are one node each. Both come from the same weights and the same code; only `Operators` differs.

Writing the graph, instead of tracing the torch module and fusing afterwards, gives the fewest
nodes, needs one copy of the weights, and does not depend on the exporter of a torch release.
That it computes the same thing is not assumed: the parity gate compares it with torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from vistower.families.record import IMAGE_EMBEDS, LAST_HIDDEN_STATE, POOLER_OUTPUT
from vistower_export.forms import HALVES, Dialect, GraphForm
from vistower_export.quantize import HEAD, LEVELS, Quantization
from vistower_export.towers import Activation, TowerConfig, exporter
from vistower_export.weights import (
    Arranged,
    AttentionPooling,
    Levels,
    Linear,
    Norm,
    PoolerWeights,
    Product,
    Tower,
)
from vistower_export.writer import MICROSOFT, Writer

OPSET = 20
"""First opset with Gelu as one operator."""

IR_VERSION = 10
"""The IR version of opset 20; newer ones lock out older runtimes for nothing."""

QUICK_GELU_ALPHA = 1.702
"""CLIP's ``x * sigmoid(1.702 x)``; SiLU is the same operator with 1."""


class Operators(ABC):
    """How one family of operators spells attention and the activations."""

    def __init__(self, writer: Writer, tower: Arranged, form: GraphForm) -> None:
        """Write with a writer, in a form."""
        self.writer = writer
        self.form = form
        self.kind: Activation = tower.config.activation
        self.eps: float = tower.config.layer_norm_eps

    @abstractmethod
    def attention(self, name: str, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """Rotary embedding if the tower has one, then attention; (B, T, D) in and out."""

    @abstractmethod
    def activation(self, name: str, value: ir.Value, linear: Linear) -> ir.Value:
        """The projection ``linear`` of ``value``, then the tower's activation."""

    @abstractmethod
    def residual(
        self,
        name: str,
        value: ir.Value,
        inner: ir.Value,
        linear: Linear,
        norm_name: str,
        norm: Norm,
    ) -> tuple[ir.Value, ir.Value]:
        """``value`` plus the projection ``linear`` of ``inner``: the sum, and the sum normed."""


class _Portable(Operators):
    def __init__(self, writer: Writer, tower: Arranged, form: GraphForm) -> None:
        super().__init__(writer, tower, form)
        self._alpha = (
            writer.constant("quick_gelu.alpha", np.array(QUICK_GELU_ALPHA, np.float32))
            if self.kind == "quick_gelu"
            else None
        )
        self._rotary: tuple[ir.Value, ir.Value] | None = None
        if not isinstance(tower, Tower):
            return
        config = tower.config
        self._heads = writer.constant(
            "shape.heads", np.array([0, 0, config.num_attention_heads, config.head_dim], np.int64)
        )
        self._merged = writer.constant("shape.merged", np.array([0, 0, config.hidden_size]))
        if tower.rotary is not None:
            cos, sin = tower.rotary
            # rotate_half negates the second half; the sign lives in the table instead of a node.
            self._rotary = (
                writer.constant("rotary.cos", np.concatenate([cos, cos], axis=1)),
                writer.constant("rotary.sin", np.concatenate([-sin, sin], axis=1)),
            )

    def _split_heads(self, name: str, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        heads = self.writer.op("Reshape", f"{name}.heads", value, self._heads)
        return self.writer.op("Transpose", f"{name}.transpose", heads, perm=perm)

    def _rotate(self, name: str, value: ir.Value) -> ir.Value:
        if self._rotary is None:
            return value
        writer = self.writer
        cos, sin = self._rotary
        first, second = writer.split(f"{name}.split", value)
        swapped = writer.op("Concat", f"{name}.swap", second, first, axis=-1)
        return writer.op(
            "Add",
            f"{name}.rotated",
            writer.op("Mul", f"{name}.cos", value, cos),
            writer.op("Mul", f"{name}.sin", swapped, sin),
        )

    def attention(self, name: str, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        writer = self.writer
        q = self._rotate(f"{name}.q", self._split_heads(f"{name}.q", q, (0, 2, 1, 3)))
        if self._rotary is None:
            k_transposed = self._split_heads(f"{name}.k", k, (0, 2, 3, 1))
        else:
            k = self._rotate(f"{name}.k", self._split_heads(f"{name}.k", k, (0, 2, 1, 3)))
            k_transposed = writer.op("Transpose", f"{name}.k.columns", k, perm=(0, 1, 3, 2))
        v = self._split_heads(f"{name}.v", v, (0, 2, 1, 3))
        scores = writer.op("MatMul", f"{name}.scores", q, k_transposed)
        weights = writer.op("Softmax", f"{name}.softmax", scores, axis=-1)
        context = writer.op("MatMul", f"{name}.context", weights, v)
        context = writer.op("Transpose", f"{name}.context.transpose", context, perm=(0, 2, 1, 3))
        return writer.op("Reshape", f"{name}.merged", context, self._merged)

    def activation(self, name: str, value: ir.Value, linear: Linear) -> ir.Value:
        writer = self.writer
        value = writer.linear(name, value, linear)
        if self.kind in ("gelu", "gelu_tanh"):
            approximate = "tanh" if self.kind == "gelu_tanh" else "none"
            return writer.op("Gelu", f"{name}.gelu", value, approximate=approximate)
        gate = value
        if self._alpha is not None:
            gate = writer.op("Mul", f"{name}.alpha", value, self._alpha)
        gate = writer.op("Sigmoid", f"{name}.sigmoid", gate)
        return writer.op("Mul", f"{name}.{self.kind}", value, gate)

    def residual(
        self,
        name: str,
        value: ir.Value,
        inner: ir.Value,
        linear: Linear,
        norm_name: str,
        norm: Norm,
    ) -> tuple[ir.Value, ir.Value]:
        writer = self.writer
        out = writer.linear(name, inner, linear)
        total = writer.op("Add", f"{name}.residual", value, out)
        return total, writer.norm(norm_name, total, norm, self.eps)


class _Ort(Operators):
    def __init__(self, writer: Writer, tower: Arranged, form: GraphForm) -> None:
        super().__init__(writer, tower, form)
        self._rotary: tuple[ir.Value, ir.Value, ir.Value] | None = None
        if not isinstance(tower, Tower):
            return
        self._num_heads = tower.config.num_attention_heads
        if tower.rotary is not None:
            cos, sin = tower.rotary
            self._rotary = (
                writer.constant("rotary.offset", np.zeros(1, np.int64)),
                writer.constant("rotary.cos", cos),
                writer.constant("rotary.sin", sin),
            )

    def _fused(self, op_type: str, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.writer.op(op_type, name, *inputs, domain=MICROSOFT, **attributes)

    def attention(self, name: str, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        heads = self._num_heads
        if self._rotary is not None:
            q, k = (
                self._fused(
                    "RotaryEmbedding",
                    f"{name}.{which}.rotary",
                    value,
                    *self._rotary,
                    num_heads=heads,
                    interleaved=0,
                )
                for which, value in (("q", q), ("k", k))
            )
        # The softmax scale is in the query weights, hence scale=1.
        return self._fused(
            "MultiHeadAttention", f"{name}.attention", q, k, v, num_heads=heads, scale=1.0
        )

    def activation(self, name: str, value: ir.Value, linear: Linear) -> ir.Value:
        writer = self.writer
        if self.kind == "gelu":
            if linear.bias is None or writer.quantized(name) is not None:
                # An int8 product adds its bias for nothing. CUDA has the standard operator in no
                # half precision, the CPU has it faster than the other.
                value = writer.linear(name, value, linear)
                domain = MICROSOFT if self.form.precision in HALVES else ""
                return writer.op("Gelu", f"{name}.gelu", value, domain=domain)
            value = writer.product(name, value, linear)
            bias = writer.constant(f"{name}.bias", linear.bias)
            return self._fused("BiasGelu", f"{name}.gelu", value, bias)
        if self.kind == "gelu_tanh":
            return self._fused("FastGelu", f"{name}.gelu", writer.linear(name, value, linear))
        alpha = QUICK_GELU_ALPHA if self.kind == "quick_gelu" else 1.0
        value = writer.linear(name, value, linear)
        return self._fused("QuickGelu", f"{name}.{self.kind}", value, alpha=alpha)

    def residual(
        self,
        name: str,
        value: ir.Value,
        inner: ir.Value,
        linear: Linear,
        norm_name: str,
        norm: Norm,
    ) -> tuple[ir.Value, ir.Value]:
        writer = self.writer
        if not self.form.skip_norm:
            out = writer.linear(name, inner, linear)
            total = writer.op("Add", f"{name}.residual", value, out)
            return total, writer.norm(norm_name, total, norm, self.eps)
        if linear.bias is None or writer.quantized(name) is not None:
            out, bias = writer.linear(name, inner, linear), None
        else:
            out = writer.product(name, inner, linear)
            bias = writer.constant(f"{name}.bias", linear.bias)
        return writer.skip_norm(norm_name, value, out, bias, norm, self.eps)


_DIALECTS: dict[Dialect, type[Operators]] = {"portable": _Portable, "ort": _Ort}


def _layers(writer: Writer, dialect: Operators, value: ir.Value, tower: Tower) -> ir.Value:
    """All layers and the norm behind them; every residual sum goes with the norm that reads it."""
    normed = writer.norm("layers.0.norm1", value, tower.layers[0].norm1, dialect.eps)
    last = len(tower.layers) - 1
    for index, layer in enumerate(tower.layers):
        name = f"layers.{index}"
        context = dialect.attention(
            name,
            writer.linear(f"{name}.q", normed, layer.q),
            writer.linear(f"{name}.k", normed, layer.k),
            writer.linear(f"{name}.v", normed, layer.v),
        )
        sum_name = f"{name}.norm2"
        value, normed = dialect.residual(
            f"{name}.o", value, context, layer.o, sum_name, layer.norm2
        )
        if layer.gate is None:
            inner = dialect.activation(f"{name}.up", normed, layer.up)
        else:
            inner = writer.op(
                "Mul",
                f"{name}.gated",
                dialect.activation(f"{name}.gate", normed, layer.gate),
                writer.linear(f"{name}.up", normed, layer.up),
            )
        norm_name = "norm_after" if index == last else f"layers.{index + 1}.norm1"
        norm = tower.norm_after if index == last else tower.layers[index + 1].norm1
        if norm is None:
            out = writer.linear(f"{name}.down", inner, layer.down)
            return writer.op("Add", f"{name}.down.residual", value, out)
        value, normed = dialect.residual(f"{name}.down", value, inner, layer.down, norm_name, norm)
    return normed


def write_vit(writer: Writer, dialect: Operators, pixel_values: ir.Value, tower: Tower) -> ir.Value:
    """The tokens (B, T, D) of a vision transformer, in the graph's own float type."""
    value = _embed(writer, pixel_values, tower)
    if tower.norm_before is not None:
        value = writer.norm("norm_before", value, tower.norm_before, dialect.eps)
    return _layers(writer, dialect, value, tower)


def _embed(writer: Writer, pixel_values: ir.Value, tower: Tower) -> ir.Value:
    """Patches as rows (C, p, p), one product, prefix rows in front, then the constant rows added.

    The prefix rows come from Pad, not from an expanded constant: no node needs the batch size.
    CUDA's Pad knows no bfloat16, so in half precision the sum is float32.
    """
    config = tower.config
    value = _patch_product(writer, pixel_values, tower)
    pads = np.array([0, config.num_prefix_tokens, 0, 0, 0, 0], np.int64)
    value = writer.op("Pad", "tokens.pad", value, writer.constant("tokens.pads", pads))
    tokens = writer.constant("tokens", tower.tokens, narrow=False)
    return writer.narrowed(writer.op("Add", "tokens.add", value, tokens))


def _patch_product(writer: Writer, pixel_values: ir.Value, tower: Tower) -> ir.Value:
    """The patch tokens (B, N, D) in float32, of pixel values or of uint8 levels."""
    if tower.levels is None:
        rows = _patch_rows(writer, "patches", pixel_values, tower.config)
        out = writer.linear("patches", writer.narrowed(rows), tower.patch)
        return writer.widened(out)
    pixel_values = levels_of(writer, pixel_values, tower.levels)
    rows = _patch_rows(writer, "levels", pixel_values, tower.config)
    if writer.quantized("patch_levels") is not None:
        writer.prequantized(rows, LEVELS)
    else:
        share = writer.constant("levels.share", np.array(LEVELS.scale, np.float32))
        rows = writer.op("Mul", "levels.shares", writer.to_float(rows), share)
    return writer.widened(writer.linear("patch_levels", rows, tower.patch))


def levels_of(writer: Writer, pixel_values: ir.Value, levels: Levels) -> ir.Value:
    """The uint8 levels that float32 pixel values were made of, or are already."""
    if pixel_values.dtype == ir.DataType.UINT8:
        return pixel_values
    shape = (1, 3, 1, 1)
    scale, offset = (np.array(x).reshape(shape) for x in (levels.scale, levels.offset))
    inverse = writer.constant("levels.inverse", (1 / scale).astype(np.float32))
    zero = writer.constant("levels.origin", (-offset / scale).astype(np.float32))
    value = writer.op("Mul", "levels.scaled", pixel_values, inverse)
    value = writer.op("Add", "levels.shifted", value, zero)
    one = writer.constant("levels.one", np.array(1, np.float32))
    none = writer.constant("levels.none", np.array(0, np.uint8))
    return writer.op("QuantizeLinear", "levels", value, one, none)


def _patch_rows(writer: Writer, name: str, pixel_values: ir.Value, config: TowerConfig) -> ir.Value:
    """(B, 3, H, W) as rows of flattened (C, p, p) patches, row-major from the top left."""
    rows, columns = config.grid
    patch = config.patch_size
    if (rows * patch, columns * patch) != config.image_size:
        ends = np.array([rows * patch, columns * patch], np.int64)
        pixel_values = writer.op(
            "Slice",
            f"{name}.whole",
            pixel_values,
            writer.constant("patches.starts", np.zeros(2, np.int64)),
            writer.constant("patches.ends", ends),
            writer.constant("patches.axes", np.array([2, 3], np.int64)),
        )
    split = np.array([0, 3, rows, patch, columns, patch], np.int64)
    flat = np.array([0, rows * columns, 3 * patch * patch], np.int64)
    value = writer.op("Reshape", f"{name}.split", pixel_values, writer.constant("patches.s", split))
    value = writer.op("Transpose", f"{name}.transpose", value, perm=(0, 2, 4, 1, 3, 5))
    return writer.op("Reshape", f"{name}.flat", value, writer.constant("patches.f", flat))


@dataclass(frozen=True)
class WrittenGraph:
    """A model whose matrices are still lazy, and its products by name."""

    model: ir.Model
    products: Mapping[str, Product]


def write_graph(
    tower: Arranged,
    form: GraphForm,
    *,
    quantization: Quantization | None = None,
    observe: bool = False,
    emulate: bool = False,
) -> WrittenGraph:
    """Write the graph of a tower; matrices stay lazy until the model is saved.

    Input ``pixel_values`` (batch, 3, H, W), float32 or for some forms uint8. Outputs in float32 as
    the Hugging Face class returns them: ``last_hidden_state`` (batch, T, D) and, where the tower
    has them, ``pooler_output`` (batch, D) and ``image_embeds`` (batch, P). The batch is dynamic, H
    and W are fixed.

    Args:
        tower: the weights; for a form that takes uint8, with levels folded in.
        form: the operators to use.
        quantization: the products to write in int8, for an int8 form.
        observe: whether every value that enters a product is an output too, for calibration.
        emulate: of a half precision form, write a graph that runs everywhere: in float32, with
            every weight and every operator's result rounded to that precision.
    """
    config = tower.config
    height, width = config.image_size
    pixel_values = ir.Value(
        name="pixel_values",
        shape=ir.Shape(["batch", 3, height, width]),
        type=ir.TensorType(ir.DataType.UINT8 if form.pixels == "uint8" else ir.DataType.FLOAT),
    )
    writer = Writer(form.precision, quantization, emulate=emulate)
    dialect = _DIALECTS[form.dialect](writer, tower, form)
    value = exporter(config.family).write(writer, dialect, pixel_values, tower)
    outputs = list(_outputs(writer, dialect, value, tower))
    if observe:
        values = {str(v.name): v for node in writer.nodes for v in node.outputs}
        widths = {
            product.site: product.linear.shape[0]
            for name, product in writer.products.items()
            if not name.startswith(HEAD)
        }
        outputs += [
            _output(values[site], site, ["batch", None, width]) for site, width in widths.items()
        ]
    opset_imports = {"": OPSET}
    if form.dialect == "ort":
        opset_imports[MICROSOFT] = 1
    graph = ir.Graph(
        [pixel_values],
        outputs,
        nodes=writer.nodes,
        initializers=writer.initializers,
        opset_imports=opset_imports,
        name=config.family.model_type,
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="vistower")
    return WrittenGraph(model, writer.products)


def _outputs(
    writer: Writer, dialect: Operators, value: ir.Value, tower: Arranged
) -> Iterator[ir.Value]:
    """Every output, made of the last tokens (B, T, D) in the graph's own float type."""
    hidden = tower.config.hidden_size
    tokens = writer.widened(value)
    yield _output(tokens, LAST_HIDDEN_STATE, ["batch", tower.config.layout.num_tokens, hidden])
    if tower.pooler is None:
        return
    pooled = pool(writer, dialect, value, tower.pooler)
    width = hidden if tower.pooler.dense is None else tower.pooler.dense.shape[1]
    yield _output(writer.widened(pooled), POOLER_OUTPUT, ["batch", width])
    if tower.projection is not None:
        projected = writer.linear("head.projection", pooled, tower.projection)
        width = tower.projection.shape[1]
        yield _output(writer.widened(projected), IMAGE_EMBEDS, ["batch", width])


def pool(writer: Writer, dialect: Operators, value: ir.Value, pooler: PoolerWeights) -> ir.Value:
    """``pooler_output`` (B, D) of the last tokens (B, T, D)."""
    if pooler.attention is not None:
        return _attention_pool(writer, dialect, value, pooler.attention)
    first = writer.constant("shape.first", np.array(0, np.int64))
    pooled = writer.op("Gather", "head.first", value, first, axis=1)
    if pooler.norm is not None:
        return writer.norm("head", pooled, pooler.norm, dialect.eps)
    if pooler.dense is not None:
        return writer.op("Tanh", "head.tanh", writer.linear("head.dense", pooled, pooler.dense))
    return pooled


def _attention_pool(
    writer: Writer, dialect: Operators, value: ir.Value, head: AttentionPooling
) -> ir.Value:
    heads, wide, width = head.v_shape
    scores = writer.linear("head.scores", value, head.scores)
    scores = writer.op("Transpose", "head.scores.rows", scores, perm=(0, 2, 1))
    shares = writer.op("Softmax", "head.softmax", scores, axis=-1)
    seen = writer.op("MatMul", "head.seen", shares, value)
    rows = writer.constant("shape.head_rows", np.array([0, heads, 1, wide], np.int64))
    seen = writer.op("Reshape", "head.seen.rows", seen, rows)
    context = writer.op(
        "MatMul", "head.v.matmul", seen, writer.weight("head.v.weight", head.v, head.v_shape)
    )
    merged = writer.constant("shape.head_merged", np.array([0, heads * width], np.int64))
    context = writer.op("Reshape", "head.merged", context, merged)
    total = writer.linear("head.o", context, head.o)
    normed = writer.norm("head", total, head.norm, dialect.eps)
    inner = writer.linear("head.down", dialect.activation("head.up", normed, head.up), head.down)
    return writer.op("Add", "head.residual", total, inner)


def _output(value: ir.Value, name: str, shape: Sequence[str | int | None]) -> ir.Value:
    value.name = name
    value.shape = ir.Shape(shape)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    return value
