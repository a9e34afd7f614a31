"""What is read of an ONNX file, compared with what the onnx package reads of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from vistower.bundle import graph_file, wire
from vistower.bundle.graph_file import facts, read_graph, relocated
from vistower.errors import BundleCorruptError

TYPE_NAMES = {"to", "dtype", "output_dtype", "stash_type", "softmax_precision"}


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of subgraphs and functions too."""
    todo = [*model.graph.node, *(node for one in model.functions for node in one.node)]
    while todo:
        node = todo.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                todo += graph.node


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = [model.graph]
    for node in nodes(model):
        for attribute in node.attribute:
            graphs += [attribute.g, *attribute.graphs]
            yield from (attribute.t, *attribute.tensors) if attribute.HasField("t") else ()
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)


def check(data: bytes) -> None:
    model = onnx.ModelProto.FromString(data)
    found = facts(memoryview(data), "pixel_values")
    assert found.ir_version == model.ir_version
    assert found.opsets == {x.domain: x.version for x in model.opset_import}
    assert found.nodes == len(model.graph.node)
    assert found.operators == {(node.domain, node.op_type) for node in nodes(model)}
    assert found.functions == {(one.domain, one.name) for one in model.functions}
    assert found.metadata == {entry.key for entry in model.metadata_props}
    types = {tensor.data_type for tensor in tensors(model)}
    types |= {a.i for node in nodes(model) for a in node.attribute if a.name in TYPE_NAMES}
    assert found.element_types == types
    outside = []
    for tensor in tensors(model):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            length = int(entries["length"]) if "length" in entries else None
            offset = int(entries.get("offset", 0))
            outside.append((tensor.name, entries["location"], offset, length))
    assert sorted(outside, key=str) == sorted(
        ((x.tensor, x.location, x.offset, x.length) for x in found.external), key=str
    )


@pytest.mark.parametrize("fixture", ["clip_bundle", "dinov3_bundle"])
def test_it_reads_what_onnx_reads(fixture: str, request: pytest.FixtureRequest) -> None:
    for path in (request.getfixturevalue(fixture) / "onnx").glob("*.onnx"):
        check(path.read_bytes())
        found = read_graph(path)
        assert found.kernel == ((3072, 64) if fixture == "clip_bundle" else (768, 64))


NAMES = st.text("abcXYZ_./", max_size=8)


@st.composite
def made_tensors(draw: st.DrawFn) -> onnx.TensorProto:
    kind = draw(st.sampled_from([np.float32, np.float16, np.int8, np.uint8, np.int64, np.bool_]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    tensor = numpy_helper.from_array(np.zeros(shape, kind), draw(NAMES))
    if draw(st.booleans()):
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=draw(NAMES))
        tensor.external_data.add(key="offset", value=str(draw(st.integers(0, 10**9))))
        if draw(st.booleans()):
            tensor.external_data.add(key="length", value=str(draw(st.integers(0, 10**9))))
    return tensor


@st.composite
def made_graphs(draw: st.DrawFn, depth: int = 2) -> onnx.GraphProto:
    made = []
    for _ in range(draw(st.integers(0, 3))):
        node = helper.make_node(
            draw(NAMES), draw(st.lists(NAMES, max_size=3)), draw(st.lists(NAMES, max_size=2)),
            name=draw(NAMES), domain=draw(st.sampled_from(["", "com.microsoft", "x"])),
            to=draw(st.integers(1, 20)), alpha=0.5, text="a\nb", numbers=[1, -2], floats=[1.0],
        )  # fmt: skip
        if draw(st.booleans()):
            node.attribute.append(helper.make_attribute("value", draw(made_tensors())))
        if depth and draw(st.booleans()):
            node.attribute.append(helper.make_attribute("g", draw(made_graphs(depth - 1))))
        made.append(node)
    values = draw(st.lists(made_tensors(), max_size=3))
    value = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["b", 3, 4, 4])
    graph = helper.make_graph(made, draw(NAMES), [value], [], values, doc_string="a\x1b\n")
    if draw(st.booleans()):
        sparse = helper.make_sparse_tensor(
            numpy_helper.from_array(np.ones(2, np.float32), "sparse"),
            numpy_helper.from_array(np.arange(2), ""),
            [4],
        )
        graph.sparse_initializer.append(sparse)
    return graph


@given(graph=made_graphs(), inner=made_graphs(), key=NAMES)
def test_it_reads_what_onnx_reads_of_any_model(
    graph: onnx.GraphProto, inner: onnx.GraphProto, key: str
) -> None:
    function = helper.make_function("x", "F", ["a"], ["b"], list(inner.node), [])
    model = helper.make_model(graph, functions=[function], ir_version=10)
    model.metadata_props.add(key=key, value="of several\nlines")
    check(model.SerializeToString())


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_model_or_an_error(data: bytes) -> None:
    try:
        found = facts(memoryview(data), "pixel_values")
    except (wire.WireError, UnicodeDecodeError):
        return
    assert onnx.ModelProto.FromString(data).ir_version == found.ir_version


def test_cut_off_anywhere(clip_bundle: Path, tmp_path: Path) -> None:
    data = (clip_bundle / "onnx/model_ort.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    refused = 0
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        try:
            read_graph(path)
        except BundleCorruptError as error:
            assert "no ONNX graph" in str(error)  # noqa: PT017
            refused += 1
    # Cut between two fields of the model it is a shorter one.
    assert refused > len(data) // 97 - 5


@pytest.mark.parametrize("data", [b"\x3a\x00\x3a\x00", b"\x08\x01\x08\x01\x3a\x00"])
def test_what_two_readers_would_read_differently_is_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError, match="comes twice"):
        facts(memoryview(data), "pixel_values")


def test_depth_and_number_of_fields_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b""
    for _ in range(200):
        # node.attribute.g
        for key in (b"\x32", b"\x2a", b"\x0a"):
            data = key + bytes(wire._encoded(len(data))) + data
    data = b"\x3a" + bytes(wire._encoded(len(data))) + data
    with pytest.raises(wire.WireError, match="nested deeper"):
        facts(memoryview(data), "pixel_values")
    monkeypatch.setattr(wire, "MOST_FIELDS", 1000)
    with pytest.raises(wire.WireError, match="more than 1000 fields"):
        facts(memoryview(b"\x10\x01" * 1001), "pixel_values")


def test_weights_inside_a_file_are_stepped_over(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.zeros((5 << 20,), np.float32), "w")
    value = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["b", 3, 4, 4])
    graph = helper.make_graph([helper.make_node("Relu", ["w"], ["y"])], "g", [value], [], [weight])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, ir_version=10), path)
    assert path.stat().st_size > graph_file._MAPPED_FROM
    assert read_graph(path).operators == {("", "Relu")}


def test_relocated_weights(clip_bundle: Path) -> None:
    path = clip_bundle / "onnx/model.onnx"
    data = relocated(path, {"model.onnx_data": "other/place.bin"})
    have = onnx.ModelProto.FromString(data)
    want = onnx.load(path, load_external_data=False)
    for tensor in want.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "other/place.bin"
    assert have == want
