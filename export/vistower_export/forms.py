"""The graphs a tower is written as, as data: one record per form in `FORMS`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vistower.preprocess.processor import Pixels
from vistower.tolerance import GraphPrecision

Dialect = Literal["portable", "ort"]


@dataclass(frozen=True)
class GraphForm:
    """One way to write a tower as an ONNX graph.

    ``name`` is its key in the bundle, ``file`` the graph's file name under ``onnx/`` without
    suffix. ``dialect`` is the family of operators, see `vistower_export.graph`. ``weights`` is
    the file under ``onnx/`` that holds the matrices; graphs of one precision share it.
    ``skip_norm`` writes a residual sum, the bias before it and the norm after it as one operator:
    two kernels fewer on CUDA, but on the CPU slower than the three (CLIP B/32 at batch 8: 23.0
    against 21.3 ms an image; DINOv3 S/16: 29.0 against 26.7). ``pixels`` is what goes in:
    ``pixel_values`` in float32, or the uint8 levels they are made of.
    """

    name: str
    file: str
    dialect: Dialect
    precision: GraphPrecision
    weights: str
    skip_norm: bool = False
    pixels: Pixels = "float32"

    def with_levels(self) -> GraphForm:
        """The same form with uint8 levels as its input."""
        return replace(self, name=f"{self.name}_uint8", file=f"{self.file}_uint8", pixels="uint8")


PORTABLE = GraphForm("portable", "model", "portable", "fp32", "model.onnx_data")
ORT = GraphForm("ort", "model_ort", "ort", "fp32", "model.onnx_data")
INT8 = GraphForm("int8", "model_int8", "ort", "int8", "model_int8.onnx_data")
FP16 = GraphForm("fp16", "model_ort_fp16", "ort", "fp16", "model_ort_fp16.onnx_data", True)
BF16 = GraphForm("bf16", "model_ort_bf16", "ort", "bf16", "model_ort_bf16.onnx_data", True)

ALWAYS: tuple[GraphForm, ...] = (PORTABLE, ORT)
"""Every bundle has these."""

BY_PRECISION: dict[GraphPrecision, GraphForm] = {"int8": INT8, "fp16": FP16, "bf16": BF16}
"""What ``--precision`` adds."""

HALVES: tuple[GraphPrecision, ...] = ("fp16", "bf16")
"""Written for CUDA."""
