"""The command line: ``vistower export | checkpoint | embed | verify | models | doctor``."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vistower.bundle import Bundle, cache_directory, cache_path, cached_bundles, find_bundle
from vistower.doctor import Diagnosis, diagnose
from vistower.embedding_files import SUFFIXES, embedding_file
from vistower.embeddings import VECTORS
from vistower.encoder import VisionEncoder
from vistower.errors import (
    BundleCorruptError,
    EmptyInputError,
    GoldenMismatchError,
    VistowerError,
)
from vistower.families.record import LAST_HIDDEN_STATE
from vistower.golden import replay
from vistower.interrupts import require_going, stoppable
from vistower.picture_files import find_pictures
from vistower.printable import printable
from vistower.tolerance import TOLERANCES, GraphPrecision
from vistower_export.needs import require_exporter

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Image embeddings from CLIP and DINOv3 vision towers on ONNX Runtime, without torch.",
)


class _Terminal(Console):
    """A console whose text, made of names from outside too, cannot act on it."""

    def print(self, *objects: Any, **options: Any) -> None:
        shown = (printable(x, keep="\n") if isinstance(x, str) else x for x in objects)
        super().print(*shown, **options)


out = _Terminal(soft_wrap=True, highlight=False, markup=False)
err = _Terminal(stderr=True, soft_wrap=True, highlight=False, markup=False)

Bundled = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="A bundle's directory, or a model in the cache.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, openvino, cuda[:N] or tensorrt[:N].")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or checkpoint directory.")],
    output: Annotated[
        Path | None, typer.Option(help="The bundle's directory; default: the cache.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    subfolder: Annotated[
        str | None, typer.Option(help="Where in the repository or directory it lies.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="Hub token for gated models; else HF_TOKEN.")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Downloads only from cache.")] = False,
    processor_backend: Annotated[
        str | None, typer.Option(help="torchvision or pil; default: transformers' choice.")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="A graph besides fp32: int8 (CPU), fp16, bf16 (CUDA); repeatable."),
    ] = None,
    uint8: Annotated[
        bool, typer.Option("--uint8", help="Graphs that take uint8 too, a quarter to upload; CLIP.")
    ] = False,
    resolution: Annotated[
        list[str] | None,
        typer.Option(help="Input size, e.g. 512 or 512x768 (height x width); repeatable."),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            help="Pictures (files, folders, globs) like yours, to set the ranges of int8."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Export a checkpoint to a bundle, compared with torch picture by picture.

    Example: vistower export openai/clip-vit-base-patch32 --output artifacts/clip-b32
    """
    require_exporter()
    from vistower_export.source import resolve_checkpoint

    checkpoint = resolve_checkpoint(
        model,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        offline=offline,
    )
    if checkpoint.random_weight:
        out.print(f"{checkpoint.name}: random-weight checkpoint, its embeddings mean nothing")
    from transformers.utils import logging as transformers_logging

    from vistower_export.steps import export_bundle

    if not err.is_terminal:
        transformers_logging.disable_progress_bar()
    place = output or cache_path(checkpoint.source, revision)
    bundle = export_bundle(
        checkpoint,
        place,
        backend=processor_backend,
        precisions=_precisions(precision or ()),
        uint8=uint8,
        resolutions=[_resolution(text) for text in resolution or ()],
        calibration=_pictures(calibrate) if calibrate else (),
        overwrite=overwrite,
        on_step=lambda title: err.print(f"  {title}"),
    )
    _print_certificate(bundle)


def _precisions(wanted: Sequence[str]) -> list[GraphPrecision]:
    extra: list[GraphPrecision] = [name for name in TOLERANCES if name != "fp32"]
    for name in wanted:
        if name not in extra:
            raise typer.BadParameter(f"--precision {name}: use {', '.join(extra)}")
    return [name for name in extra if name in wanted]


def _resolution(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is neither a number nor HEIGHTxWIDTH in pixels")
    return int(match[1]), int(match[2] or match[1])


def _print_certificate(bundle: Bundle) -> None:
    manifest = bundle.manifest
    if manifest is None:
        return
    table = Table("graph", "nodes", "output", "max abs", "max rel", "cosine", title=bundle.name)
    for kind, graph in manifest.graphs.items():
        for output, parity in graph.parity.compared.items():
            first = output == LAST_HIDDEN_STATE
            table.add_row(
                kind if first else "",
                str(graph.nodes) if first else "",
                output,
                f"{parity.max_abs:.1e}",
                f"{parity.max_rel:.1e}",
                f"{parity.cosine:.7f}",
            )
    out.print(table)
    out.print(
        f"pixels: max abs {manifest.preprocessing.max_abs:.1e} against "
        f"{manifest.preprocessing.processor} ({manifest.preprocessing.backend}); weights "
        f"{_megabytes(manifest.weight_bytes)}, peak memory "
        f"{_megabytes(manifest.export_peak_bytes)}"
    )
    for kind, graph in manifest.graphs.items():
        if graph.calibration is not None:
            kept = ", ".join(graph.float_products) or "none"
            out.print(f"{kind}: calibrated on {graph.calibration}; products in float32: {kept}")
        if "emulated" in graph.parity.method:
            out.print(f"{kind}: {graph.parity.method}")
    if manifest.source.random_weight and any(g.calibration for g in manifest.graphs.values()):
        out.print("random weights say little about int8: see `vistower verify --against`")
    out.print(f"{bundle.directory}")


@app.command()
def checkpoint(
    name: Annotated[str, typer.Argument(metavar="NAME", help="E.g. dinov3-vits16.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make a random-weight checkpoint of a real architecture, to try things without a hub.

    Example: vistower checkpoint clip-vit-base-patch32 checkpoints/clip-vit-base-patch32 --seed 0
    """
    require_exporter()
    from vistower_export.checkpoint import write_random_checkpoint

    written = write_random_checkpoint(name, directory, seed=seed, overwrite=overwrite)
    out.print(f"random-weight checkpoint (seed {seed}): {written}")


@app.command()
def embed(
    bundle: Bundled,
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Picture files, folders, globs.")
    ],
    output: Annotated[Path, typer.Option(help="A .npz or .npy file.")],
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 32,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that read pictures; default: measured.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Refuse pictures with more pixels than this.")
    ] = None,
    vector: Annotated[
        list[str] | None,
        typer.Option(
            help="cls, pooled or projected; repeatable. Default: cls, or pooled if there is none."
        ),
    ] = None,
    patches: Annotated[
        bool, typer.Option("--patches", help="Patch tokens too (.npz only).")
    ] = False,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Unit vectors: each over its L2 norm.")
    ] = False,
    skip_errors: Annotated[
        bool, typer.Option("--skip-errors", help="Leave unreadable pictures out.")
    ] = False,
) -> None:
    """Embed pictures without torch.

    A .npz holds names, each --vector (B, D) and, with --patches, patches (B, N, D). A .npy holds
    one vector alone, its names as a JSON list in a .names.json beside it. Of a folder every file is
    taken that has the ending of a picture; standard error says what was left out.

    Example: vistower embed artifacts/clip-b32 photos/ 'more/*.jpg' --output embeddings.npz
    """
    if output.suffix not in SUFFIXES:
        raise typer.BadParameter(f"{output} ends in neither .npz nor .npy")
    if patches and output.suffix == ".npy":
        raise typer.BadParameter("--patches needs a .npz")
    if len(set(vector or ())) > 1 and output.suffix == ".npy":
        raise typer.BadParameter("several --vector need a .npz")
    if unknown := set(vector or ()) - set(VECTORS):
        raise typer.BadParameter(f"--vector {min(unknown)}: use {', '.join(VECTORS)}")
    files = _pictures(inputs)
    encoder = VisionEncoder.open(bundle, device=device, max_pixels=max_pixels)
    layout = encoder.layout
    wanted = list(dict.fromkeys(vector or ("cls" if layout.num_cls_tokens else "pooled",)))
    names: list[str] = []
    found: dict[str, list[np.ndarray[Any, Any]]] = {
        name: [] for name in (*wanted, *(("patches",) if patches else ()))
    }
    results = encoder.encode_stream(
        files,
        batch_size=batch_size,
        workers=workers,
        on_error="record" if skip_errors else "raise",
        outputs=tuple(found),
        normalize=normalize,
    )
    shown = track(results, "embedding", len(files), console=err) if err.is_terminal else results
    vectors = len(files) * (layout.num_patches * patches + len(wanted))
    with (
        embedding_file(output, 4 * layout.hidden_size * vectors) as target,
        contextlib.closing(results),
    ):
        for file, result in zip(files, shown, strict=True):
            if result.error is not None:
                err.print(f"skipped: {result.error}")
                continue
            names.append(str(file))
            for name, parts in found.items():
                parts.append(getattr(result, name))
        if not names:
            raise EmptyInputError("None of the pictures could be read; nothing was written.")
        target.write(names, {name: np.stack(parts) for name, parts in found.items()})
        width = found[wanted[0]][0].shape[-1]
    manifest = encoder.bundle.manifest
    label = " (random-weight)" if manifest and manifest.source.random_weight else ""
    out.print(
        f"{len(names)} pictures, {wanted[0]} of {width} numbers each, by "
        f"{encoder.bundle.name}{label} on {encoder.device}: {output}"
    )


def _pictures(sources: Sequence[str]) -> Sequence[Path]:
    """The picture files of files, folders and globs; says what was left out."""
    found = find_pictures(sources)
    if found.left_out:
        err.print(found.notice)
    return found.paths


@app.command()
def verify(
    bundle: Bundled,
    device: Device = "cpu",
    against: Annotated[
        Path | None, typer.Option(help="The checkpoint directory to compare with, by torch.")
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option(help="With --against: picture files, folders, globs.")
    ] = None,
) -> None:
    """Check a bundle's files and replay the golden vectors it was exported with.

    With --against and --images: compare every graph with torch on your pictures instead, and give
    a verdict on each precision. Ends with exit code 1 at the first golden difference, which it
    names, or if a graph fails.

    Example: vistower verify artifacts/clip-b32 --against checkpoints/clip-b32 --images photos/
    """
    found = find_bundle(bundle)
    if (against is None) != (images is None):
        raise typer.BadParameter("--against and --images go together")
    if against is not None and images is not None:
        _judge(found, against, _pictures(images), device)
        return
    count = 0
    for comparison in replay(found, device=device):
        count += 1
        out.print(
            f"ok  {comparison.what}: {comparison.difference:.1e} (allowed {comparison.allowed:.0e})"
        )
    out.print(f"{found.name}: {count} comparisons hold")


def _judge(bundle: Bundle, checkpoint: Path, pictures: Sequence[Path], device: str) -> None:
    require_exporter()
    from vistower_export.verdict import judge

    bundle.check()
    failed = []
    for verdict in judge(bundle, checkpoint, pictures, device=device):
        name, parity, limit = verdict.graph.name, verdict.parity, verdict.tolerance
        if parity is None:
            out.print(f"----  {name}: {verdict.device} does not run {verdict.graph.precision}")
            continue
        tokens = "; ".join(
            f"{what} cosine {found.cosine:.6f} at least, {found.cosine_mean:.6f} in the mean"
            for what, found in (
                ("CLS", parity.cls),
                ("patches", parity.patches),
                *parity.vectors.items(),
            )
            if found is not None
        )
        out.print(
            f"{'pass' if verdict.passed else 'FAIL'}  {name}: {tokens}; off by "
            f"{parity.max_abs:.1e} at most, {parity.max_rel:.1e} of the norm (required: cosine "
            f"{limit.cosine}, {limit.max_rel:.0e})"
        )
        if not verdict.passed:
            failed.append(name)
    manifest = bundle.manifest
    if manifest is not None and manifest.source.random_weight:
        out.print("random-weight checkpoint: this says little about trained weights")
    passed = "every graph run agrees" if not failed else f"disagree: {', '.join(failed)}"
    out.print(f"{bundle.name} on {len(pictures)} pictures, against torch in float32: {passed}")
    if failed:
        raise typer.Exit(1)


@app.command()
def models() -> None:
    """List the bundles in the cache.

    Example: VISTOWER_CACHE=/models vistower models
    """
    rows = 0
    for path, found in cached_bundles():
        rows += 1
        name = printable(path.name)
        if not isinstance(found, Bundle):
            out.print(f"{name}\n  broken: {found}")
            continue
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        manifest = found.manifest
        if manifest is None:
            out.print(f"{name}\n  {found.name}, {_megabytes(size)}, portable graph")
            continue
        revision = f"@{manifest.source.revision[:12]}" if manifest.source.revision else ""
        label = ", random-weight" if manifest.source.random_weight else ""
        graphs = ", ".join(manifest.graphs)
        out.print(
            f"{name}\n  {manifest.source.model}{revision}: {manifest.model_type}, "
            f"{_megabytes(size)}, graphs {graphs}{label}"
        )
    if not rows:
        out.print(f"The cache {cache_directory()} has no bundle. Make one with `vistower export`.")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    device: Annotated[
        str, typer.Option(help="A device that must work, e.g. cuda:0; auto: any.")
    ] = "auto",
    bundle: Annotated[
        str | None, typer.Option(help="Run this bundle's golden vectors, not a tiny graph.")
    ] = None,
) -> None:
    """Say what is installed, what is missing for which device, and run on each that there is.

    Ends with exit code 1 where no device works, or not the one required: a container's health
    check.

    Example: vistower doctor --json --device cuda
    """
    diagnosis = diagnose(device, bundle)
    if as_json:
        sys.stdout.write(json.dumps(dataclasses.asdict(diagnosis), indent=2) + "\n")
    else:
        for name, version in diagnosis.libraries.items():
            out.print(f"{name:14} {version or 'not installed'}")
        wheels = ", ".join(f"{k} {v}" for k, v in diagnosis.onnxruntime_wheels.items())
        out.print(f"{'onnxruntime':14} {wheels or 'from no wheel'}")
        out.print(f"{'providers':14} {', '.join(diagnosis.providers) or 'none'}")
        out.print(f"{'python':14} {diagnosis.python} on {diagnosis.platform}")
        flags = " ".join(diagnosis.cpu_flags) or "none of interest"
        out.print(f"{'cpus':14} {diagnosis.cpus} usable; flags: {flags}")
        out.print(f"{'cache':14} {diagnosis.cache_directory}")
        _print_devices(diagnosis)
    if diagnosis.problem is not None:
        raise typer.Exit(1)


def _print_devices(diagnosis: Diagnosis) -> None:
    if diagnosis.driver_cuda_version is not None:
        out.print(f"{'nvidia driver':14} serves CUDA {diagnosis.driver_cuda_version}")
    for gpu in diagnosis.gpus:
        capability = ".".join(map(str, gpu.compute_capability))
        out.print(f"{f'gpu {gpu.index}':14} {gpu.name}, {_megabytes(gpu.memory)}, sm {capability}")
    for library in diagnosis.cuda_libraries:
        out.print(f"{library.name:22} {library.error or 'ok'}")
    for one in diagnosis.checks:
        if one.works:
            out.print(
                f"{one.device:14} works: {one.ran} in {one.seconds:.2f} s, off by "
                f"{one.difference:.0e}"
            )
        else:
            out.print(f"{one.device:14} cannot be had: {'; '.join(one.problems)}")
        for node in one.cpu_nodes:
            out.print(f"{'':14} on the CPU: {node}")
    out.print(f"{'device auto':14} {diagnosis.device}: {diagnosis.device_reason}")
    if diagnosis.problem is not None:
        out.print(f"{'problem':14} {diagnosis.problem}")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(version("vistower"))
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one sentence and exit code 2, no traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal's encoding lacks is shown escaped, and ends nothing.
        sys.stdout.reconfigure(errors="backslashreplace")
    with stoppable(), warnings.catch_warnings():
        # What may be read is for --max-pixels to say, and a refusal is an error.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        _run(arguments)


def _run(arguments: Sequence[str]) -> None:
    try:
        app(arguments)
    except VistowerError as error:
        require_going()
        if "--debug" in arguments:
            raise
        _say(f"error: {error}")
        found_bad = isinstance(error, GoldenMismatchError | BundleCorruptError)
        sys.exit(1 if found_bad and "verify" in arguments[:2] else 2)
    except Exception as error:
        require_going()
        if "--debug" in arguments:
            raise
        what = f"{type(error).__name__}: {error}"
        # The system said no: a full disk, a terminal that is gone, no permission.
        if not isinstance(error, OSError):
            what += ". This is a bug or a broken machine"
        _say(f"error: {what}: run again with `vistower --debug ...` for the traceback.")
        sys.exit(1)


def _say(text: str) -> None:
    # The exit code counts where standard error is a file on a full disk, or closed.
    with contextlib.suppress(OSError, ValueError):
        err.print(text)


if __name__ == "__main__":
    main()
