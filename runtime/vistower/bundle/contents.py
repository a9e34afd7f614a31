"""The artifact on disk: what a bundle holds and whether it is whole.

A bundle is a directory with ``config.json``, ``preprocessor_config.json``, ONNX graphs and, when
vistower's exporter wrote it, ``vistower.json``. Without the last (``optimum-cli export onnx``,
public ONNX repositories) the token layout is read from ``config.json``.

Nothing in it is believed: docs/bundle.md says what is checked when. Files may be links, as in the
caches of a model hub, git-annex or DVC: what counts is the content, whose hash the manifest has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vistower.bundle.configs import (
    check_config,
    check_processor,
    family_of,
    layout_of,
    read_config,
    tower_part,
)
from vistower.bundle.graph_file import read_graph
from vistower.bundle.graphs import BundleGraph, check_file, held_precision
from vistower.bundle.manifest import CONFIG_FILE, MANIFEST_FILE, PROCESSOR_FILE, Manifest
from vistower.bundle.reading import read_json, regular_file
from vistower.errors import BundleCorruptError, BundleNotFoundError
from vistower.families import Family
from vistower.lazy import cached_property
from vistower.preprocess.processor import Pixels, Preprocessor
from vistower.printable import printable
from vistower.tokens import TokenLayout
from vistower.tolerance import GraphPrecision

PLAIN_GRAPHS = ("onnx/vision_model.onnx", "onnx/model.onnx", "vision_model.onnx", "model.onnx")
"""Where a bundle without ``vistower.json`` keeps its graph: hub repositories, then optimum-cli. Of
a model with a text tower ``model.onnx`` holds both towers, and ``vision_model.onnx`` the one."""

MOST_PLAIN = 64
"""Graphs of such a bundle that are looked at."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk; ``manifest`` is None where vistower's exporter did not write it."""

    directory: Path
    manifest: Manifest | None

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Bundle:
        """Load and check the bundle in a directory.

        Large files are hashed when a graph that needs them is opened, see `BundleGraph.checked`.

        Raises:
            BundleNotFoundError: the directory does not exist or holds no bundle.
            BundleCorruptError: a file is missing or is not what the manifest says, or the files
                contradict each other.
            BundleUnsupportedError: unknown format version or architecture.
            ProcessorConfigError: an option of the image processor that is not reproduced.
        """
        path = Path(directory)
        if not is_directory(path):
            raise BundleNotFoundError(
                f"There is no directory {path}. Give the directory `vistower export` wrote."
            )
        manifest = None
        # A link to nowhere is no bundle of another exporter.
        if os.path.lexists(path / MANIFEST_FILE):
            manifest = Manifest.read(path / MANIFEST_FILE)
        # Absolute: it may be unpickled in another working directory.
        bundle = cls(Path(os.path.abspath(path)), manifest)  # noqa: PTH100
        if manifest is None:
            bundle._check_foreign()
            return bundle
        for name, record in manifest.files.items():
            check_file(path / name, record, "never")
        layout = manifest.layout
        check_config(path / CONFIG_FILE, bundle.config, bundle.family, layout, manifest.native_size)
        check_processor(path / PROCESSOR_FILE, bundle.preprocessor, layout.image_size)
        return bundle

    def _check_foreign(self) -> None:
        graph = plain_graph(self.directory)
        if graph is None:
            raise BundleNotFoundError(nothing_here(self.directory))
        regular_file(graph)
        for name in (CONFIG_FILE, PROCESSOR_FILE):
            if not os.path.lexists(self.directory / name):
                raise BundleCorruptError(
                    f"{self.directory} has an ONNX graph but no {name}. Copy it from the "
                    f"checkpoint the graph was exported from."
                )
        # Reads, compares and refuses.
        _ = self.layout, self._graphs

    def check(self) -> None:
        """Compare every file's SHA-256 with the manifest, and every graph with its record.

        Everything is hashed, and what was remembered of it is renewed. A bundle without a
        manifest has no hashes to compare with.

        Raises:
            BundleCorruptError: naming the first file that is missing or differs.
        """
        if self.manifest is not None:
            for name, record in self.manifest.files.items():
                check_file(self.directory / name, record, "now")
        for graph in self.graphs:
            graph.checked()

    @property
    def name(self) -> str:
        """The checkpoint's name, e.g. ``clip-vit-base-patch32``."""
        if self.manifest is not None:
            return self.manifest.source.name
        return printable(self.directory.resolve().name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The vision tower's part of ``config.json``, with the defaults it leaves out."""
        return tower_part(read_config(self.directory / CONFIG_FILE))

    @cached_property
    def layout(self) -> TokenLayout:
        """Where CLS, register and patch tokens lie."""
        if self.manifest is not None:
            return self.manifest.layout
        path = self.directory / CONFIG_FILE
        return layout_of(path, self.config, self.family, self.preprocessor.output_size)

    @cached_property
    def processor_config(self) -> dict[str, Any]:
        """The bundle's ``preprocessor_config.json``."""
        return read_json(self.directory / PROCESSOR_FILE)

    @cached_property
    def preprocessor(self) -> Preprocessor:
        """The image processor of ``preprocessor_config.json``, reproduced in NumPy."""
        config = self.processor_config
        if self.manifest is None:
            return Preprocessor.from_config(config)
        reference = self.manifest.preprocessing
        return Preprocessor.from_config(
            config,
            backend=reference.backend,
            transparency=reference.transparency,
            transformers=self.manifest.made_with["transformers"],
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

    @cached_property
    def family(self) -> Family:
        """The record of the tower's family."""
        if self.manifest is not None:
            return family_of(self.directory / MANIFEST_FILE, self.manifest.model_type)
        return family_of(self.directory / CONFIG_FILE, self.config.get("model_type"))

    @property
    def model_type(self) -> str:
        """The tower's family by name, e.g. ``dinov3_vit``."""
        return self.family.model_type

    @cached_property
    def _kernel(self) -> tuple[int, int]:
        """Side and width of the first product, see `BundleGraph.kernel`."""
        return self.family.kernel(self.config, self.layout.patch_size)

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
            # A graph beside the one of another exporter is had by its name only.
            if graph.record is None and graph.name != "portable":
                continue
            # With ONNX Runtime's own operators it is the faster of two of one precision.
            if graph.precision not in found or found[graph.precision].portable:
                found[graph.precision] = graph
        return found

    @property
    def graphs(self) -> Iterator[BundleGraph]:
        """Every graph."""
        return iter(self._graphs.values())

    def _plain(self, name: str, path: Path) -> BundleGraph:
        """A graph of another exporter."""
        facts = read_graph(path)
        return BundleGraph(
            name=name,
            path=path,
            precision=held_precision(path, facts),
            pixels="float32",
            portable=all(domain == "" for domain, _ in facts.operators),
            layout=self.layout,
            kernel=self._kernel,
            directory=self.directory,
            record=None,
            files={},
        )

    @cached_property
    def _graphs(self) -> dict[str, BundleGraph]:
        if self.manifest is None:
            plain = plain_graph(self.directory)
            assert plain is not None  # noqa: S101  (load() found it)
            graphs = {"portable": self._plain("portable", plain)}
            for path in sorted(plain.parent.glob(f"{plain.stem}_*.onnx"))[:MOST_PLAIN]:
                graphs[path.stem] = self._plain(path.stem, path)
            return graphs
        return {
            name: BundleGraph(
                name=name,
                path=self.directory / record.file,
                precision=record.precision,
                pixels=record.pixels,
                portable=not set(record.domains) - {""},
                layout=self.layout_at(record.image_size),
                kernel=self._kernel,
                directory=self.directory,
                record=record,
                files=self.manifest.files,
            )
            for name, record in self.manifest.graphs.items()
        }


def is_directory(path: Path) -> bool:
    """Whether there is such a directory; of a path that no system takes, there is none."""
    try:
        return path.is_dir()
    # Too long a name, a loop of links, no permission on the way there, a NUL.
    except (OSError, ValueError):
        return False


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def plain_graph(directory: Path) -> Path | None:
    """The graph of a bundle without a manifest, if the directory has one, be it a dead link."""
    return next(
        (directory / name for name in PLAIN_GRAPHS if os.path.lexists(directory / name)), None
    )


def holds_bundle(directory: Path) -> bool:
    """Whether a directory is meant to be a bundle, be it a broken one."""
    return os.path.lexists(directory / MANIFEST_FILE) or plain_graph(directory) is not None


def nothing_here(path: Path) -> str:
    """What to say of a directory that holds no bundle."""
    try:
        files = sorted(entry.name for entry in path.iterdir())[:8]
        found = ", ".join(files) if files else "nothing"
    except OSError as error:
        found = f"it cannot be read: {error.strerror}"
    return (
        f"{path} holds no bundle (found: {found}). A bundle has {MANIFEST_FILE}, or {CONFIG_FILE}, "
        f"{PROCESSOR_FILE} and onnx/model.onnx: make one with `vistower export`."
    )
