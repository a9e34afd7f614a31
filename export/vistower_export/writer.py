"""A tape of ONNX nodes that writes a tower's products in one precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from vistower.tolerance import GraphPrecision
from vistower_export.quantize import Activation, Quantization, QuantizedLinear
from vistower_export.weights import Lazy, Linear, Norm, Product

_FLOATS: dict[GraphPrecision, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "int8": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
"""The float type of a precision's weights and values."""

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


class Writer:
    """Nodes with named values, and initializers that are made when the graph is saved.

    Weights, constants and values are of the precision's float type, float32 for int8. With a
    `Quantization`, the products it knows are written in int8. ``products`` lists every product by
    name. ``emulate`` rounds to half precision but computes in float32.
    """

    def __init__(
        self,
        precision: GraphPrecision,
        quantization: Quantization | None = None,
        *,
        emulate: bool = False,
    ) -> None:
        """An empty tape."""
        self._tape = Tape()
        self._narrow = _FLOATS[precision]
        self._float = ir.DataType.FLOAT if emulate else self._narrow
        self._quantization = quantization
        self._quantized: dict[str, tuple[ir.Value, ir.Value, ir.Value]] = {}
        self.products: dict[str, Product] = {}

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The nodes in the order they were written."""
        return self._tape.nodes

    @property
    def initializers(self) -> Sequence[ir.Value]:
        """Constants and weights."""
        return self._tape.initializers

    def op(
        self,
        op_type: str,
        name: str,
        *inputs: ir.Value | None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """A node with one output, both called ``name``; None stands for an input left out."""
        output = self._tape.op(op_type, list(inputs), attributes or None, domain=domain, name=name)
        output.name = name
        return self._rounded(output)

    def _rounded(self, value: ir.Value) -> ir.Value:
        """An operator's result as the emulated precision would store it."""
        if self._float is self._narrow:
            return value
        rounded = self._cast(f"{value.name}.rounded", value, self._narrow)
        return self._cast(f"{value.name}.emulated", rounded, self._float)

    def _cast(self, name: str, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        output = self._tape.op("Cast", [value], {"to": dtype}, name=name)
        output.name = name
        return output

    def narrowed(self, value: ir.Value) -> ir.Value:
        """A float32 value in the graph's own float type."""
        if self._narrow is ir.DataType.FLOAT:
            return value
        if self._float is ir.DataType.FLOAT:
            return self._rounded(value)
        return self._cast(f"{value.name}.narrowed", value, self._float)

    def widened(self, value: ir.Value) -> ir.Value:
        """A value in float32."""
        if self._float is ir.DataType.FLOAT:
            return value
        return self._cast(f"{value.name}.widened", value, ir.DataType.FLOAT)

    def split(self, name: str, value: ir.Value) -> Sequence[ir.Value]:
        """Two halves along the last axis."""
        outputs = self._tape.op_multi_out(
            "Split", [value], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=name
        )
        for index, output in enumerate(outputs):
            output.name = f"{name}.{index}"
        return outputs

    def constant(self, name: str, array: np.ndarray[Any, Any], *, narrow: bool = True) -> ir.Value:
        """An initializer kept inside the graph file, in the graph's float type if ``narrow``."""
        if narrow and array.dtype == np.float32:
            array = self._stored(array)
        return self._tape.initializer(ir.tensor(array, name=name), name=name)

    def _stored(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self._narrow is ir.DataType.FLOAT:
            return array
        return array.astype(self._narrow.numpy()).astype(self._float.numpy())

    def _weight(self, name: str, linear: Linear) -> ir.Value:
        return self.weight(name, linear.weight, linear.shape)

    def weight(self, name: str, make: Lazy, shape: tuple[int, ...]) -> ir.Value:
        """A tensor of weights in the graph's float type, kept in the weight file."""
        return self._matrix(name, lambda: self._stored(make()), self._float, shape)

    def float32(self, name: str, make: Lazy, shape: tuple[int, ...]) -> ir.Value:
        """A tensor of weights in float32 whatever the graph's float type, in the weight file."""
        return self._matrix(name, make, ir.DataType.FLOAT, shape)

    def _matrix(self, name: str, make: Any, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        tensor = ir.LazyTensor(
            lambda: ir.tensor(make(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name
        )
        return self._tape.initializer(tensor, name=name)

    def product(self, name: str, value: ir.Value, linear: Linear) -> ir.Value:
        """``value @ weight`` in float32, its bias left to the next operator."""
        self.products[name] = Product(str(value.name), linear)
        weight = self._weight(f"{name}.weight", linear)
        return self.op("MatMul", f"{name}.matmul", value, weight)

    def linear(self, name: str, value: ir.Value, linear: Linear) -> ir.Value:
        """``value @ weight + bias``."""
        if (quantized := self.quantized(name)) is not None:
            self.products[name] = Product(str(value.name), linear)
            return self._integer_product(name, value, quantized)
        out = self.product(name, value, linear)
        if linear.bias is None:
            return out
        return self.op("Add", f"{name}.add", out, self.constant(f"{name}.bias", linear.bias))

    def quantized(self, name: str) -> QuantizedLinear | None:
        """The int8 form of a product, or None where it stays in float32."""
        return None if self._quantization is None else self._quantization.linears.get(name)

    def _integer_product(self, name: str, value: ir.Value, linear: QuantizedLinear) -> ir.Value:
        activation, scale, zero_point = self._quantize(value)
        weight = self._matrix(
            f"{name}.weight", lambda: linear.weight, ir.DataType.INT8, linear.shape
        )
        bias = self.constant(f"{name}.bias", linear.bias)
        return self.op(
            "MatMulIntegerToFloat",
            f"{name}.matmul",
            activation,
            weight,
            scale,
            self.constant(f"{name}.scale", linear.scale),
            zero_point,
            None,
            bias,
            domain=MICROSOFT,
        )

    def prequantized(self, value: ir.Value, activation: Activation) -> None:
        """Say that a value is uint8 already: the products it enters take it as it is."""
        scale = self.constant(f"{value.name}.scale", np.array(activation.scale, np.float32))
        zero = self.constant(f"{value.name}.zero", np.array(activation.zero_point, np.uint8))
        self._quantized[str(value.name)] = (value, scale, zero)

    def to_float(self, value: ir.Value) -> ir.Value:
        """A uint8 value in the graph's own float type."""
        return self._cast(f"{value.name}.float", value, self._float)

    def to_float32(self, value: ir.Value) -> ir.Value:
        """A uint8 value in float32."""
        return self._cast(f"{value.name}.float", value, ir.DataType.FLOAT)

    def _quantize(self, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The uint8 form of a value with its scale and zero point; made once for all consumers."""
        site = str(value.name)
        if site not in self._quantized:
            assert self._quantization is not None  # noqa: S101
            activation = self._quantization.activations[site]
            scale = self.constant(f"{site}.scale", np.array(activation.scale, np.float32))
            zero = self.constant(f"{site}.zero", np.array(activation.zero_point, np.uint8))
            quantized = self.op("QuantizeLinear", f"{site}.uint8", value, scale, zero)
            self._quantized[site] = (quantized, scale, zero)
        return self._quantized[site]

    def norm(self, name: str, value: ir.Value, norm: Norm, eps: float) -> ir.Value:
        """LayerNormalization over the last axis."""
        scale = self.constant(f"{name}.weight", norm.scale)
        bias = self.constant(f"{name}.bias", norm.bias)
        return self.op(
            "LayerNormalization", f"{name}.norm", value, scale, bias, axis=-1, epsilon=eps
        )

    def skip_norm(
        self,
        name: str,
        value: ir.Value,
        skip: ir.Value,
        bias: ir.Value | None,
        norm: Norm,
        eps: float,
    ) -> tuple[ir.Value, ir.Value]:
        """``value + skip + bias`` and its LayerNormalization, by one operator of ONNX Runtime."""
        outputs = self._tape.op_multi_out(
            "SkipLayerNormalization",
            [
                value,
                skip,
                self.constant(f"{name}.weight", norm.scale),
                self.constant(f"{name}.bias", norm.bias),
                bias,
            ],
            {"epsilon": eps},
            num_outputs=4,
            domain=MICROSOFT,
            name=f"{name}.norm",
        )
        normed, mean, deviation, total = outputs
        normed.name, mean.name, deviation.name = f"{name}.norm", "", ""
        total.name = f"{name}.sum"
        return self._rounded(total), self._rounded(normed)
