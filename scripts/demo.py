"""Embed the sample pictures with each bundle, print a table, draw the patch tokens as colours."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from vistower import VisionEncoder
from vistower.picture_files import find_pictures

mpl.use("Agg")
from matplotlib import pyplot as plt

ROUNDS = 5


def principal_components(patches: np.ndarray) -> np.ndarray:
    """First three principal components of (B, N, D) over all patches, each scaled to 0..1."""
    flat = patches.reshape(-1, patches.shape[-1])
    centered = flat - flat.mean(axis=0)
    _, _, directions = np.linalg.svd(centered, full_matrices=False)
    scores = centered @ directions[:3].T
    low, high = np.percentile(scores, [2, 98], axis=0)
    return np.clip((scores - low) / (high - low), 0, 1).reshape(*patches.shape[:2], 3)


def shown(encoder: VisionEncoder, path: Path) -> np.ndarray:
    """What the tower sees of a picture: its pixel_values, back in 0..1."""
    pixels = encoder.preprocess(path)[0].transpose(1, 2, 0)
    scale, offset = map(np.array, encoder.processor.scaling.scale_and_offset)
    return np.clip((pixels - offset) / scale / 255, 0, 1)


def median_ms(encoder: VisionEncoder, files: list[Path]) -> float:
    """Median milliseconds from decoded picture to embedding, one picture at a time."""
    pictures = [Image.open(path).convert("RGB") for path in files]
    times = []
    for _ in range(ROUNDS):
        for picture in pictures:
            start = time.perf_counter()
            encoder.encode(picture)
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--pictures", required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is not None:
        raise SystemExit("torch is installed here; the demo embeds without it.")
    files = list(find_pictures([arguments.pictures]).paths)
    table = Table(
        "model", "weights", "ort graph", "max abs to torch", "cosine", "ms/picture, median"
    )
    rows = []
    for directory in arguments.bundles:
        encoder = VisionEncoder.open(directory)
        manifest = encoder.bundle.manifest
        label = "random-weight" if manifest.source.random_weight else "released"
        colours = principal_components(encoder.encode(files).patches)
        grid = encoder.layout.grid
        rows.append((f"{manifest.source.name}\n{label}", encoder, colours, grid))
        graph = manifest.graphs["ort"]
        table.add_row(
            manifest.source.name,
            label,
            f"{graph.nodes} nodes",
            f"{graph.parity.max_abs:.1e}",
            f"{graph.parity.cosine:.7f}",
            f"{median_ms(encoder, files):.0f} on {encoder.device}",
        )
    # In a pipe rich assumes 80 columns and would cut the names.
    Console(width=None if sys.stdout.isatty() else 120).print(table)

    figure, axes = plt.subplots(
        2 * len(rows), len(files), figsize=(2.1 * len(files) + 1, 4.3 * len(rows)), squeeze=False
    )
    for index, (title, encoder, colours, grid) in enumerate(rows):
        for column, path in enumerate(files):
            axes[2 * index, column].imshow(shown(encoder, path))
            axes[2 * index, column].set_title(path.stem, fontsize=9)
            axes[2 * index + 1, column].imshow(colours[column].reshape(*grid, 3))
        axes[2 * index, 0].set_ylabel(f"{title}\nwhat it sees", fontsize=8)
        axes[2 * index + 1, 0].set_ylabel("patch tokens:\n3 components", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=110)
    print(f"{arguments.output}: the pictures and the patch tokens' first three components")


if __name__ == "__main__":
    main()
