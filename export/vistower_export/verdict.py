"""A bundle against its checkpoint, on the pictures of whoever will use it.

The certificates in a bundle come from a handful of sample pictures. Whether int8 or half precision
is good enough depends on the weights and on the pictures, so this compares every graph with torch
again, from picture file to tokens, on others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import transformers

from vistower.bundle import Bundle, BundleGraph
from vistower.bundle.manifest import Parity
from vistower.encoder import VisionEncoder
from vistower.errors import (
    BundleUnsupportedError,
    CheckpointError,
    CheckpointNotFoundError,
    EmptyInputError,
)
from vistower.execution.cuda_problems import choose_device
from vistower.execution.device import Device, DeviceLike
from vistower.families.record import LAST_HIDDEN_STATE
from vistower.precision import can_run
from vistower.preprocess.classes import plain_name
from vistower.tolerance import TOLERANCES, Tolerance
from vistower_export import reference as hf
from vistower_export.files import check_files
from vistower_export.parity import compare, passes

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Verdict:
    """One graph compared with torch; ``parity`` is None where the device does not run it."""

    graph: BundleGraph
    device: str
    tolerance: Tolerance
    parity: Parity | None

    @property
    def passed(self) -> bool:
        """Whether it is as near to torch as its precision must be."""
        return self.parity is not None and passes(self.parity, self.tolerance)


def judge(
    bundle: Bundle, checkpoint: Path, pictures: Sequence[Path], *, device: DeviceLike = "cpu"
) -> Iterator[Verdict]:
    """Compare every graph of a bundle with torch and its processor, on picture files.

    Args:
        bundle: one that vistower exported.
        checkpoint: the directory it was exported from.
        pictures: files; torch's outputs of all of them are held in memory.
        device: where the graphs run; torch runs on the CPU in float32.

    Raises:
        BundleUnsupportedError: the bundle was not written by vistower.
        EmptyInputError: no picture.
        CheckpointError, UnsupportedArchitectureError: the checkpoint cannot be loaded, or with
            another image processor than the bundle's.
        ImageError: a picture cannot be used.
    """
    manifest = bundle.manifest
    if manifest is None:
        raise BundleUnsupportedError(
            f"{bundle.directory} was not written by `vistower export`: there is no record of the "
            f"processor it must agree with."
        )
    if not pictures:
        raise EmptyInputError("There is no picture to compare on: give some with --images.")
    if not checkpoint.is_dir():
        raise CheckpointNotFoundError(f"There is no checkpoint directory {checkpoint}.")
    check_files(checkpoint, f"Checkpoint directory {str(checkpoint)!r}")
    preprocessing = manifest.preprocessing
    processor = hf.load_processor(checkpoint, preprocessing.backend)
    if plain_name(type(processor).__name__) != plain_name(preprocessing.processor):
        raise CheckpointError(
            f"{bundle.directory} agrees with {preprocessing.processor}, but of {checkpoint} "
            f"transformers {transformers.__version__} makes {type(processor).__name__}. Give the "
            f"checkpoint it was exported from, and the transformers of its manifest "
            f"({manifest.made_with.get('transformers')})."
        )
    model = hf.load_model(checkpoint)
    on = choose_device(device).device
    graphs = [bundle.graph(name) for name in manifest.graphs]
    for size in bundle.resolutions:
        preprocessor = bundle.preprocessor_at(size)
        options = hf.size_options(preprocessor) if preprocessor != bundle.preprocessor else {}
        reference: dict[str, dict[str, Array]] = {}
        for path in pictures:
            found = hf.compute(model, processor, [path], options)
            for output, values in found.outputs.items():
                reference.setdefault(output, {})[str(path)] = values[path.name]
        for graph in graphs:
            if graph.resolution == size:
                runs = can_run(on, graph.precision, manifest.graphs[graph.name].domains)
                yield _verdict(bundle, graph, reference if runs else None, on)


def _verdict(
    bundle: Bundle, graph: BundleGraph, reference: dict[str, dict[str, Array]] | None, on: Device
) -> Verdict:
    tolerance = TOLERANCES[graph.precision]
    if reference is None:
        return Verdict(graph, str(on), tolerance, None)
    encoder = VisionEncoder.open(bundle.directory, device=str(on), graph=graph.name)
    outputs = encoder.session.outputs
    if set(outputs) - set(reference):
        raise CheckpointError(
            f"{bundle.directory} has {', '.join(outputs)}, and torch gives {', '.join(reference)} "
            f"of the checkpoint. Give the checkpoint it was exported from."
        )
    found: dict[str, dict[str, Array]] = {output: {} for output in outputs}
    for name in reference[LAST_HIDDEN_STATE]:
        pixel_values = encoder.preprocess(name)
        for output, values in encoder.compute(pixel_values, dict.fromkeys(outputs)).items():
            found[output][name] = values
    known = {output: reference[output] for output in outputs}
    parity = compare(known, found, encoder.layout, encoder.session.provider)
    return Verdict(graph, str(on), tolerance, parity)
