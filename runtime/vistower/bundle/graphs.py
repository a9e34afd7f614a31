"""One graph of a bundle: which files it opens, and whether it is what the bundle says it is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from vistower.bundle.graph_file import External, GraphFacts, read_graph, relocated
from vistower.bundle.hashes import sha256, sha256_anew, sha256_once
from vistower.bundle.manifest import DOMAINS, FileRecord, GraphRecord, is_file_name
from vistower.bundle.reading import regular_file
from vistower.errors import BundleCorruptError
from vistower.preprocess.processor import Pixels
from vistower.tokens import TokenLayout
from vistower.tolerance import GraphPrecision

HASHED_ALWAYS = 1 << 20
"""Files up to this many bytes are hashed every time: it costs a millisecond at most."""

FOREIGN_DOMAINS = (*DOMAINS, "ai.onnx.ml", "com.microsoft.nchwc", "com.ms.internal.nhwc")
"""Domains of graphs of other exporters: those built into every ONNX Runtime."""

REFUSED_OPERATORS = {
    "EPContext": "opens a compiled model of an execution provider, in another file",
    "Loop": "repeats itself as often as it likes",
    "Scan": "repeats itself as often as it likes",
    "SequenceMap": "repeats itself as often as it likes",
    "PythonOp": "runs Python code",
    "PythonOpGrad": "runs Python code",
}
"""Operators of known domains that do more than compute, and what they do."""

_HALF, _BRAIN = 10, 16
_WIDE = frozenset({0, 1, 6, 7, 8, 9, _HALF, 11, 12, 13, _BRAIN})
"""Numbers of ``TensorProto.DataType`` that no quantization uses: none, float32, whole numbers of
32 and 64 bits, text, truth values, float16, float64, bfloat16."""

_QUANTIZED = re.compile(r"Quant|Integer|NBits|Bnb4|Q(?=[A-Z])")
"""Names of operators that compute with whole numbers."""


@dataclass(frozen=True)
class Loadable:
    """A checked graph as ONNX Runtime can load it.

    Its path; or its bytes and ``folder``, from which it finds the weights, where the files are
    links into other directories: several releases of ONNX Runtime refuse to follow those.
    """

    model: Path | bytes
    folder: Path | None
    facts: GraphFacts


@dataclass(frozen=True)
class BundleGraph:
    """A graph of a bundle.

    Attributes:
        name, path: its name in the bundle, and its file.
        precision: of its weights and products.
        pixels: the type of ``pixel_values``.
        portable: whether it has standard operators only.
        layout: where its tokens lie; ``layout.image_size`` is what it takes.
        kernel: pixels of a side and outputs of its first product, the patch embedding as a rule.
        directory: the bundle's.
        record: what the manifest says of it; None without one.
        files: the manifest's records of all files; empty without one.
    """

    name: str
    path: Path
    precision: GraphPrecision
    pixels: Pixels
    portable: bool
    layout: TokenLayout
    kernel: tuple[int, int]
    directory: Path
    record: GraphRecord | None
    files: Mapping[str, FileRecord]

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) in pixels that it takes."""
        return self.layout.image_size

    def checked(self) -> Loadable:
        """Compare the file with its record, and hash it and its weights, if not done before.

        Raises:
            BundleCorruptError: naming the difference.
        """
        self._check_hash(self.path)
        loadable = checked_file(self.path, self.directory)
        facts = loadable.facts
        for file in _weight_files(self.path, facts.external):
            self._check_hash(file)
        held = held_precision(self.path, facts)
        if held != self.precision:
            raise BundleCorruptError(
                f"{self.path} holds {held}, but is said to be {self.precision}. {self._edited}"
            )
        patch, width = self.kernel
        if self.record is not None:
            self._check_record(facts, self.record)
        elif facts.kernel is None:
            return loadable
        flat = 3 * patch * patch
        if facts.kernel not in ((width, 3, patch, patch), (flat, width), (width, flat)):
            raise BundleCorruptError(
                f"{self.path} has a patch embedding of {list(facts.kernel or ())}, but is said to "
                f"have one of {patch}x{patch} pixels and {width} numbers. {self._edited}"
            )
        return loadable

    def shape(self, output: str) -> tuple[int, ...] | None:
        """Shape of an output without the batch; None where the bundle does not say it."""
        if self.record is not None:
            return self.record.outputs.get(output)
        return self.layout.shape(output)

    def check_outputs(self, names: tuple[str, ...]) -> None:
        """Compare the names of a loaded graph's outputs; one without a record may have any.

        Raises:
            BundleCorruptError: naming the difference.
        """
        if self.record is not None and set(names) != set(self.record.outputs):
            raise BundleCorruptError(
                f"{self.path} has the outputs {', '.join(sorted(names))}, but is said to have "
                f"{', '.join(sorted(self.record.outputs))}. {self._edited}"
            )

    def check_ports(self, source: PortShape, *targets: PortShape) -> None:
        """Compare shapes and types of the loaded graph's input and outputs, batch left out.

        Raises:
            BundleCorruptError: naming the difference.
        """
        layout = self.layout
        for name, dtype, shape in (source, *targets):
            dtypes: tuple[str, ...] = ("float32", "float16")
            expected = self.shape(name)
            if (name, dtype, shape) == source:
                dtypes, expected = (self.pixels,), (3, *layout.image_size)
            if expected is None:
                # Of another exporter: one vector a picture, of any width.
                expected = shape if len(shape) == 1 else (layout.hidden_size,)
            if dtype not in dtypes or shape != expected:
                raise BundleCorruptError(
                    f"{self.path}: {name} is {dtype} of {list(shape)} a picture, but is said to be "
                    f"{dtypes[0]} of {list(expected)} (pixels {layout.image_size[0]}x"
                    f"{layout.image_size[1]}, patch {layout.patch_size}, "
                    f"{layout.num_register_tokens} registers). {self._edited}"
                )

    @property
    def _edited(self) -> str:
        if self.record is None:
            return "Its config.json is of another model: copy it from the checkpoint."
        return "The bundle was edited: export it again."

    def _check_hash(self, path: Path) -> None:
        if self.record is None:
            regular_file(path)
            return
        name = path.relative_to(self.directory).as_posix()
        if name not in self.files:
            raise BundleCorruptError(
                f"{self.path} opens {path}, which is not among the files of the bundle's manifest. "
                f"{self._edited}"
            )
        check_file(path, self.files[name], "once")

    def _check_record(self, facts: GraphFacts, record: GraphRecord) -> None:
        found = {
            "ir_version": (facts.ir_version, record.ir_version),
            "opset": (facts.opsets.get(""), record.opset),
            "nodes": (facts.nodes, record.nodes),
            "domains": (sorted(facts.opsets), sorted(record.domains)),
        }
        for what, (has, said) in found.items():
            if has != said:
                raise BundleCorruptError(
                    f"{self.path} has {what} {has}, but is said to have {said}. {self._edited}"
                )


PortShape = tuple[str, str, tuple[int, ...]]
"""Name of an input or output, NumPy's of its element type, and its shape without the batch."""


def checked_file(path: Path, directory: Path) -> Loadable:
    """Check what ONNX Runtime would open and run for a graph.

    Every file lies in the directory, or is a link there, and is a regular one; every operator is
    of a known domain and does nothing but compute; no setting of the session comes from the file.

    Raises:
        BundleCorruptError: naming what is wrong.
    """
    facts = read_graph(path)
    if "ort_config" in facts.metadata:
        # ONNX Runtime takes it for the options of the session where ORT_LOAD_CONFIG_FROM_MODEL is
        # set in the environment.
        raise BundleCorruptError(
            f"{path} brings settings of its own for ONNX Runtime (ort_config in its metadata). "
            f"Remove them."
        )
    for domain, operator in sorted(facts.operators):
        # A function that the file itself defines is made of operators that are looked at too.
        known = domain in FOREIGN_DOMAINS or (domain, operator) in facts.functions
        if not known or operator in REFUSED_OPERATORS:
            why = REFUSED_OPERATORS.get(operator, f"is of the domain {domain!r}")
            raise BundleCorruptError(
                f"{path} has the operator {operator!r}, which {why}; graphs of standard operators "
                f"and of ONNX Runtime's own are run."
            )
    real = path.resolve()
    ends: dict[str, int] = {}
    for one in facts.external:
        end = one.offset + (one.length or 0)
        ends[one.location] = max(end, ends.get(one.location, 0))
    places: dict[str, Path] = {}
    for location, end in ends.items():
        place = _external_file(path, directory, location)
        size = regular_file(place).st_size
        if end > size:
            raise BundleCorruptError(
                f"{path} wants bytes up to {end} of {place}, which has {size}. One of them was "
                f"not written fully: export the bundle again."
            )
        places[location] = place.resolve()
    if all(place == real.parent / location for location, place in places.items()):
        return Loadable(real, None, facts)
    folder = Path(os.path.commonpath([place.parent for place in places.values()]))
    moved = {name: place.relative_to(folder).as_posix() for name, place in places.items()}
    return Loadable(relocated(path, moved), folder, facts)


def check_file(path: Path, record: FileRecord, large: Literal["now", "once", "never"]) -> None:
    """Compare a file with its record: what it is, its size, its SHA-256.

    Args:
        path: the file.
        record: what it must be.
        large: when a large file is hashed: ``now``, ``once`` (not again where it is remembered,
            see `vistower.bundle.hashes`), or ``never``.

    Raises:
        BundleCorruptError: naming the difference.
    """
    size = regular_file(path).st_size
    if size != record.size:
        raise BundleCorruptError(
            f"{path} has {size} bytes, but its manifest says {record.size}. It was edited or not "
            f"written fully: export the bundle again."
        )
    if size > HASHED_ALWAYS and large == "never":
        return
    hashed = sha256 if size <= HASHED_ALWAYS else sha256_anew if large == "now" else sha256_once
    try:
        digest = hashed(path)
    except OSError as error:
        raise BundleCorruptError(f"{path} cannot be read ({error}).") from error
    if digest != record.sha256:
        raise BundleCorruptError(
            f"{path} is not the file its manifest describes (SHA-256 differs). It was edited: "
            f"export the bundle again."
        )


def held_precision(path: Path, facts: GraphFacts) -> GraphPrecision:
    """The precision of what a graph holds, by the types of its tensors and by its operators.

    Raises:
        BundleCorruptError: it mixes float16 and bfloat16.
    """
    types = facts.element_types
    if types - _WIDE or any(_QUANTIZED.search(operator) for _, operator in facts.operators):
        return "int8"
    if {_HALF, _BRAIN} <= types:
        raise BundleCorruptError(f"{path} mixes float16 and bfloat16, which no precision here is.")
    if _HALF in types:
        return "fp16"
    return "bf16" if _BRAIN in types else "fp32"


def _external_file(path: Path, directory: Path, location: str) -> Path:
    """The file of tensors that lie outside the graph's.

    Raises:
        BundleCorruptError: its name leaves the bundle.
    """
    # "*/_ORT_MEM_ADDR_/*" is an address in memory to ONNX Runtime: a file's name has no asterisk.
    if not is_file_name(location):
        raise BundleCorruptError(
            f"{path} keeps weights in {location!r}, which is no relative path inside the bundle "
            f"{directory}."
        )
    return path.parent / PurePosixPath(location)


def _weight_files(path: Path, external: tuple[External, ...]) -> Iterator[Path]:
    for location in sorted({one.location for one in external}):
        yield path.parent / PurePosixPath(location)
