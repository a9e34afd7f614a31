"""``vistower.json``: what a bundle says about itself, as frozen dataclasses.

The exporter writes it last, so a directory that has one is complete. It is checked whole, by
`MANIFEST` and `_check_relations`, before any other file is opened; docs/bundle.md is its reference.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from vistower.bundle.reading import read_json
from vistower.errors import BundleCorruptError, BundleUnsupportedError, ProcessorConfigError
from vistower.families.record import LAST_HIDDEN_STATE, OUTPUTS
from vistower.preprocess.processor import Backend, Pixels, Transparency
from vistower.preprocess.release import Release
from vistower.schema import (
    Choice,
    Flag,
    ListOf,
    MapOf,
    Maybe,
    Real,
    Record,
    SchemaError,
    Text,
    Whole,
)
from vistower.tokens import TokenLayout
from vistower.tolerance import TOLERANCES, GraphPrecision

MANIFEST_FILE = "vistower.json"
CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
GOLDEN_FILE = "golden/golden.npz"
FORMAT_VERSION = 2
"""2: graphs list their outputs, and every one has its certificate."""

DOMAINS = ("", "com.microsoft")
"""Operator domains of a bundle's graphs: the standard's, and ONNX Runtime's own."""

MOST_FILES = 4096
MOST_GRAPHS = 512

_BYTES = Whole(0, 1 << 62)
_FILE_BYTES = Whole(0, 128 << 30)
"""Bytes of a file; the weights of the largest tower known have 27 GB."""

_TIME = Whole(-(1 << 63), 1 << 63)
_SHA256 = Text(r"[0-9a-f]{64}", "64 hexadecimal digits")
_SIDE = Whole(1, 1 << 14)
"""Pixels of a picture's or a patch's side."""

_SIZE = ListOf(_SIDE, 2, 2)
_LENGTH = Whole(1, 1 << 22)
"""Tokens of a picture, or numbers of a vector."""

_FILE = Text(
    r"(?!\.\.?(/|$))[^\\/:*?\"<>|]+(/(?!\.\.?(/|$))[^\\/:*?\"<>|]+)*",
    "a relative path inside the bundle, its parts joined by /",
)
_DIFFERENCE = Real(0, 1e30)
_COSINE = Real(-1.001, 1.001)
_TOKENS = Record({"max_abs": _DIFFERENCE, "cosine": _COSINE, "cosine_mean": _COSINE})

_VECTOR = Record(
    {
        "max_abs": _DIFFERENCE,
        "max_rel": _DIFFERENCE,
        "cosine": _COSINE,
        "cosine_mean": _COSINE,
        "norm": _DIFFERENCE,
    }
)

_PARITY = Record(
    {
        "max_abs": _DIFFERENCE,
        "max_rel": _DIFFERENCE,
        "cosine": _COSINE,
        "cls": Maybe(_TOKENS),
        "patches": _TOKENS,
        "token_norm": _DIFFERENCE,
        "vectors": MapOf(Choice(tuple(OUTPUTS)), _VECTOR, 0, len(OUTPUTS)),
        "images": ListOf(Text(), 0, 4096),
        "method": Text(),
    }
)

_GRAPH = Record(
    {
        "file": _FILE,
        "precision": Choice(tuple(TOLERANCES)),
        "image_size": _SIZE,
        "pixels": Choice(get_args(Pixels)),
        "outputs": MapOf(Choice(tuple(OUTPUTS)), ListOf(_LENGTH, 1, 2), 1, len(OUTPUTS)),
        "opset": Whole(1, 1000),
        "ir_version": Whole(1, 1000),
        "nodes": Whole(1, 1 << 20),
        "domains": ListOf(Choice(DOMAINS), 1, len(DOMAINS)),
        "parity": _PARITY,
        "calibration": Maybe(Text()),
        "float_products": ListOf(Text(), 0, 4096),
    }
)

MANIFEST = Record(
    {
        "format_version": Whole(FORMAT_VERSION, FORMAT_VERSION),
        "model_type": Text(r"\w+", "a model type such as dinov3_vit", 64),
        "hf_class": Text(r"\w+", "the name of a class", 64),
        "source": Record(
            {
                "model": Text(),
                "name": Text(),
                "revision": Maybe(Text(longest=256)),
                "random_weight": Flag(),
                "files": MapOf(
                    Text(), Record({"size": _BYTES, "mtime_ns": _TIME, "sha256": _SHA256}), 0, 4096
                ),
            }
        ),
        "layout": Record(
            {
                "image_size": _SIZE,
                "patch_size": _SIDE,
                "num_register_tokens": Whole(0, 4096),
                "hidden_size": Whole(1, 1 << 16),
                "num_cls_tokens": Whole(0, 1),
            }
        ),
        "native_size": Maybe(_SIZE),
        "preprocessing": Record(
            {
                "processor": Text(r"\w+", "the name of a class", 64),
                "backend": Choice(get_args(Backend)),
                "transparency": Choice(get_args(Transparency)),
                "max_abs": _DIFFERENCE,
            }
        ),
        "graphs": MapOf(
            Text(r"\w+(@[0-9]+x[0-9]+)?", "a graph's name such as ort or ort@512x768", 64),
            _GRAPH,
            1,
            MOST_GRAPHS,
        ),
        "made_with": MapOf(Text(longest=64), Text(longest=64), 0, 64),
        "weight_bytes": _BYTES,
        "export_peak_bytes": _BYTES,
        "files": MapOf(
            _FILE,
            Record({"size": _FILE_BYTES, "sha256": _SHA256}),
            1,
            MOST_FILES,
        ),
    }
)
"""What `Manifest.read` takes."""


def is_file_name(name: str) -> bool:
    """Whether a text is a path that stays inside the bundle, on every system."""
    try:
        _FILE.check(name, "")
    except SchemaError:
        return False
    return True


@dataclass(frozen=True)
class SourceFile:
    """Size in bytes, time of modification in ns and SHA-256 of a checkpoint's file."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """The checkpoint a bundle was made from.

    ``revision`` is the resolved commit of a hub id; ``files`` maps the files of a local directory
    that were read to what they were, so that a changed one is noticed.
    """

    model: str
    name: str
    revision: str | None
    random_weight: bool
    files: Mapping[str, SourceFile]


@dataclass(frozen=True)
class Preprocessing:
    """The Hugging Face processor that ``pixel_values`` agree with.

    ``transparency`` is what becomes of an alpha channel, see
    `vistower.preprocess.processor.Preprocessor`; ``max_abs`` the largest difference on normalized
    pixels the parity gate measured.
    """

    processor: str
    backend: str
    transparency: Transparency
    max_abs: float


@dataclass(frozen=True)
class TokenParity:
    """Largest absolute difference, smallest and mean cosine of some tokens with torch's."""

    max_abs: float
    cosine: float
    cosine_mean: float


@dataclass(frozen=True)
class VectorParity:
    """An output of one vector a picture, compared with torch's.

    ``max_rel`` is the largest difference over the L2 norm of its vector, ``norm`` the mean norm;
    the others as of `TokenParity`.
    """

    max_abs: float
    max_rel: float
    cosine: float
    cosine_mean: float
    norm: float


@dataclass(frozen=True)
class Parity:
    """A graph compared with torch + transformers in float32, from image file to every output.

    Over all tokens, registers too: ``max_abs`` is the largest absolute difference, ``max_rel`` the
    largest difference divided by the L2 norm of its token, ``cosine`` the smallest token cosine.
    ``cls`` is None where there is no CLS token; ``vectors`` are the other outputs by name.
    ``images`` are the pictures used; ``method`` says what computed the graph's side.
    """

    max_abs: float
    max_rel: float
    cosine: float
    cls: TokenParity | None
    patches: TokenParity
    token_norm: float
    images: tuple[str, ...]
    method: str
    vectors: Mapping[str, VectorParity]

    @property
    def compared(self) -> dict[str, Parity | VectorParity]:
        """Every output by name: ``max_abs``, ``max_rel`` and ``cosine`` of each."""
        return {LAST_HIDDEN_STATE: self, **self.vectors}


@dataclass(frozen=True)
class GraphRecord:
    """One ONNX graph of a bundle and its parity certificate.

    ``image_size`` is (height, width) in pixels. ``pixels`` is the type of ``pixel_values``:
    float32 as the processor gives them, or the uint8 levels before it rescales and normalizes,
    which the graph then does. ``outputs`` maps each output to its shape without the batch.
    ``calibration`` says which pictures decided the
    ranges of an int8 graph, ``float_products`` which matrix products of it stayed in float32.
    """

    file: str
    precision: GraphPrecision
    image_size: tuple[int, int]
    pixels: Pixels
    outputs: Mapping[str, tuple[int, ...]]
    opset: int
    ir_version: int
    nodes: int
    domains: tuple[str, ...]
    parity: Parity
    calibration: str | None = None
    float_products: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything in ``vistower.json``.

    ``layout`` is that of the bundle's default resolution, ``native_size`` (height, width) in pixels
    what the position embedding was learned for, None without one; ``graphs`` maps a graph's name
    (``portable``, ``ort``, ``int8``; of a further resolution ``ort@512x768``) to its record;
    ``made_with`` maps a library to its version; ``export_peak_bytes`` is the exporter's peak
    resident memory and ``weight_bytes`` the size of the float32 matrices.
    """

    format_version: int
    model_type: str
    hf_class: str
    source: Source
    layout: TokenLayout
    native_size: tuple[int, int] | None
    preprocessing: Preprocessing
    graphs: Mapping[str, GraphRecord]
    made_with: Mapping[str, str]
    weight_bytes: int
    export_peak_bytes: int
    files: Mapping[str, FileRecord]

    def to_json(self) -> str:
        """The manifest as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a ``vistower.json``.

        Raises:
            BundleCorruptError: it is not what an exporter writes; the message names the place.
            BundleUnsupportedError: its format version is not known.
        """
        data = read_json(path)
        version = data.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise BundleUnsupportedError(
                f"{path} has format version {version!r:.50}; this vistower reads {FORMAT_VERSION}. "
                f"Export the bundle again, or install the vistower that wrote it."
            )
        try:
            MANIFEST.check(data, "")
            manifest = _manifest(data)
            _check_relations(manifest)
        except SchemaError as error:
            raise BundleCorruptError(
                f"{path} is not a manifest an exporter wrote: {error}. Export the bundle again."
            ) from error
        return manifest


def _manifest(data: dict[str, Any]) -> Manifest:
    """The dataclasses of what `MANIFEST` has checked."""
    source = dict(data["source"])
    source["files"] = {name: SourceFile(**record) for name, record in source["files"].items()}
    graphs = {}
    for kind, record in data["graphs"].items():
        parity = {
            **record["parity"],
            "cls": None if (cls := record["parity"]["cls"]) is None else TokenParity(**cls),
            "patches": TokenParity(**record["parity"]["patches"]),
            "images": tuple(record["parity"]["images"]),
            "vectors": {
                name: VectorParity(**vector) for name, vector in record["parity"]["vectors"].items()
            },
        }
        fields = {
            "parity": Parity(**parity),
            "image_size": _pair(record["image_size"]),
            "outputs": {name: tuple(shape) for name, shape in record["outputs"].items()},
            "domains": tuple(record["domains"]),
            "float_products": tuple(record["float_products"]),
        }
        graphs[kind] = GraphRecord(**{**record, **fields})
    layout = {**data["layout"], "image_size": _pair(data["layout"]["image_size"])}
    return Manifest(
        **{
            **data,
            "source": Source(**source),
            "layout": TokenLayout(**layout),
            "native_size": None if data["native_size"] is None else _pair(data["native_size"]),
            "preprocessing": Preprocessing(**data["preprocessing"]),
            "graphs": graphs,
            "files": {name: FileRecord(**record) for name, record in data["files"].items()},
        }
    )


def _pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


def _check_relations(manifest: Manifest) -> None:
    """What must hold between the fields.

    Raises:
        SchemaError: naming the place.
    """
    files = manifest.files
    for name in (CONFIG_FILE, PROCESSOR_FILE, GOLDEN_FILE):
        if name not in files:
            raise SchemaError(f"files lacks {name}")
    if MANIFEST_FILE in files:
        raise SchemaError(f"files has {MANIFEST_FILE} itself")
    try:
        Release.of(manifest.made_with.get("transformers", ""))
    except ProcessorConfigError as error:
        raise SchemaError(f"made_with.transformers: {error}") from error
    patch = manifest.layout.patch_size
    sizes = {"layout": manifest.layout.image_size}
    for name, graph in manifest.graphs.items():
        place = f"graphs.{name}"
        if graph.file not in files:
            raise SchemaError(f"{place}.file is {graph.file!r}, which is not among files")
        _, at, size = name.partition("@")
        height, width = graph.image_size
        if at and size != f"{height}x{width}":
            raise SchemaError(f"{place}.image_size is {height}x{width}, unlike its name")
        if "" not in graph.domains:
            raise SchemaError(f"{place}.domains lacks the standard one")
        sizes[place] = graph.image_size
        _check_outputs(place, manifest, graph)
    for place, (height, width) in sizes.items():
        if (height % patch or width % patch) and manifest.native_size != (height, width):
            raise SchemaError(
                f"{place}.image_size is {height}x{width}, no multiple of the patch size {patch}"
            )
    if manifest.layout.image_size not in list(sizes.values())[1:]:
        raise SchemaError("layout.image_size is that of no graph")


def _check_outputs(place: str, manifest: Manifest, graph: GraphRecord) -> None:
    """Every graph has the tokens of its layout, the same vectors as the others, and a certificate
    of each.

    Raises:
        SchemaError: naming the place.
    """
    layout = replace(manifest.layout, image_size=graph.image_size)
    tokens = graph.outputs.get(LAST_HIDDEN_STATE)
    if tokens != layout.shape(LAST_HIDDEN_STATE):
        raise SchemaError(
            f"{place}.outputs.{LAST_HIDDEN_STATE} is {list(tokens or ())}, but its layout says "
            f"{[layout.num_tokens, layout.hidden_size]}"
        )
    vectors = {name: shape for name, shape in graph.outputs.items() if name != LAST_HIDDEN_STATE}
    if any(len(shape) != 1 for shape in vectors.values()):
        raise SchemaError(f"{place}.outputs has a vector of several axes")
    if vectors.keys() != graph.parity.vectors.keys():
        raise SchemaError(f"{place}.parity.vectors is not of the outputs")
    first = next(iter(manifest.graphs.values())).outputs
    if vectors != {name: shape for name, shape in first.items() if name != LAST_HIDDEN_STATE}:
        raise SchemaError(f"{place}.outputs is unlike that of the first graph")
    if (graph.parity.cls is None) != (layout.num_cls_tokens == 0):
        raise SchemaError(f"{place}.parity.cls is unlike the layout")
