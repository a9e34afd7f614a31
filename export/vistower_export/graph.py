"""Writes a tower's ONNX graph, node by node, in one of two dialects.

``portable`` uses standard operators only (opset 20), for every ONNX runtime. ``ort`` uses ONNX
Runtime's fused operators (domain ``com.microsoft``): attention, rotary embedding and activations
are one node each. Both come from the same weights and the same code; only `_Dialect` differs.

Writing the graph, instead of tracing the torch module and fusing afterwards, gives the fewest
nodes, needs one copy of the weights, and does not depend on the exporter of a torch release.
That it computes the same thing is not assumed: the parity gate compares it with torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from vistower_export.towers import TowerConfig
from vistower_export.weights import Layer, Linear, Norm, Tower

GraphKind = Literal["portable", "ort"]

OPSET = 20
"""First opset with Gelu as one operator."""

IR_VERSION = 10
"""The IR version of opset 20; newer ones lock out older runtimes for nothing."""

QUICK_GELU_ALPHA = 1.702
"""CLIP's ``x * sigmoid(1.702 x)``; SiLU is the same operator with 1."""


class _Writer:
    """A tape of nodes with named values and lazily made initializers."""

    def __init__(self) -> None:
        self._tape = Tape()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._tape.nodes

    @property
    def initializers(self) -> Sequence[ir.Value]:
        return self._tape.initializers

    def op(
        self, op_type: str, name: str, *inputs: ir.Value, domain: str = "", **attributes: Any
    ) -> ir.Value:
        output = self._tape.op(op_type, list(inputs), attributes or None, domain=domain, name=name)
        output.name = name
        return output

    def split(self, name: str, value: ir.Value) -> Sequence[ir.Value]:
        """Two halves along the last axis."""
        outputs = self._tape.op_multi_out(
            "Split", [value], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=name
        )
        for index, output in enumerate(outputs):
            output.name = f"{name}.{index}"
        return outputs

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        return self._tape.initializer(ir.tensor(array, name=name), name=name)

    def weight(self, name: str, linear: Linear) -> ir.Value:
        tensor = ir.LazyTensor(
            lambda: ir.tensor(linear.weight(), name=name),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(linear.shape),
            name=name,
        )
        return self._tape.initializer(tensor, name=name)

    def product(self, name: str, value: ir.Value, linear: Linear) -> ir.Value:
        return self.op("MatMul", f"{name}.matmul", value, self.weight(f"{name}.weight", linear))

    def linear(self, name: str, value: ir.Value, linear: Linear) -> ir.Value:
        out = self.product(name, value, linear)
        if linear.bias is None:
            return out
        return self.op("Add", f"{name}.add", out, self.constant(f"{name}.bias", linear.bias))

    def norm(self, name: str, value: ir.Value, norm: Norm, eps: float) -> ir.Value:
        scale = self.constant(f"{name}.weight", norm.scale)
        bias = self.constant(f"{name}.bias", norm.bias)
        return self.op(
            "LayerNormalization", f"{name}.norm", value, scale, bias, axis=-1, epsilon=eps
        )


class _Dialect(ABC):
    """How one family of operators spells attention and the activations."""

    def __init__(self, writer: _Writer, tower: Tower) -> None:
        self.writer = writer
        self.config: TowerConfig = tower.config

    @abstractmethod
    def attention(self, name: str, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """Rotary embedding if the tower has one, then attention; (B, T, D) in and out."""

    @abstractmethod
    def activation(self, name: str, value: ir.Value, linear: Linear) -> ir.Value:
        """The projection ``linear`` of ``value``, then the tower's activation."""


class _Portable(_Dialect):
    def __init__(self, writer: _Writer, tower: Tower) -> None:
        super().__init__(writer, tower)
        config = self.config
        self._heads = writer.constant(
            "shape.heads", np.array([0, 0, config.num_attention_heads, config.head_dim], np.int64)
        )
        self._merged = writer.constant("shape.merged", np.array([0, 0, config.hidden_size]))
        self._alpha = (
            writer.constant("quick_gelu.alpha", np.array(QUICK_GELU_ALPHA, np.float32))
            if config.activation == "quick_gelu"
            else None
        )
        self._rotary: tuple[ir.Value, ir.Value] | None = None
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
        if self.config.activation == "gelu":
            return writer.op("Gelu", f"{name}.gelu", value)
        gate = value
        if self._alpha is not None:
            gate = writer.op("Mul", f"{name}.alpha", value, self._alpha)
        gate = writer.op("Sigmoid", f"{name}.sigmoid", gate)
        return writer.op("Mul", f"{name}.{self.config.activation}", value, gate)


class _Ort(_Dialect):
    def __init__(self, writer: _Writer, tower: Tower) -> None:
        super().__init__(writer, tower)
        self._rotary: tuple[ir.Value, ir.Value, ir.Value] | None = None
        if tower.rotary is not None:
            cos, sin = tower.rotary
            self._rotary = (
                writer.constant("rotary.offset", np.zeros(1, np.int64)),
                writer.constant("rotary.cos", cos),
                writer.constant("rotary.sin", sin),
            )

    def _fused(self, op_type: str, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.writer.op(op_type, name, *inputs, domain="com.microsoft", **attributes)

    def attention(self, name: str, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        heads = self.config.num_attention_heads
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
        if self.config.activation == "gelu":
            value = writer.product(name, value, linear)
            if linear.bias is None:
                return writer.op("Gelu", f"{name}.gelu", value)
            bias = writer.constant(f"{name}.bias", linear.bias)
            return self._fused("BiasGelu", f"{name}.gelu", value, bias)
        alpha = QUICK_GELU_ALPHA if self.config.activation == "quick_gelu" else 1.0
        value = writer.linear(name, value, linear)
        return self._fused("QuickGelu", f"{name}.{self.config.activation}", value, alpha=alpha)


_DIALECTS: dict[GraphKind, type[_Dialect]] = {"portable": _Portable, "ort": _Ort}


def _layer(
    writer: _Writer, dialect: _Dialect, name: str, value: ir.Value, layer: Layer
) -> ir.Value:
    eps = dialect.config.layer_norm_eps
    normed = writer.norm(f"{name}.norm1", value, layer.norm1, eps)
    context = dialect.attention(
        name,
        writer.linear(f"{name}.q", normed, layer.q),
        writer.linear(f"{name}.k", normed, layer.k),
        writer.linear(f"{name}.v", normed, layer.v),
    )
    value = writer.op(
        "Add", f"{name}.residual1", value, writer.linear(f"{name}.o", context, layer.o)
    )
    normed = writer.norm(f"{name}.norm2", value, layer.norm2, eps)
    if layer.gate is None:
        inner = dialect.activation(f"{name}.up", normed, layer.up)
    else:
        inner = writer.op(
            "Mul",
            f"{name}.gated",
            dialect.activation(f"{name}.gate", normed, layer.gate),
            writer.linear(f"{name}.up", normed, layer.up),
        )
    return writer.op(
        "Add", f"{name}.residual2", value, writer.linear(f"{name}.down", inner, layer.down)
    )


def _embed(writer: _Writer, pixel_values: ir.Value, tower: Tower) -> ir.Value:
    """Patches as rows (C, p, p), one product, prefix rows in front, then the constant rows added.

    The prefix rows come from Pad, not from an expanded constant: no node needs the batch size.
    """
    config = tower.config
    rows, columns = config.grid
    patch = config.patch_size
    split = np.array([0, 3, rows, patch, columns, patch], np.int64)
    flat = np.array([0, rows * columns, 3 * patch * patch], np.int64)
    value = writer.op("Reshape", "patches.split", pixel_values, writer.constant("patches.s", split))
    value = writer.op("Transpose", "patches.transpose", value, perm=(0, 2, 4, 1, 3, 5))
    value = writer.op("Reshape", "patches.flat", value, writer.constant("patches.f", flat))
    value = writer.product("patches", value, tower.patch)
    pads = np.array([0, config.num_prefix_tokens, 0, 0, 0, 0], np.int64)
    value = writer.op("Pad", "tokens.pad", value, writer.constant("tokens.pads", pads))
    return writer.op("Add", "tokens.add", value, writer.constant("tokens", tower.tokens))


def write_graph(tower: Tower, kind: GraphKind) -> ir.Model:
    """Write the graph of a tower; weights stay lazy until the model is saved.

    Input ``pixel_values`` (batch, 3, H, W) float32. Output ``last_hidden_state`` (batch, T, D)
    float32 as the Hugging Face class returns it; the portable graph also has ``pooler_output``
    (batch, D). The batch is dynamic, H and W are fixed.
    """
    config = tower.config
    height, width = config.image_size
    pixel_values = ir.Value(
        name="pixel_values",
        shape=ir.Shape(["batch", 3, height, width]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    writer = _Writer()
    dialect = _DIALECTS[kind](writer, tower)
    value = _embed(writer, pixel_values, tower)
    eps = config.layer_norm_eps
    if tower.norm_before is not None:
        value = writer.norm("norm_before", value, tower.norm_before, eps)
    for index, layer in enumerate(tower.layers):
        value = _layer(writer, dialect, f"layers.{index}", value, layer)
    if tower.norm_after is not None:
        value = writer.norm("norm_after", value, tower.norm_after, eps)
    outputs = [_output(value, "last_hidden_state", ["batch", tower.tokens.shape[1]], config)]
    if kind == "portable":
        first = writer.constant("shape.first", np.array(0, np.int64))
        pooled = writer.op("Gather", "pooler", value, first, axis=1)
        if tower.pooler_norm is not None:
            pooled = writer.norm("pooler_norm", pooled, tower.pooler_norm, eps)
        outputs.append(_output(pooled, "pooler_output", ["batch"], config))
    opset_imports = {"": OPSET}
    if kind == "ort":
        opset_imports["com.microsoft"] = 1
    graph = ir.Graph(
        [pixel_values],
        outputs,
        nodes=writer.nodes,
        initializers=writer.initializers,
        opset_imports=opset_imports,
        name=config.family.model_type,
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="vistower")


def _output(
    value: ir.Value, name: str, leading: Sequence[str | int], config: TowerConfig
) -> ir.Value:
    value.name = name
    value.shape = ir.Shape([*leading, config.hidden_size])
    value.type = ir.TensorType(ir.DataType.FLOAT)
    return value
