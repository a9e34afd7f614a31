"""Writes the tiny graph of ``vistower doctor``: python tests/doctor_graph.py"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper

from vistower.doctor import GRAPH, tiny_weights


def doctor_graph() -> onnx.ModelProto:
    """The graph `vistower.doctor.GRAPH` describes."""
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "shape"], ["rows"], name="rows"),
        helper.make_node("MatMul", ["rows", "weights.1"], ["query"], name="product.1"),
        helper.make_node(
            "MultiHeadAttention",
            ["query", "query", "query"],
            ["context"],
            name="attention",
            domain="com.microsoft",
            num_heads=2,
        ),
        helper.make_node(
            "MatMul", ["context", "weights.2"], ["last_hidden_state"], name="product.2"
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "doctor",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 4, 8])],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", 3, 32])],
        [
            helper.make_tensor("shape", TensorProto.INT64, [3], [0, 3, 32]),
            numpy_helper.from_array(tiny_weights(1), "weights.1"),
            numpy_helper.from_array(tiny_weights(2), "weights.2"),
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="vistower")


if __name__ == "__main__":
    onnx.save(doctor_graph(), GRAPH)
