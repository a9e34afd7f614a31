"""The artifact on disk: what a bundle holds and whether it is whole.

A bundle is a directory with ``config.json``, ``preprocessor_config.json``, ONNX graphs and, when
vistower's exporter wrote it, ``vistower.json``. Without the last (``optimum-cli export onnx``,
public ONNX repositories) the token layout is read from ``config.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vistower.backbones import BACKBONES, CONFIG_DEFAULTS
from vistower.bundle.manifest import MANIFEST_FILE, Manifest
from vistower.errors import BundleCorruptError, BundleNotFoundError, BundleUnsupportedError
from vistower.lazy import cached_property
from vistower.preprocess.processor import Pixels, Preprocessor
from vistower.tokens import TokenLayout
from vistower.tolerance import GraphPrecision

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
PLAIN_GRAPHS = ("onnx/model.onnx", "model.onnx")
"""Where a bundle without ``vistower.json`` keeps its graph: hub repositories, then optimum-cli."""

_HASH_AT_OPEN = 1 << 20
"""Files up to this many bytes are hashed when a bundle is opened; larger ones only compared in
size, so that opening stays fast. ``vistower verify`` hashes all."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk; ``manifest`` is None where vistower's exporter did not write it."""

    directory: Path
    manifest: Manifest | None

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Bundle:
        """Load and check the bundle in a directory.

        Raises:
            BundleNotFoundError: the directory does not exist or holds no bundle.
            BundleCorruptError: a file is missing or is not what the manifest says.
            BundleUnsupportedError: unknown format version or architecture.
        """
        path = Path(directory)
        if not path.is_dir():
            raise BundleNotFoundError(
                f"There is no directory {path}. Give the directory `vistower export` wrote."
            )
        if (path / MANIFEST_FILE).is_file():
            bundle = cls(path, Manifest.read(path / MANIFEST_FILE))
            bundle.check(hash_up_to=_HASH_AT_OPEN)
            return bundle
        if plain_graph(path) is None:
            raise BundleNotFoundError(nothing_here(path))
        for name in (CONFIG_FILE, PROCESSOR_FILE):
            if not (path / name).is_file():
                raise BundleCorruptError(
                    f"{path} has an ONNX graph but no {name}. Copy it from the checkpoint the "
                    f"graph was exported from."
                )
        return cls(path, None)

    def check(self, *, hash_up_to: int | None = None) -> None:
        """Compare every file with the manifest: its size, and its SHA-256 up to a size in bytes.

        ``hash_up_to=None`` hashes all. A bundle without a manifest has nothing to compare with.

        Raises:
            BundleCorruptError: naming the first file that is missing or differs.
        """
        if self.manifest is None:
            return
        for name, record in self.manifest.files.items():
            path = self.directory / name
            if not path.is_file():
                raise BundleCorruptError(
                    f"The bundle {self.directory} lacks {name}. Export it again."
                )
            size = path.stat().st_size
            if size != record.size:
                raise BundleCorruptError(
                    f"{path} has {size} bytes, but its manifest says {record.size}. It was edited "
                    f"or not written fully: export the bundle again."
                )
            if (hash_up_to is None or size <= hash_up_to) and sha256(path) != record.sha256:
                raise BundleCorruptError(
                    f"{path} is not the file its manifest describes (SHA-256 differs). It was "
                    f"edited: export the bundle again."
                )

    @property
    def name(self) -> str:
        """The checkpoint's name, e.g. ``clip-vit-base-patch32``."""
        return self.manifest.source.name if self.manifest else self.directory.resolve().name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The vision tower's part of ``config.json``, with the defaults it leaves out."""
        config = _read_json(self.directory / CONFIG_FILE)
        vision = config.get("vision_config")
        if isinstance(vision, dict):
            known = (
                {"model_type": "clip_vision_model"} if config.get("model_type") == "clip" else {}
            )
            config = known | vision
        return {**CONFIG_DEFAULTS.get(str(config.get("model_type")), {}), **config}

    @cached_property
    def layout(self) -> TokenLayout:
        """Where CLS, register and patch tokens lie."""
        if self.manifest is not None:
            return self.manifest.layout
        config = self.config
        model_type = config.get("model_type")
        if model_type not in {backbone.family for backbone in BACKBONES.values()}:
            raise BundleUnsupportedError(
                f"{self.directory / CONFIG_FILE} says model_type={model_type!r}; without a "
                f"{MANIFEST_FILE} only clip_vision_model and dinov3_vit are understood."
            )
        try:
            return TokenLayout(
                image_size=self.preprocessor.output_size,
                patch_size=int(config["patch_size"]),
                num_register_tokens=int(config.get("num_register_tokens", 0)),
                hidden_size=int(config["hidden_size"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BundleCorruptError(
                f"{self.directory / CONFIG_FILE} does not describe the tower ({error!r})."
            ) from error

    @cached_property
    def preprocessor(self) -> Preprocessor:
        """The image processor of ``preprocessor_config.json``, reproduced in NumPy."""
        config = _read_json(self.directory / PROCESSOR_FILE)
        if self.manifest is None:
            return Preprocessor.from_config(config)
        reference = self.manifest.preprocessing
        return Preprocessor.from_config(
            config, backend=reference.backend, transparency=reference.transparency
        )

    def layout_at(self, resolution: tuple[int, int]) -> TokenLayout:
        """Where the tokens lie for pictures of (height, width) pixels."""
        return replace(self.layout, image_size=resolution)

    def preprocessor_at(
        self, resolution: tuple[int, int], pixels: Pixels = "float32"
    ) -> Preprocessor:
        """The image processor that gives (height, width) pixels of a type."""
        preprocessor = self.preprocessor
        if resolution != preprocessor.output_size:
            preprocessor = preprocessor.resized(resolution)
        return preprocessor if pixels == "float32" else preprocessor.as_levels()

    @property
    def resolutions(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every input size there is a graph for, the default one first."""
        sizes = {self.layout.image_size: None}
        if self.manifest is not None:
            sizes |= {record.image_size: None for record in self.manifest.graphs.values()}
        return tuple(sizes)

    @property
    def model_type(self) -> str:
        """The tower's family, e.g. ``dinov3_vit``."""
        return self.manifest.model_type if self.manifest else str(self.config.get("model_type"))

    def graph(self, name: str) -> BundleGraph:
        """A graph by its name.

        Raises:
            BundleNotFoundError: the bundle has no such graph.
        """
        graphs = self._graphs
        if name not in graphs:
            raise BundleNotFoundError(
                f"{self.directory} has no graph {name!r}; it has {', '.join(graphs)}."
            )
        return graphs[name]

    def graphs_at(
        self,
        resolution: tuple[int, int] | None = None,
        *,
        portable: bool = False,
        pixels: Pixels = "float32",
    ) -> dict[GraphPrecision, BundleGraph]:
        """The fastest graph of each precision there is.

        Args:
            resolution: (height, width) in pixels; None for the bundle's default.
            portable: only graphs of standard operators.
            pixels: what the graph takes, see `GraphRecord`.

        Raises:
            BundleNotFoundError: the bundle has no graph of this resolution.
        """
        size = resolution or self.layout.image_size
        if size not in self.resolutions:
            raise BundleNotFoundError(
                f"{self.directory} has no graph for {_pixels(size)} pixels; it has "
                f"{', '.join(map(_pixels, self.resolutions))}. Export the checkpoint again with "
                f"--resolution {_pixels(size)}."
            )
        found: dict[GraphPrecision, BundleGraph] = {}
        for graph in self._graphs.values():
            if graph.resolution != size or graph.pixels != pixels:
                continue
            if portable and not graph.portable:
                continue
            # With ONNX Runtime's own operators it is the faster of two of one precision.
            if graph.precision not in found or found[graph.precision].portable:
                found[graph.precision] = graph
        return found

    @cached_property
    def _graphs(self) -> dict[str, BundleGraph]:
        if self.manifest is None:
            plain = plain_graph(self.directory)
            assert plain is not None  # noqa: S101  (load() found it)
            size = self.layout.image_size
            return {"portable": BundleGraph("portable", plain, "fp32", size, "float32", True)}
        return {
            name: BundleGraph(
                name=name,
                path=self.directory / record.file,
                precision=record.precision,
                resolution=record.image_size,
                pixels=record.pixels,
                portable=not set(record.domains) - {""},
            )
            for name, record in self.manifest.graphs.items()
        }


@dataclass(frozen=True)
class BundleGraph:
    """A graph of a bundle: its name and file, its precision, the (height, width) it takes, of
    which pixels, and whether it has standard operators only."""

    name: str
    path: Path
    precision: GraphPrecision
    resolution: tuple[int, int]
    pixels: Pixels
    portable: bool


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def plain_graph(directory: Path) -> Path | None:
    """The graph of a bundle without a manifest, if the directory has one."""
    return next((directory / name for name in PLAIN_GRAPHS if (directory / name).is_file()), None)


def nothing_here(path: Path) -> str:
    """What to say of a directory that holds no bundle."""
    files = sorted(entry.name for entry in path.iterdir())[:8]
    found = ", ".join(files) if files else "nothing"
    return (
        f"{path} holds no bundle (found: {found}). A bundle has {MANIFEST_FILE}, or {CONFIG_FILE}, "
        f"{PROCESSOR_FILE} and onnx/model.onnx: make one with `vistower export`."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleCorruptError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(data, Mapping):
        raise BundleCorruptError(f"{path} holds {type(data).__name__}, not a JSON object.")
    return dict(data)
