"""One thread, a decoded picture → ``pixel_values``: vistower against the Hugging Face processors.

    python benchmarks/preprocess.py --output benchmarks/results/preprocess.json

Equality is checked before anything is timed. Ours and the reference take turns in one process,
one thread each (torch, BLAS and the native resize library); the figures are medians.
"""

# BLAS reads its environment when NumPy is imported.
# ruff: noqa: E402

from __future__ import annotations

import os

for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_name, None)
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import datetime
import importlib.metadata
import io
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from vistower import native
from vistower.doctor import diagnose
from vistower.preprocess import Preprocessor
from vistower_export.pictures import SAMPLES
from vistower_export.reference import transparency

REFERENCES = {
    "clip-torchvision": ("CLIPImageProcessor", "torchvision", 0.0),
    "clip-pil": ("CLIPImageProcessorPil", "pil", 0.0),
    "dinov3": ("DINOv3ViTImageProcessor", "torchvision", 1e-5),
}
SIZES = ((1024, 768), (640, 480), (3000, 2000))
LIBRARIES = ("numpy", "pillow", "torch", "torchvision", "transformers", "cykooz-resizer")


def agree(what: object, difference: float, allowed: float) -> None:
    """Stop where there is nothing worth timing."""
    if difference > allowed:
        raise SystemExit(f"{what}: pixels differ by {difference}, allowed is {allowed}")


def version(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the figures are of."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    found = diagnose()
    return {
        "cpu": model,
        "flags": found.cpu_flags,
        "cpus": found.cpus,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def taking_turns(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median milliseconds of each call; a turn is five calls, the first of which warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            for repeat in range(5):
                start = time.perf_counter()
                call()
                if turn and repeat:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def measure(name: str, size: tuple[int, int], turns: int) -> dict[str, Any]:
    """One processor at one size (width, height)."""
    class_name, backend, allowed = REFERENCES[name]
    reference = getattr(transformers, class_name)()
    ours = Preprocessor.from_config(
        reference.to_dict(), backend=backend, transparency=transparency(reference)
    )
    image = Image.open(SAMPLES[0]).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    array = np.asarray(image)
    want = reference(images=image, return_tensors="pt")["pixel_values"][0].numpy()
    difference = float(np.abs(ours(image) - want).max())
    agree((name, size), difference, allowed)
    out = np.empty(want.shape, np.float32)
    calls: dict[str, Callable[[], object]] = {
        "huggingface": lambda: reference(images=image, return_tensors="pt"),
        "vistower": lambda: ours(image, out=out),
        "vistower_from_array": lambda: ours(array, out=out),
    }
    times = taking_turns(calls, turns)
    if native.library() is not None and name == "clip-torchvision":
        library, native.library = native.library, lambda: None  # type: ignore[assignment]
        agree((name, size), float(np.abs(ours(image) - want).max()), allowed)
        times |= taking_turns({"vistower_numpy_alone": lambda: ours(image, out=out)}, turns)
        native.library = library
    return {
        "processor": name,
        "size": list(size),
        "max_abs": difference,
        "ms": times,
        "ratio": round(times["huggingface"] / times["vistower"], 2),
        "ratio_from_array": round(times["huggingface"] / times["vistower_from_array"], 2),
    }


def decoding(size: tuple[int, int], turns: int) -> dict[str, Any]:
    """Milliseconds of Pillow's JPEG decoding, for comparison."""
    buffer = io.BytesIO()
    image = Image.open(SAMPLES[0]).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=90)
    times = taking_turns({"jpeg": lambda: Image.open(io.BytesIO(buffer.getvalue())).load()}, turns)
    return {"size": list(size), "ms": times["jpeg"]}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(name, size, arguments.turns) for size in SIZES for name in REFERENCES]
    for result in results:
        print(result["processor"], result["size"], result["ms"], "ratio", result["ratio"])
    report = {
        "machine": machine(),
        "threads": 1,
        "preprocessing": results,
        "jpeg_decoding": [decoding(size, arguments.turns) for size in SIZES],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
