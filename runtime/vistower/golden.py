"""Replays the golden vectors of a bundle: the numbers torch + transformers gave when it was made.

A bundle keeps, under ``golden/``, small pictures as PNG and in one ``.npz`` per picture
``NAME@HxW/pixel_values`` (1, 3, H, W) and every output of the graphs, such as
``NAME@HxW/last_hidden_state`` (1, T, D) and ``NAME@HxW/pooler_output`` (1, D), float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vistower.bundle import Bundle
from vistower.bundle.golden_file import GoldenFile
from vistower.bundle.manifest import GOLDEN_FILE
from vistower.encoder import VisionEncoder
from vistower.errors import (
    BundleCorruptError,
    BundleUnsupportedError,
    GoldenMismatchError,
    PrecisionError,
)
from vistower.execution.cuda_problems import choose_device
from vistower.execution.device import DeviceLike
from vistower.families.record import LAST_HIDDEN_STATE
from vistower.precision import can_run
from vistower.tolerance import PIXEL_TOLERANCE, TOLERANCES

GOLDEN_DIRECTORY, _, GOLDEN_ARRAYS = GOLDEN_FILE.partition("/")


@dataclass(frozen=True)
class Replay:
    """One comparison that held: what was compared, its largest difference, what was allowed."""

    what: str
    difference: float
    allowed: float


def replay(bundle: Bundle, *, device: DeviceLike = "cpu") -> Iterator[Replay]:
    """Check every file's SHA-256, then pixels of every golden picture, and every output of
    every graph.

    Graphs of a precision or of operators that the device does not run are left out.

    Yields each comparison as it is made.

    Raises:
        BundleUnsupportedError: the bundle was not written by vistower, so has no golden vectors.
        BundleCorruptError: a file is missing or was edited, or there is nothing to compare with.
        GoldenMismatchError: the first difference above its tolerance, named.
        PrecisionError: the device runs none of the graphs.
    """
    manifest = bundle.manifest
    if manifest is None:
        raise BundleUnsupportedError(
            f"{bundle.directory} was not written by `vistower export`, so there are no golden "
            f"vectors to replay."
        )
    bundle.check()
    shapes = {record.image_size: record.outputs for record in manifest.graphs.values()}
    on = choose_device(device).device
    with GoldenFile(bundle.directory / GOLDEN_FILE, shapes) as golden:
        files = {}
        for one in golden.pictures:
            name = f"{GOLDEN_DIRECTORY}/{one.picture}.png"
            if name not in manifest.files:
                raise BundleCorruptError(
                    f"{bundle.directory} has golden vectors of {name}, which is not among the "
                    f"files of its manifest. Export the bundle again."
                )
            files[one] = bundle.directory / name
            want = golden.pixel_values(one)
            have = bundle.preprocessor_at(one.resolution)(files[one])
            what = f"pixel_values of {one.name}"
            yield _compared(what, have, want, np.ones(1), PIXEL_TOLERANCE)
        ran = 0
        for kind, record in manifest.graphs.items():
            if not can_run(on, record.precision, record.domains):
                continue
            encoder = VisionEncoder.open(bundle.directory, device=device, graph=kind)
            allowed = TOLERANCES[record.precision].max_rel
            for one, file in files.items():
                if one.resolution != record.image_size:
                    continue
                pixel_values = encoder.preprocess(file)
                for output, found in encoder.compute(
                    pixel_values, dict.fromkeys(record.outputs)
                ).items():
                    want, have = golden.output(one, output), found[0]
                    what = "tokens" if output == LAST_HIDDEN_STATE else output
                    norm = np.linalg.norm(want, axis=-1, keepdims=True)
                    yield _compared(
                        f"{kind} graph, {what} of {one.name}", have, want, norm, allowed
                    )
                ran += 1
    if not ran:
        raise PrecisionError(
            f"{on} runs none of the graphs of {bundle.directory} ({', '.join(manifest.graphs)}): "
            f"their tokens were not compared. Verify on another --device."
        )


def golden_name(picture: str, resolution: tuple[int, int]) -> str:
    """What the arrays of a golden picture are called at a (height, width) in pixels."""
    return f"{picture}@{resolution[0]}x{resolution[1]}"


def _compared(
    what: str,
    have: npt.NDArray[np.float32],
    want: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32] | npt.NDArray[np.float64],
    allowed: float,
) -> Replay:
    """Compare two arrays of one shape; ``scale`` divides the differences."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        difference = np.abs(have - want) / scale
    worst = float(difference.max())
    if worst <= allowed:
        return Replay(what, worst, allowed)
    first = tuple(int(i) for i in np.argwhere(~(difference <= allowed))[0])
    raise GoldenMismatchError(
        f"{what}: the first difference is at {first}, {have[first]:.6g} instead of "
        f"{want[first]:.6g} (largest difference {worst:.3g}, allowed {allowed:.3g}). This machine "
        f"computes other numbers than the one that exported the bundle, or the bundle was edited."
    )
