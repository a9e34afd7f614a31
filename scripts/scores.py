"""Compares the five scores of the mixins' consumers: docs/scores.md.

The original's mixins (tests/torch_mixins.py, transformers alone) against vistower's, on the same
random-weight checkpoints of the real architectures, over sample pictures, edits of them and masks.
Run it where the exporter is installed: ``.venv/bin/python scripts/scores.py``.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from consumers import SCORES, clip_pipe  # noqa: E402
from torch_mixins import TorchCLIP, TorchDINOv3  # noqa: E402
from vistower import CLIPMixin, DINOv3Mixin  # noqa: E402
from vistower_export.checkpoint import write_random_checkpoint  # noqa: E402
from vistower_export.pictures import SAMPLES  # noqa: E402
from vistower_export.source import resolve_checkpoint  # noqa: E402
from vistower_export.steps import export_bundle  # noqa: E402

MODELS = {"clip": "clip-vit-base-patch32", "dinov3": "dinov3-vits16"}
BACKENDS = {"clip": ("torchvision", "pil"), "dinov3": ("torchvision",)}
MODES = (None, "inner", "outer")

HEAD = """# The five scores

Made by `scripts/scores.py`: the consumers of tests/consumers.py on a copy of the original's mixins
and on vistower's, in fp32 on the CPU, over five sample pictures, each against another one and an
edit of itself, without a mask, inside and outside of boxes. {releases}; **random-weight**
checkpoints of the real architectures.

The bar is 1e-6 of the score, as far as float32 holds it. The last columns are the original's mixins
beside themselves, with transformers' default attention (sdpa) and with its `eager` one: the same
arithmetic in another order. Of a cosine near zero a relative difference counts digits that float32
does not have: body appearance goes down to {low:.3g}, where torch does not keep 1e-6 beside torch
either; absolute, both are within two roundings of 1 (2.4e-7).

"""
BETWEEN = """

The original with itself, its torchvision processor against its PIL processor:

| score | largest relative difference |
|---|---:|
"""


def cases() -> list[tuple[Image.Image, Image.Image, list[tuple[int, int, int, int]]]]:
    """A picture, another one or an edit of it, and the boxes of the edit."""
    pictures = [Image.open(path).convert("RGB") for path in SAMPLES]
    found = []
    for one, other in zip(pictures, pictures[1:] + pictures[:1], strict=True):
        other = other.resize(one.size)
        width, height = one.size
        boxes = [
            (width // 5, height // 4, width // 2 + 1, height * 3 // 4 + 1),
            (width * 6 // 10, 0, width * 9 // 10, height // 3),
        ]
        pasted = one.copy()
        pasted.paste(other.crop(boxes[0]), boxes[0][:2])
        found += [(one, edited, boxes) for edited in (other, pasted)]
    return found


def apart(have: list[float], want: list[float]) -> str:
    """The largest difference and the largest relative one, as two cells."""
    differences = [abs(one - two) for one, two in zip(have, want, strict=True)]
    relative = [found / abs(two) for found, two in zip(differences, want, strict=True)]
    return f"{max(differences):.1e} | {max(relative):.1e}"


def main() -> None:
    rows = [
        "| score | model | processor | scores | from, to | largest difference | relative | "
        "torch with itself | relative |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    between: dict[str, list[float]] = defaultdict(list)
    originals: dict[tuple[str, str], list[float]] = {}
    lowest: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family, name in MODELS.items():
            checkpoint = write_random_checkpoint(name, Path(folder) / name)
            for backend in BACKENDS[family]:
                bundle = Path(folder) / f"{name}-{backend}"
                export_bundle(resolve_checkpoint(str(checkpoint)), bundle, backend=backend)
                original = (
                    type("Original", (TorchCLIP,), {"backend": backend})
                    if family == "clip"
                    else TorchDINOv3
                )
                mixin: Any = CLIPMixin if family == "clip" else DINOv3Mixin
                for score, (pipe, method) in SCORES.items():
                    if (pipe is clip_pipe) != (family == "clip"):
                        continue
                    ours = pipe(mixin)(model_path=str(bundle), device="cpu")
                    theirs = pipe(original)(model_path=str(checkpoint), device="cpu")
                    eager = pipe(original)(model_path=str(checkpoint), device="cpu")
                    eager.model.set_attn_implementation("eager")
                    mine, want, again = (
                        [getattr(one, method)(*case, mode) for case in cases() for mode in MODES]
                        for one in (ours, theirs, eager)
                    )
                    lowest[score] = min(want)
                    originals[score, backend] = want
                    rows.append(
                        f"| {score} | {name} | {backend} | {len(want)} | {min(want):.3g}, "
                        f"{max(want):.3g} | {apart(mine, want)} | {apart(again, want)} |"
                    )
                    print(rows[-1], flush=True)
    for score, (pipe, _) in SCORES.items():
        if pipe is clip_pipe:
            for one, two in zip(
                originals[score, "torchvision"], originals[score, "pil"], strict=True
            ):
                between[score].append(abs(one - two) / abs(two))
    others = [f"| {score} | {max(found):.1e} |" for score, found in between.items()]
    releases = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "onnxruntime")
    )
    text = (
        HEAD.format(releases=releases, low=lowest["body appearance (DINOv3)"])
        + "\n".join(rows)
        + BETWEEN
        + "\n".join(others)
        + "\n"
    )
    (ROOT / "docs" / "scores.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
