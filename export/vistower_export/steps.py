"""The export of one checkpoint: load, reference, write, gate, golden vectors, manifest, publish.

Each step takes what it requires and returns what it ensures; `export_bundle` runs them in order.
Nothing is visible under the output directory before the last step renames the staging directory
to it. The torch model is freed before ONNX Runtime loads a graph, so that the peak stays near one
copy of the weights plus one graph.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from vistower.bundle import PROCESSOR_FILE, Bundle, sha256, weight_files
from vistower.errors import OutputExistsError
from vistower.golden import GOLDEN_ARRAYS, GOLDEN_DIRECTORY
from vistower.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    FileRecord,
    GraphRecord,
    Manifest,
    Preprocessing,
    Source,
)
from vistower.ort import onnxruntime
from vistower.preprocess import Preprocessor
from vistower.session import Session
from vistower.tokens import TokenLayout
from vistower_export import reference as hf
from vistower_export.graph import IR_VERSION, OPSET, GraphKind, write_graph
from vistower_export.parity import TOLERANCES, compare, require_parity, require_same_pixels
from vistower_export.pictures import SAMPLES, write_golden_crops
from vistower_export.source import Checkpoint
from vistower_export.towers import TowerFamily, tower_config
from vistower_export.weights import arrange

GRAPH_FILES: Mapping[GraphKind, str] = {
    "portable": "onnx/model.onnx",
    "ort": "onnx/model_ort.onnx",
}
PRECISION = "fp32"

LIBRARIES = ("torch", "torchvision", "transformers", "onnx", "onnx-ir", "numpy", "pillow")
"""Libraries whose versions decide the numbers of a bundle."""

EXTERNAL_DATA_THRESHOLD = 2 * 1024**3 - 64 * 1024**2
"""Weights of this many bytes and more go beside the graph: protobuf ends at 2 GiB, and the nodes
and names of the graph need room too."""

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model and processor, and the runtime's reproduction of the processor."""

    family: TowerFamily
    model: Any
    processor: Any
    backend: str
    preprocessor: Preprocessor
    layout: TokenLayout


@dataclass(frozen=True)
class Referenced:
    """The numbers of torch + transformers, and pixel_values of the runtime that agree with them."""

    golden: tuple[Path, ...]
    reference: hf.Reference
    pixel_values: Mapping[str, Array]
    preprocessing: Preprocessing


@dataclass(frozen=True)
class GraphNodes:
    """Node count and operator domains of a graph."""

    count: int
    domains: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """The graphs in the staging directory, and the size of one graph's weights in bytes."""

    graphs: Mapping[GraphKind, GraphNodes]
    weight_bytes: int


def load(directory: Path, backend: str | None, staging: Path) -> Loaded:
    """Load model and processor, and save their configurations in the staging directory.

    Raises:
        CheckpointError, UnsupportedArchitectureError: see `vistower_export.reference`.
        ProcessorConfigError: the runtime does not reproduce an option of the processor.
    """
    family, model = hf.load_model(directory)
    backend = backend or next(iter(family.processors))
    processor = hf.load_processor(directory, family, backend)
    model.config.save_pretrained(staging)
    processor.save_pretrained(staging)
    saved = json.loads((staging / PROCESSOR_FILE).read_text(encoding="utf-8"))
    preprocessor = Preprocessor.from_config(
        saved, backend=backend, transparency=hf.transparency(processor)
    )
    config = tower_config(model.config.to_dict(), preprocessor.output_size)
    layout = TokenLayout(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_register_tokens=config.num_register_tokens,
        hidden_size=config.hidden_size,
    )
    return Loaded(family, model, processor, backend, preprocessor, layout)


def refer(loaded: Loaded, staging: Path) -> Referenced:
    """Compute what torch + transformers say of the sample pictures, and check the pixels.

    Raises:
        ParityError: the runtime's ``pixel_values`` differ from the processor's.
    """
    golden = write_golden_crops(staging / GOLDEN_DIRECTORY)
    pictures = (*SAMPLES, *golden)
    reference = hf.compute(loaded.model, loaded.processor, pictures)
    pixel_values = {path.name: loaded.preprocessor(path)[None] for path in pictures}
    max_abs = require_same_pixels(reference.pixel_values, pixel_values, TOLERANCES[PRECISION])
    name = type(loaded.processor).__name__
    preprocessing = Preprocessing(name, loaded.backend, loaded.preprocessor.transparency, max_abs)
    return Referenced(golden, reference, pixel_values, preprocessing)


def write(loaded: Loaded, staging: Path) -> Written:
    """Write both graphs, their weights beside them: so they stream, one tensor in memory a time."""
    family, model = loaded.family, loaded.model
    config = tower_config(model.config.to_dict(), loaded.layout.image_size)
    rotary = hf.rotary_tables(model, family, config.image_size)
    tower = arrange(hf.state_dict(model), config, rotary)
    nodes, weight_bytes = {}, 0
    for kind, name in GRAPH_FILES.items():
        graph = write_graph(tower, kind)
        path = staging / name
        path.parent.mkdir(exist_ok=True)
        weight_bytes = sum(
            value.const_value.nbytes
            for value in graph.graph.initializers.values()
            if value.const_value is not None
        )
        ir.save(graph, path, external_data=f"{path.name}_data")
        nodes[kind] = GraphNodes(len(graph.graph), tuple(sorted(d for d in graph.opset_imports)))
    return Written(nodes, weight_bytes)


def inline_weights(staging: Path) -> None:
    """Move the weights into the graph files: one file each, while protobuf can hold them.

    This needs two copies of the weights (the graph and its serialized form), so it waits until
    the torch model is gone.
    """
    for name in GRAPH_FILES.values():
        path = staging / name
        onnx.save(onnx.load(path), path)
        path.with_name(f"{path.name}_data").unlink()


def _run(graph: Path, pixel_values: Mapping[str, Array]) -> dict[str, Array]:
    """Tokens of every picture; the session ends here, so that no two are in memory at once."""
    session = Session(graph, "cpu")
    return {name: session.run(value) for name, value in pixel_values.items()}


def gate(
    staging: Path, layout: TokenLayout, referenced: Referenced, written: Written
) -> dict[str, GraphRecord]:
    """Run each graph on the CPU over every picture, and compare its tokens with torch's.

    Raises:
        ParityError: a graph is off by more than its precision's tolerance.
    """
    records: dict[str, GraphRecord] = {}
    for kind, name in GRAPH_FILES.items():
        tokens = _run(staging / name, referenced.pixel_values)
        parity = compare(referenced.reference.last_hidden_state, tokens, layout)
        require_parity(kind, parity, TOLERANCES[PRECISION])
        nodes = written.graphs[kind]
        records[kind] = GraphRecord(
            file=name,
            precision=PRECISION,
            opset=OPSET,
            ir_version=IR_VERSION,
            nodes=nodes.count,
            domains=nodes.domains,
            parity=parity,
        )
    return records


def write_golden(referenced: Referenced, staging: Path) -> None:
    """Store what torch + transformers say of the golden crops, for ``vistower verify``."""
    arrays: dict[str, Any] = {}
    for path in referenced.golden:
        arrays[f"{path.stem}/pixel_values"] = referenced.reference.pixel_values[path.name]
        arrays[f"{path.stem}/last_hidden_state"] = referenced.reference.last_hidden_state[path.name]
    np.savez(staging / GOLDEN_DIRECTORY / GOLDEN_ARRAYS, **arrays)


def describe(
    checkpoint: Checkpoint,
    loaded: Loaded,
    referenced: Referenced,
    written: Written,
    graphs: Mapping[str, GraphRecord],
    staging: Path,
) -> Manifest:
    """Make the manifest of everything in the staging directory."""
    made_with = {name: importlib.metadata.version(name) for name in LIBRARIES}
    made_with["onnxruntime"] = onnxruntime().__version__
    made_with["vistower"] = importlib.metadata.version("vistower")
    local = checkpoint.revision is None
    return Manifest(
        format_version=FORMAT_VERSION,
        model_type=loaded.family.model_type,
        hf_class=loaded.family.hf_class,
        source=Source(
            model=checkpoint.source,
            name=checkpoint.name,
            revision=checkpoint.revision,
            random_weight=checkpoint.random_weight,
            files=weight_files(checkpoint.directory) if local else {},
        ),
        layout=loaded.layout,
        preprocessing=referenced.preprocessing,
        graphs=graphs,
        golden=GOLDEN_DIRECTORY,
        made_with=made_with,
        weight_bytes=written.weight_bytes,
        export_peak_bytes=peak_bytes(),
        files={
            path.relative_to(staging).as_posix(): FileRecord(path.stat().st_size, sha256(path))
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        },
    )


def peak_bytes() -> int:
    """Peak resident memory of this process so far (``getrusage`` counts KiB, on macOS bytes).

    On Linux from ``VmHWM``: ``ru_maxrss`` outlives exec, and so can be the parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def export_bundle(
    checkpoint: Checkpoint,
    output: Path,
    *,
    backend: str | None = None,
    overwrite: bool = False,
    external_data_threshold: int = EXTERNAL_DATA_THRESHOLD,
    on_step: Callable[[str], None] = lambda title: None,
) -> Bundle:
    """Export a checkpoint to a bundle, or raise and leave nothing behind.

    Args:
        checkpoint: where the weights are.
        output: the bundle's directory; made, or replaced with ``overwrite``.
        backend: the processor to agree with, ``torchvision`` (default) or ``pil`` (CLIP only).
        overwrite: replace what is at ``output``.
        external_data_threshold: weights of so many bytes are stored beside the graph.
        on_step: called with the title of each step as it starts.

    Raises:
        OutputExistsError: ``output`` holds something, and ``overwrite`` is off.
        ExportError, ProcessorConfigError: the checkpoint cannot be exported exactly.
    """
    if not overwrite and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputExistsError(
            f"{output} exists and is not empty. Choose another --output, or replace it with "
            f"--overwrite."
        )
    with _staging(output) as staging:
        on_step("load the checkpoint")
        loaded = load(checkpoint.directory, backend, staging)
        on_step("compute the reference with torch")
        referenced = refer(loaded, staging)
        on_step("write the graphs")
        written = write(loaded, staging)
        loaded = replace(loaded, model=None)
        gc.collect()
        if written.weight_bytes < external_data_threshold:
            inline_weights(staging)
        on_step("compare the graphs with torch")
        graphs = gate(staging, loaded.layout, referenced, written)
        on_step("write the golden vectors and the manifest")
        write_golden(referenced, staging)
        manifest = describe(checkpoint, loaded, referenced, written, graphs, staging)
        (staging / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        _publish(staging, output)
    return Bundle.load(output)


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A hidden sibling of the output directory, gone afterwards unless it was renamed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, output: Path) -> None:
    """Rename the staging directory to the output, moving an old one out of the way first."""
    staging.chmod(0o755)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
    if not output.exists():
        staging.rename(output)
        return
    with _staging(output) as aside:
        old = output.rename(aside / "old")
        try:
            staging.rename(output)
        except OSError:
            old.rename(output)
            raise
