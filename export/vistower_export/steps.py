"""The export of one checkpoint: load, reference, write, gate, golden vectors, manifest, publish.

Each step takes what it requires and returns what it ensures; `export_bundle` runs them in order.
Nothing is visible under the output directory before the last step puts the staging directory in
its place, see `vistower.staging`. The torch model is freed before ONNX Runtime loads a graph, so
that the peak stays near one copy of the weights plus one graph.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.bundle import PROCESSOR_FILE, Bundle, record_source, sha256
from vistower.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    FileRecord,
    GraphRecord,
    Manifest,
    Preprocessing,
    Source,
    SourceFile,
)
from vistower.bundle.source_files import changed_sources
from vistower.errors import CheckpointError, UnsupportedArchitectureError
from vistower.execution.ort import onnxruntime
from vistower.families import Family
from vistower.golden import GOLDEN_ARRAYS, GOLDEN_DIRECTORY, golden_name
from vistower.places import as_output_error, require_space
from vistower.preprocess.images import ImageInput
from vistower.preprocess.processor import Preprocessor
from vistower.printable import printable
from vistower.staging import staged
from vistower.tolerance import TOLERANCES, GraphPrecision
from vistower_export import reference as hf
from vistower_export.calibrate import calibrate
from vistower_export.files import CONFIG, read_json
from vistower_export.forms import ALWAYS, BY_PRECISION, INT8, ORT
from vistower_export.graph import IR_VERSION, OPSET
from vistower_export.ownership import BUNDLE, may_write
from vistower_export.parity import (
    compare,
    require_parity,
    require_same_outputs,
    require_same_pixels,
)
from vistower_export.pictures import (
    SAMPLES,
    calibration_pictures,
    write_golden_crops,
    write_hard_pictures,
)
from vistower_export.pixels import require_same_processor
from vistower_export.source import Checkpoint
from vistower_export.towers import exporter, family_of, native_size
from vistower_export.weights import Arranged, Levels
from vistower_export.write import (
    TRIAL_DIRECTORY,
    Array,
    Graphs,
    Size,
    View,
    Written,
    least_bytes,
    run,
)

LIBRARIES = ("torch", "torchvision", "transformers", "onnx", "onnx-ir", "numpy", "pillow")
"""Libraries whose versions decide the numbers of a bundle."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model and processor, and the tower's views, the default one first.

    ``own`` is the runtime's processor as the checkpoint has it, ``native_size`` what the position
    embedding was learned for.
    """

    family: Family
    model: Any
    processor: Any
    views: tuple[View, ...]
    own: Preprocessor
    native_size: Size | None

    def options(self, view: View) -> dict[str, Any]:
        """What to ask of the processor for a view, beyond its own."""
        return {} if view.preprocessor == self.own else hf.size_options(view.preprocessor)


@dataclass(frozen=True)
class ViewReference:
    """The numbers of torch + transformers for a view, and what the runtime feeds its graphs.

    ``levels`` are the uint8 levels the pixel values are made of, where they are made of any.
    """

    reference: hf.Reference
    pixel_values: Mapping[str, Array]
    levels: Mapping[str, npt.NDArray[np.uint8]]


def load(
    directory: Path,
    backend: str | None,
    precisions: Sequence[GraphPrecision],
    resolutions: Sequence[Size],
    staging: Path,
) -> Loaded:
    """Load model and processor, and save their configurations in the staging directory.

    Raises:
        CheckpointError, UnsupportedArchitectureError: see `vistower_export.reference`.
        ProcessorConfigError: the runtime does not reproduce an option of the processor.
    """
    family = family_of(read_json(directory / CONFIG))
    for precision in precisions:
        if reason := family.refused_precisions.get(precision):
            raise UnsupportedArchitectureError(f"{family.hf_class} in {precision}: {reason}.")
    processor = hf.load_processor(directory, backend)
    saved = hf.processor_config(processor)
    preprocessor = Preprocessor.from_config(
        saved,
        backend=hf.processor_backend(processor),
        transparency=hf.transparency(processor),
        transformers=importlib.metadata.version("transformers"),
    )
    model = hf.load_model(directory)
    model.config.save_pretrained(staging)
    config = model.config.to_dict()
    own, native = preprocessor.output_size, native_size(family, config)
    if family.positions == "learned" and not resolutions and own != native:
        raise UnsupportedArchitectureError(
            f"The processor produces {own[0]}x{own[1]} pixels, but this tower's position embedding "
            f"is for {config['image_size']}: torch refuses it too. Correct crop_size in "
            f"preprocessor_config.json, or ask for --resolution {own[0]}x{own[1]}, which "
            f"interpolates the positions."
        )
    sizes = resolutions or [own]
    first = preprocessor if sizes[0] == own else preprocessor.resized(sizes[0])
    views = [
        View(
            exporter(family).tower_config(family, config, size).layout,
            first if size == sizes[0] else first.resized(size),
        )
        for size in sizes
    ]
    if first is not preprocessor:
        # What reads the bundle without vistower must feed the portable graph its size.
        saved |= hf.size_options(first)
    text = json.dumps(saved, indent=2, sort_keys=True) + "\n"
    (staging / PROCESSOR_FILE).write_text(text, encoding="utf-8")
    return Loaded(family, model, processor, tuple(views), preprocessor, native)


def view_reference(
    loaded: Loaded, view: View, pictures: Sequence[Path], staging: Path
) -> tuple[ViewReference, float]:
    """Compute what torch + transformers say of pictures, and check the runtime's pixels.

    The pixels are checked on hard pictures too, which lie in the staging directory meanwhile.

    Returns:
        The numbers, and the largest difference of the pixels.

    Raises:
        ParityError: the runtime's ``pixel_values`` differ from the processor's.
    """
    options = loaded.options(view)
    reference = hf.compute(loaded.model, loaded.processor, pictures, options)
    pixel_values = {path.name: view.preprocessor(path)[None] for path in pictures}
    max_abs = require_same_pixels(reference.pixel_values, pixel_values)
    with tempfile.TemporaryDirectory(dir=staging) as directory:
        hard = write_hard_pictures(Path(directory), view.size)
        worst = require_same_processor(loaded.processor, view.preprocessor, hard, options)
    levels = {}
    if view.preprocessor.normalization is not None:
        to_levels = view.preprocessor.as_levels()
        levels = {path.name: to_levels(path)[None] for path in pictures}
    return ViewReference(reference, pixel_values, levels), max(max_abs, worst)


def require_levels(loaded: Loaded) -> None:
    """Refuse a processor whose pixels are of no uint8 levels.

    Raises:
        ProcessorConfigError: DINOv3's, which rescales before it resizes.
    """
    loaded.views[0].preprocessor.as_levels()


def arrange_views(loaded: Loaded, *, levels: bool = False) -> tuple[Arranged, ...]:
    """The weights of each view, rearranged; matrices are made when they are asked for.

    ``levels`` folds rescaling and normalization of the pixels into them.
    """
    normalization = loaded.views[0].preprocessor.normalization if levels else None
    folded = None if normalization is None else Levels(*normalization)
    state = hf.state_dict(loaded.model)
    config, how = loaded.model.config.to_dict(), exporter(loaded.family)
    return tuple(
        how.arrange(
            state,
            how.tower_config(loaded.family, config, view.size),
            hf.positions(loaded.model, loaded.family, view.size),
            folded,
        )
        for view in loaded.views
    )


def write(
    loaded: Loaded,
    precisions: Sequence[GraphPrecision],
    calibration: tuple[Sequence[ImageInput], str],
    gate: Mapping[str, Array],
    uint8: bool,
    staging: Path,
    on_step: Callable[[str], None],
) -> Graphs:
    """Write every graph asked for; matrices stream to disk, one in memory at a time.

    ``gate`` is what the gate will run the default view's graphs on.
    """
    towers = arrange_views(loaded)
    graphs = Graphs(staging, loaded.views)
    folded = arrange_views(loaded, levels=True)
    for form in ALWAYS:
        graphs.write(form, towers)
    if uint8:
        graphs.write(ORT.with_levels(), folded)
    for precision in precisions:
        form = BY_PRECISION[precision]
        if form is INT8:
            on_step("calibrate and quantize to int8")
            calibrated = calibrate(graphs, towers, folded, *calibration, gate)
            graphs.write(form, calibrated.towers, calibrated)
            if uint8:
                graphs.write(form.with_levels(), calibrated.towers, calibrated)
        else:
            graphs.write(form, towers)
            if uint8:
                graphs.write(form.with_levels(), folded)
    return graphs


def gate(
    written: Sequence[Written], referenced: Mapping[Size, ViewReference], staging: Path
) -> dict[str, GraphRecord]:
    """Run each graph on the CPU over every picture, and compare every output with torch's.

    Raises:
        ParityError: a graph is off by more than its precision's tolerance, or has other outputs.
    """
    records: dict[str, GraphRecord] = {}
    for graph in written:
        known = referenced[graph.view.size]
        pixels = known.pixel_values if graph.form.pixels == "float32" else known.levels
        outputs, reference = run(graph.emulated or graph.path, pixels), known.reference.outputs
        require_same_outputs(graph.name, reference, outputs)
        parity = compare(reference, outputs, graph.view.layout, graph.method)
        require_parity(graph.name, parity, TOLERANCES[graph.form.precision])
        records[graph.name] = GraphRecord(
            file=graph.path.relative_to(staging).as_posix(),
            precision=graph.form.precision,
            image_size=graph.view.size,
            pixels=graph.form.pixels,
            outputs={
                name: next(iter(values.values())).shape[1:] for name, values in outputs.items()
            },
            opset=OPSET,
            ir_version=IR_VERSION,
            nodes=graph.nodes,
            domains=graph.domains,
            parity=parity,
            calibration=graph.calibration,
            float_products=graph.float_products,
        )
    shutil.rmtree(staging / TRIAL_DIRECTORY, ignore_errors=True)
    return records


def write_golden(
    golden: Sequence[Path], referenced: Mapping[Size, ViewReference], staging: Path
) -> None:
    """Store what torch + transformers say of the golden crops, for ``vistower verify``.

    All of them at the default resolution, one at each other: large ones take megabytes.
    """
    arrays: dict[str, Any] = {}
    for index, (size, known) in enumerate(referenced.items()):
        for path in golden if index == 0 else golden[:1]:
            name = golden_name(path.stem, size)
            arrays[f"{name}/pixel_values"] = known.reference.pixel_values[path.name]
            for output, values in known.reference.outputs.items():
                arrays[f"{name}/{output}"] = values[path.name]
    np.savez(staging / GOLDEN_DIRECTORY / GOLDEN_ARRAYS, **arrays)


def describe(
    checkpoint: Checkpoint,
    loaded: Loaded,
    hf_class: str,
    preprocessing: Preprocessing,
    weight_bytes: int,
    graphs: Mapping[str, GraphRecord],
    sources: Mapping[str, SourceFile],
    staging: Path,
) -> Manifest:
    """Make the manifest of everything in the staging directory.

    Raises:
        CheckpointError: the checkpoint changed since ``sources`` were recorded.
    """
    if changed := changed_sources(checkpoint.directory, sources) if sources else []:
        raise CheckpointError(
            f"{checkpoint.directory} changed while it was exported: {', '.join(changed)}. Export "
            f"it again."
        )
    made_with = {name: importlib.metadata.version(name) for name in LIBRARIES}
    made_with["onnxruntime"] = onnxruntime().__version__
    made_with["vistower"] = importlib.metadata.version("vistower")
    return Manifest(
        format_version=FORMAT_VERSION,
        model_type=loaded.family.model_type,
        hf_class=hf_class,
        source=Source(
            model=printable(checkpoint.source),
            name=printable(checkpoint.name),
            revision=checkpoint.revision,
            random_weight=checkpoint.random_weight,
            files=sources,
        ),
        layout=loaded.views[0].layout,
        native_size=loaded.native_size,
        preprocessing=preprocessing,
        graphs=graphs,
        made_with=made_with,
        weight_bytes=weight_bytes,
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
    precisions: Sequence[GraphPrecision] = (),
    uint8: bool = False,
    resolutions: Sequence[Size] = (),
    calibration: Sequence[Path] = (),
    overwrite: bool = False,
    on_step: Callable[[str], None] = lambda title: None,
) -> Bundle:
    """Export a checkpoint to a bundle, or raise and leave nothing behind.

    Args:
        checkpoint: where the weights are.
        output: the bundle's directory; made, or replaced with ``overwrite``. Of a link, what it
            points to.
        backend: the processor's to agree with, ``torchvision`` or ``pil``; None is the one that
            transformers' ``AutoImageProcessor`` takes, see `vistower_export.reference`.
        precisions: graphs to write besides the float32 ones.
        uint8: write each of ONNX Runtime's graphs a second time, with uint8 levels as its input
            and the processor's rescaling and normalization folded into its weights (CLIP).
        resolutions: input sizes, (height, width) in pixels, the default one first; empty for the
            processor's own. A learned position embedding is interpolated as transformers does it.
        calibration: pictures that help to decide the ranges of int8, besides the samples.
        overwrite: replace the bundle at ``output``, where everything in it is proven to be ours,
            see `vistower_export.ownership`.
        on_step: called with the title of each step as it starts.

    Raises:
        OutputExistsError: ``output`` holds something that may not be replaced.
        OutputError: ``output`` cannot be written, or another process is writing it.
        ExportError, ProcessorConfigError: the checkpoint cannot be exported exactly.
        ImageError: a calibration picture cannot be used.
    """
    place, replaced = may_write(
        output,
        BUNDLE,
        overwrite=overwrite,
        sources=(checkpoint.directory, *checkpoint.directory.iterdir()),
    )
    with staged(place) as published, as_output_error(place):
        staging = published.path(place)
        staging.mkdir()
        require_space(place, least_bytes(read_json(checkpoint.directory / CONFIG), precisions))
        # What comes from a hub is known by its commit.
        local = checkpoint.revision is None
        recorded = record_source(checkpoint.directory) if local else {}
        on_step("load the checkpoint")
        loaded = load(checkpoint.directory, backend, precisions, resolutions, staging)
        on_step(
            f"the processor is {type(loaded.processor).__name__} "
            f"({hf.processor_backend(loaded.processor)}), from "
            f"{hf.processor_file(checkpoint.directory)}"
        )
        on_step("compute the reference with torch")
        if uint8:
            require_levels(loaded)
        golden = write_golden_crops(staging / GOLDEN_DIRECTORY)
        referenced, pixels = {}, 0.0
        for view in loaded.views:
            referenced[view.size], worst = view_reference(
                loaded, view, (*SAMPLES, *golden), staging
            )
            pixels = max(pixels, worst)
        preprocessing = Preprocessing(
            processor=type(loaded.processor).__name__,
            backend=hf.processor_backend(loaded.processor),
            transparency=loaded.views[0].preprocessor.transparency,
            max_abs=pixels,
        )
        on_step("write the graphs")
        # The samples always take part: a few pictures alone would leave ranges too narrow.
        label = "quarters and mirror images of the sample pictures"
        if calibration:
            label = f"{len(calibration)} pictures given at export, {label}"
        pictures: tuple[ImageInput, ...] = (*calibration, *calibration_pictures())
        seen = referenced[loaded.views[0].size].pixel_values
        graphs = write(loaded, precisions, (pictures, label), seen, uint8, staging, on_step)
        hf_class = type(loaded.model).__name__
        loaded = replace(loaded, model=None)
        gc.collect()
        on_step("compare the graphs with torch")
        records = gate(graphs.written, referenced, staging)
        on_step("write the golden vectors and the manifest")
        write_golden(golden, referenced, staging)
        manifest = describe(
            checkpoint,
            loaded,
            hf_class,
            preprocessing,
            graphs.weight_bytes,
            records,
            recorded,
            staging,
        )
        (staging / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        # What it refuses must not be seen under the output's name.
        Bundle.load(staging)
        published.publish({place: replaced})
    return Bundle.load(output)
