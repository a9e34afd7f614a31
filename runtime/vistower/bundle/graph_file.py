"""What an ONNX file says of itself, read from its bytes before ONNX Runtime sees it.

Names and field numbers are those of ``onnx.proto`` (https://github.com/onnx/onnx). Only what a
check needs is read; weights inside the file are stepped over.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vistower.bundle.reading import open_regular
from vistower.bundle.wire import Field, Message, WireError, edited, field_bytes, fields, parse
from vistower.errors import BundleCorruptError

_MESSAGES: Mapping[str, Message] = {
    "model": {
        1: Field("ir_version", "int"),
        7: Field("graph", "graph"),
        8: Field("opset_import", "opset", repeated=True),
        14: Field("metadata_props", "metadata", repeated=True),
        25: Field("functions", "function", repeated=True),
    },
    "opset": {1: Field("domain", "text"), 2: Field("version", "int")},
    "metadata": {1: Field("key", "text")},
    "entry": {1: Field("key", "text"), 2: Field("value", "text")},
    "graph": {
        1: Field("node", "node", repeated=True),
        2: Field("name", "text"),
        5: Field("initializer", "tensor", repeated=True),
        11: Field("input", "value", repeated=True),
        12: Field("output", "value", repeated=True),
        15: Field("sparse_initializer", "sparse", repeated=True),
    },
    "value": {1: Field("name", "text")},
    "node": {
        1: Field("input", "text", repeated=True),
        2: Field("output", "text", repeated=True),
        3: Field("name", "text"),
        4: Field("op_type", "text"),
        5: Field("attribute", "attribute", repeated=True),
        7: Field("domain", "text"),
    },
    "attribute": {
        1: Field("name", "text"),
        3: Field("i", "int"),
        5: Field("t", "tensor"),
        6: Field("g", "graph"),
        10: Field("tensors", "tensor", repeated=True),
        11: Field("graphs", "graph", repeated=True),
        22: Field("sparse_tensor", "sparse"),
        23: Field("sparse_tensors", "sparse", repeated=True),
    },
    "tensor": {
        1: Field("dims", "int", repeated=True),
        2: Field("data_type", "int"),
        8: Field("name", "text"),
        13: Field("external_data", "entry", repeated=True),
        14: Field("data_location", "int"),
    },
    "sparse": {1: Field("values", "tensor"), 2: Field("indices", "tensor")},
    "function": {
        1: Field("name", "text"),
        7: Field("node", "node", repeated=True),
        10: Field("domain", "text"),
        11: Field("attribute_proto", "attribute", repeated=True),
    },
}

_EXTERNAL = 1
"""``TensorProto.EXTERNAL`` of ``data_location``."""

_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})
"""Keys of ``external_data`` in ONNX's documentation; ONNX Runtime has more, of its own."""

_NO_GRAPH: Mapping[str, Any] = {"node": []}
_DEEPEST_CALL = 16
_MOST_NODES = 200_000

_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "stash_type", "softmax_precision"})
"""Whole-number attributes that name the element type of a value."""

_LARGEST = (1 << 31) - 1
"""Bytes of a message of Protocol Buffers."""

_MAPPED_FROM = 16 << 20
"""Larger files are mapped into memory instead of read: they hold weights nobody looks at."""


@dataclass(frozen=True)
class External:
    """A tensor whose data lie in another file: where, and how many bytes from which on."""

    tensor: str
    location: str
    offset: int
    length: int | None


@dataclass(frozen=True)
class GraphFacts:
    """What an ONNX file holds.

    Attributes:
        ir_version, opsets: as the file says, operator sets by domain (``ai.onnx`` is ``""``).
        nodes: nodes of the main graph.
        operators: (domain, type) of every node, those of subgraphs and functions too.
        functions: (domain, name) of the functions that the file defines itself.
        element_types: numbers of ``TensorProto.DataType`` of every initializer, every tensor in
            an attribute and every conversion.
        external: tensors that lie in other files.
        metadata: keys of ``metadata_props``.
        kernel: shape of the first weight that the pixels meet; None where it is no initializer.
    """

    ir_version: int
    opsets: Mapping[str, int]
    nodes: int
    operators: frozenset[tuple[str, str]]
    functions: frozenset[tuple[str, str]]
    element_types: frozenset[int]
    external: tuple[External, ...]
    metadata: frozenset[str]
    kernel: tuple[int, ...] | None


def read_graph(path: Path, pixels: str = "pixel_values") -> GraphFacts:
    """Read what a file says of itself.

    Args:
        path: the ONNX file.
        pixels: the graph's input.

    Raises:
        BundleCorruptError: it is no ONNX file, or not a regular file.
    """
    with _mapped(path) as data:
        try:
            return facts(data, pixels)
        except (WireError, UnicodeDecodeError, RecursionError) as error:
            raise BundleCorruptError(
                f"{path} cannot be loaded: it is no ONNX graph ({error}). Export the bundle again."
            ) from error


def facts(data: memoryview, pixels: str) -> GraphFacts:
    """The same, of bytes.

    Raises:
        WireError, UnicodeDecodeError: they are no ONNX file.
    """
    model = parse(data, _MESSAGES, "model")
    graph = model.get("graph")
    if graph is None:
        raise WireError("there is no graph in it")
    found = _Census()
    found.graph(graph)
    _check_expansion(graph["node"], model["functions"])
    for function in model["functions"]:
        found.nodes(function["node"])
        found.attributes(function["attribute_proto"])
    opsets: dict[str, int] = {}
    for opset in model["opset_import"]:
        domain = _domain(opset)
        if domain in opsets:
            raise WireError(f"two operator sets of domain {domain!r}")
        opsets[domain] = opset.get("version", 0)
    return GraphFacts(
        ir_version=model.get("ir_version", 0),
        opsets=opsets,
        nodes=len(graph["node"]),
        operators=frozenset(found.operators),
        functions=frozenset((_domain(x), x.get("name", "")) for x in model["functions"]),
        element_types=frozenset(found.element_types),
        external=tuple(found.external),
        metadata=frozenset(entry.get("key", "") for entry in model["metadata_props"]),
        kernel=_kernel(graph, pixels),
    )


def relocated(path: Path, places: Mapping[str, str]) -> bytes:
    """The file's bytes with other locations of its weights: location → the one to write.

    Raises:
        BundleCorruptError: as `read_graph`.
    """

    def moved(entry: memoryview) -> bytes:
        known = parse(entry, _MESSAGES, "entry")
        if known.get("key") != "location":
            return bytes(entry)
        place = places[known.get("value", "")].encode()
        parts = (
            part
            for number, wire, value in fields(entry)
            for part in field_bytes(number, wire, place if number == 2 else value)
        )
        return b"".join(parts)

    with _mapped(path) as data:
        try:
            # Model.graph, Graph.initializer, Tensor.external_data
            return edited(data, (7, 5, 13), moved)
        except (WireError, UnicodeDecodeError) as error:
            raise BundleCorruptError(f"{path} is no ONNX graph ({error}).") from error


def _check_expansion(nodes: list[dict[str, Any]], functions: list[dict[str, Any]]) -> None:
    """Count the nodes there are once every function is written out, as ONNX Runtime does.

    Raises:
        WireError: too many, or a function that calls itself.
    """
    bodies = {(_domain(x), x.get("name", "")): x["node"] for x in functions}
    sizes: dict[tuple[str, str], int] = {}

    def expanded(nodes: list[dict[str, Any]], inside: tuple[tuple[str, str], ...]) -> int:
        total = 0
        for node in nodes:
            name = _domain(node), node.get("op_type", "")
            for attribute in node["attribute"]:
                for graph in (*attribute["graphs"], attribute.get("g", _NO_GRAPH)):
                    total += expanded(graph["node"], inside)
            if name in inside or len(inside) > _DEEPEST_CALL:
                raise WireError(f"the function {name[1]!r} calls itself, or too many others")
            if name in bodies and name not in sizes:
                sizes[name] = expanded(bodies[name], (*inside, name))
            total += sizes.get(name, 1)
        if total > _MOST_NODES:
            raise WireError(f"functions that write out to more than {_MOST_NODES} nodes")
        return total

    if bodies:
        expanded(nodes, ())


@dataclass
class _Census:
    operators: set[tuple[str, str]] = field(default_factory=set)
    element_types: set[int] = field(default_factory=set)
    external: list[External] = field(default_factory=list)

    def graph(self, graph: dict[str, Any]) -> None:
        self.tensors(graph["initializer"])
        self.sparse(graph["sparse_initializer"])
        self.nodes(graph["node"])

    def nodes(self, nodes: Iterable[dict[str, Any]]) -> None:
        for node in nodes:
            self.operators.add((_domain(node), node.get("op_type", "")))
            self.attributes(node["attribute"])

    def attributes(self, attributes: Iterable[dict[str, Any]]) -> None:
        for one in attributes:
            if one.get("name") in _TYPE_ATTRIBUTES and "i" in one:
                self.element_types.add(one["i"])
            self.tensors(one["tensors"] + ([one["t"]] if "t" in one else []))
            self.sparse(
                one["sparse_tensors"] + ([one["sparse_tensor"]] if "sparse_tensor" in one else [])
            )
            for graph in one["graphs"] + ([one["g"]] if "g" in one else []):
                self.graph(graph)

    def sparse(self, tensors: Iterable[dict[str, Any]]) -> None:
        for tensor in tensors:
            self.tensors([part for key in ("values", "indices") if (part := tensor.get(key))])

    def tensors(self, tensors: Iterable[dict[str, Any]]) -> None:
        for tensor in tensors:
            self.element_types.add(tensor.get("data_type", 0))
            if tensor["external_data"] or tensor.get("data_location") == _EXTERNAL:
                self.external.append(_external(tensor))


def _external(tensor: dict[str, Any]) -> External:
    name = tensor.get("name", "")
    entries: dict[str, str] = {}
    for entry in tensor["external_data"]:
        key = entry.get("key", "")
        if key in entries or key not in _EXTERNAL_KEYS:
            raise WireError(f"external data of {name!r} say {key!r} twice, or it is not known")
        entries[key] = entry.get("value", "")
    numbers: dict[str, int] = {}
    for key in ("offset", "length"):
        text = entries.get(key)
        if text is None:
            continue
        if re.fullmatch(r"[0-9]{1,18}", text) is None:
            raise WireError(f"external data of {name!r} have the {key} {text!r}")
        numbers[key] = int(text)
    if "location" not in entries:
        raise WireError(f"external data of {name!r} have no location")
    return External(name, entries["location"], numbers.get("offset", 0), numbers.get("length"))


def _domain(thing: dict[str, Any]) -> str:
    """The domain of a node, a function or an operator set; ``ai.onnx`` is the empty one."""
    domain = str(thing.get("domain", ""))
    return "" if domain == "ai.onnx" else domain


_PRODUCT = re.compile(r"Conv|MatMul|Gemm")
_VIEW = frozenset({"Shape", "Size"})
"""Operators whose result holds nothing of the pixels' values."""


def _kernel(graph: dict[str, Any], pixels: str) -> tuple[int, ...] | None:
    """Shape of the weight of the first product or convolution that the pixels enter.

    Nodes of a graph stand in an order in which each comes after those it reads.
    """
    shapes = {x.get("name", ""): tuple(x["dims"]) for x in graph["initializer"]}
    # An int8 or half precision weight of other exporters is converted first.
    reached = {pixels}
    for node in graph["node"]:
        inputs, kind = node["input"], node.get("op_type", "")
        weight = next((shapes[name] for name in inputs if len(shapes.get(name, ())) > 1), None)
        if not reached & set(inputs):
            if weight is not None and kind in ("Cast", "DequantizeLinear", "Identity"):
                shapes[next(iter(node["output"]), "")] = weight
            continue
        if _PRODUCT.search(kind) is not None:
            return weight
        if kind not in _VIEW:
            reached.update(node["output"])
    return None


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, mapped where there are many."""
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > _LARGEST:
                raise BundleCorruptError(
                    f"{path} has {size} bytes; an ONNX file has at most {_LARGEST}."
                )
            if size < _MAPPED_FROM:
                yield memoryview(file.read())
                return
            # Never closed by hand: an exception's traceback can still hold a piece of it.
            yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise BundleCorruptError(f"{path} cannot be read ({error}).") from error
