"""``vistower.json``: what a bundle says about itself, as frozen dataclasses.

The exporter writes it last, so a directory that has one is complete. Unknown keys are an error:
a bundle of a newer vistower is refused instead of half-understood.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistower.errors import BundleCorruptError, BundleUnsupportedError
from vistower.preprocess.processor import Pixels, Transparency
from vistower.tokens import TokenLayout
from vistower.tolerance import TOLERANCES, GraphPrecision

MANIFEST_FILE = "vistower.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Source:
    """The checkpoint a bundle was made from.

    ``revision`` is the resolved commit of a hub id; ``files`` maps the weight files of a local
    directory to (size in bytes, modification time in ns), so that a changed one is noticed.
    """

    model: str
    name: str
    revision: str | None
    random_weight: bool
    files: Mapping[str, tuple[int, int]]


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
class Parity:
    """A graph compared with torch + transformers in float32, from image file to tokens.

    Over all tokens, registers too: ``max_abs`` is the largest absolute difference, ``max_rel`` the
    largest difference divided by the L2 norm of its token, ``cosine`` the smallest token cosine.
    ``images`` are the pictures used; ``method`` says what computed the graph's side.
    """

    max_abs: float
    max_rel: float
    cosine: float
    cls: TokenParity
    patches: TokenParity
    token_norm: float
    images: tuple[str, ...]
    method: str


@dataclass(frozen=True)
class GraphRecord:
    """One ONNX graph of a bundle and its parity certificate.

    ``image_size`` is (height, width) in pixels. ``pixels`` is the type of ``pixel_values``:
    float32 as the processor gives them, or the uint8 levels before it rescales and normalizes,
    which the graph then does. ``calibration`` says which pictures decided the
    ranges of an int8 graph, ``float_products`` which matrix products of it stayed in float32.
    """

    file: str
    precision: GraphPrecision
    image_size: tuple[int, int]
    pixels: Pixels
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

    ``layout`` is that of the bundle's default resolution; ``graphs`` maps a graph's name
    (``portable``, ``ort``, ``int8``; of a further resolution ``ort@512x768``) to its record;
    ``made_with`` maps a library to its version; ``export_peak_bytes`` is the exporter's peak
    resident memory and ``weight_bytes`` the size of the float32 matrices.
    """

    format_version: int
    model_type: str
    hf_class: str
    source: Source
    layout: TokenLayout
    preprocessing: Preprocessing
    graphs: Mapping[str, GraphRecord]
    golden: str
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
            BundleCorruptError: it is not the JSON an exporter writes.
            BundleUnsupportedError: its format version is another one.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleCorruptError(
                f"{path} cannot be read as JSON ({error}). Export the bundle again."
            ) from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise BundleUnsupportedError(
                f"{path} has format version {version!r}; this vistower reads {FORMAT_VERSION}. "
                f"Export the bundle again, or install the vistower that wrote it."
            )
        try:
            return _manifest(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleCorruptError(
                f"{path} is not a manifest an exporter wrote ({type(error).__name__}: {error}). "
                f"Export the bundle again."
            ) from error


def _manifest(data: dict[str, Any]) -> Manifest:
    source = dict(data["source"])
    source["files"] = {name: (pair[0], pair[1]) for name, pair in source["files"].items()}
    layout = dict(data["layout"])
    height, width = layout["image_size"]
    layout["image_size"] = (int(height), int(width))
    graphs = {}
    for kind, record in data["graphs"].items():
        parity = {
            **record["parity"],
            "cls": TokenParity(**record["parity"]["cls"]),
            "patches": TokenParity(**record["parity"]["patches"]),
            "images": tuple(record["parity"]["images"]),
        }
        if record["precision"] not in TOLERANCES:
            raise ValueError(f"unknown precision {record['precision']!r}")
        height, width = record["image_size"]
        fields = {
            "parity": Parity(**parity),
            "image_size": (int(height), int(width)),
            "domains": tuple(record["domains"]),
            "float_products": tuple(record["float_products"]),
        }
        graphs[kind] = GraphRecord(**{**record, **fields})
    return Manifest(
        **{
            **data,
            "source": Source(**source),
            "layout": TokenLayout(**layout),
            "preprocessing": Preprocessing(**data["preprocessing"]),
            "graphs": graphs,
            "files": {name: FileRecord(**record) for name, record in data["files"].items()},
        }
    )
