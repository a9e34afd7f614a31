"""Files → embeddings on one machine: streams, many callers, the mixins' cache, flat memory.

    python benchmarks/stream.py PART --output benchmarks/results/stream.json \
        --clip BUNDLE CHECKPOINT --dinov3 BUNDLE CHECKPOINT

PART is one of: stream, huggingface, callers, mixins, memory, draft. Each is a process of its own
and adds its figures to the output. The pictures are JPEGs of 1024 x 768, made from the samples.
"""

# BLAS reads its environment when NumPy is imported.
# ruff: noqa: E402

from __future__ import annotations

import os

for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_name, None)

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vistower import CLIPMixin, DINOv3Mixin, DynamicBatcher, VisionEncoder
from vistower.threads import available_cpus

# A script finds its neighbours by their bare names.
sys.path.insert(0, str(Path(__file__).parent))
from preprocess import machine  # type: ignore[import-not-found]

Bundles = dict[str, tuple[Path, Path]]
BATCH = 8
CALLERS = 32


def jpegs(folder: Path, count: int = 64) -> list[Path]:
    """Write the pictures."""
    from vistower_export.pictures import SAMPLES

    images = [Image.open(path).convert("RGB") for path in SAMPLES]
    paths = []
    for index in range(count):
        image = images[index % len(images)].resize((1024, 768), Image.Resampling.BICUBIC)
        paths.append(folder / f"{index:03}.jpg")
        image.rotate(index // len(images) * 3).save(paths[-1], quality=90)
    return paths


def rate(work: Callable[[], int], seconds: float = 6.0) -> float:
    """Pictures a second, repeated for some seconds after one pass to warm up."""
    work()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += work()
    return done / (time.perf_counter() - start)


def stream(bundles: Bundles, files: list[Path]) -> dict[str, Any]:
    """End to end beside its two halves, in the same process.

    On a CPU the halves share the cores: one picture costs the sum of both, so the bound is
    1 / (1/decode + 1/model), and no more than 90 % of the smaller rate can be had unless decoding
    is nine times faster.
    """
    report = {}
    for name, (bundle, _) in bundles.items():
        encoder = VisionEncoder.open(bundle, device="cpu")
        batch = encoder.preprocess(files[:BATCH])
        cpus = available_cpus()

        def decode(encoder: VisionEncoder = encoder, cpus: int = cpus) -> int:
            with ThreadPoolExecutor(cpus) as pool:
                return sum(len(row) > 0 for row in pool.map(encoder.processor, files))

        def model(encoder: VisionEncoder = encoder, batch: Any = batch) -> int:
            return len(encoder.forward(batch))

        def whole(encoder: VisionEncoder = encoder, workers: int | None = None) -> int:
            return sum(1 for _ in encoder.encode_stream(files, batch_size=BATCH, workers=workers))

        rounds = []
        for _ in range(2):
            decoding, computing, both = rate(decode, 3), rate(model), rate(whole)
            bound = 1 / (1 / decoding + 1 / computing)
            rounds.append((both / min(decoding, computing), decoding, computing, both, bound))
        share, decoding, computing, both, bound = statistics.median_low(rounds)
        report[name] = {
            "batch": BATCH,
            "decode_and_preprocess_only": round(decoding, 1),
            "model_only": round(computing, 1),
            "stream": round(both, 1),
            "share_of_the_slower": round(share, 3),
            "bound_of_shared_cores": round(bound, 1),
            "share_of_the_bound": round(both / bound, 3),
        }
    return report


def huggingface(bundles: Bundles, files: list[Path]) -> dict[str, Any]:
    """The reference, file by file in batches: Hugging Face processor and torch, eager."""
    import torch
    import transformers
    from transformers.image_utils import load_image

    from vistower_export.reference import load_model, load_processor

    torch.set_num_threads(available_cpus())
    transformers.logging.disable_progress_bar()
    report = {}
    for name, (_, checkpoint) in bundles.items():
        model = load_model(checkpoint)
        processor = load_processor(checkpoint, "torchvision")

        def embed(model: Any = model, processor: Any = processor) -> int:
            for start in range(0, len(files), BATCH):
                images = [load_image(str(path)) for path in files[start : start + BATCH]]
                with torch.inference_mode():
                    model(**processor(images=images, return_tensors="pt"))
            return len(files)

        report[name] = {"batch": BATCH, "images_per_second": round(rate(embed, 10), 1)}
    return report


def callers(bundles: Bundles, files: list[Path]) -> dict[str, Any]:
    """Threads that each embed picture after picture, one at a time: separate calls or merged."""
    report: dict[str, Any] = {}
    for name, (bundle, _) in bundles.items():
        encoder = VisionEncoder.open(bundle, device="cpu")
        report[name] = {"separate": _closed_loop(encoder.encode, files)}
        with DynamicBatcher(encoder) as batcher:
            report[name]["batcher"] = _closed_loop(batcher.encode, files)
        one, merged = (report[name][k]["images_per_second"] for k in ("separate", "batcher"))
        report[name]["ratio"] = round(merged / one, 3)
    return report


def _closed_loop(call: Callable[[Path], object], files: list[Path]) -> dict[str, float]:
    latencies: list[float] = []
    stop = time.perf_counter() + 15

    def caller(number: int) -> None:
        for path in islice(cycle(files), number, None):
            start = time.perf_counter()
            call(path)
            latencies.append(time.perf_counter() - start)
            if time.perf_counter() > stop:
                return

    start = time.perf_counter()
    threads = [threading.Thread(target=caller, args=(number,)) for number in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return {
        "callers": CALLERS,
        "images_per_second": round(len(latencies) / elapsed, 1),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
    }


def mixins(bundles: Bundles, files: list[Path]) -> dict[str, Any]:
    """The calls of the three consumers on pairs of pictures, with the cache and without."""
    images = [Image.open(path).convert("RGB") for path in files[:6]]
    crops = [np.asarray(image)[100:500, 200:600] for image in images]
    clip = CLIPMixin(model_path=bundles["clip"][0], device="cpu")
    dinov3 = DINOv3Mixin(model_path=bundles["dinov3"][0], device="cpu")

    def patch_emd() -> int:
        for one, two in pairwise(images):
            clip.get_features(one), clip.get_features(two)
        return len(images) - 1

    def patch_similarity() -> int:
        for one, two in pairwise(images):
            dinov3.get_features(one), dinov3.get_features(two)
        return len(images) - 1

    def body_appearance() -> int:
        for one, two in pairwise(crops):
            dinov3.get_cls_feature(one), dinov3.get_cls_feature(two), dinov3.get_features(one)
        return len(crops) - 1

    report = {}
    for consumer in (patch_emd, patch_similarity, body_appearance):
        os.environ["VISTOWER_FEATURE_CACHE"] = "0"
        off = rate(consumer, 5)
        os.environ["VISTOWER_FEATURE_CACHE"] = "4"
        # A round trip over few pictures would be served from the cache for ever: six of them,
        # and a cache of four, make a pair share one picture with the pair before it, no more.
        on = rate(consumer, 5)
        report[consumer.__name__] = {
            "pairs_per_second_off": round(off, 2),
            "pairs_per_second_on": round(on, 2),
            "ratio": round(on / off, 2),
        }
    return report


def memory(bundles: Bundles, files: list[Path]) -> dict[str, Any]:
    """Resident memory while 20,000 pictures of many sizes stream through a two-layer tower."""
    encoder = VisionEncoder.open(bundles["tiny"][0], device="cpu")
    generator = np.random.default_rng(0)
    sizes = generator.integers(40, 400, (64, 2))
    small = [generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]

    def pictures() -> Iterator[Any]:
        for index in range(20_000):
            yield files[index // 16 % len(files)] if index % 16 == 0 else small[index % len(small)]

    samples = []
    start = time.perf_counter()
    for result in encoder.encode_stream(pictures(), batch_size=32):
        if result.index % 250 == 249:
            status = Path("/proc/self/statm").read_text(encoding="ascii").split()
            samples.append(int(status[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
    settled = samples[len(samples) // 4 :]
    slope = float(np.polyfit(np.arange(len(settled)) * 250, settled, 1)[0])
    return {
        "pictures": 20_000,
        "seconds": round(time.perf_counter() - start, 1),
        "rss_mb_after_5000": round(settled[0], 1),
        "rss_mb_at_the_end": round(settled[-1], 1),
        "slope_mb_per_1000_pictures": round(slope * 1000, 4),
    }


def draft(bundles: Bundles, files: list[Path]) -> dict[str, Any]:
    """The approximate decoding: how much faster, and how far its pixels and embeddings are off."""
    report = {}
    for name, (bundle, _) in bundles.items():
        encoder = VisionEncoder.open(bundle, device="cpu")
        approximate = replace(encoder.processor, decode="draft")
        exact_pixels = encoder.preprocess(files[:16])
        near_pixels = np.stack([approximate(path) for path in files[:16]])
        exact, near = encoder.forward(exact_pixels)[:, 0], encoder.forward(near_pixels)[:, 0]
        cosine = (
            (exact * near).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(near, axis=1)
        )

        def each(processor: Any) -> Callable[[], int]:
            return lambda: sum(len(processor(path)) > 0 for path in files)

        report[name] = {
            "exact_per_second_one_thread": round(rate(each(encoder.processor), 3), 1),
            "draft_per_second_one_thread": round(rate(each(approximate), 3), 1),
            "pixels_mean_abs": float(np.abs(exact_pixels - near_pixels).mean()),
            "pixels_max_abs": float(np.abs(exact_pixels - near_pixels).max()),
            "cls_cosine_min": float(cosine.min()),
        }
    return report


PARTS = (stream, huggingface, callers, mixins, memory, draft)


def main() -> None:
    """Measure one part and add it to the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[part.__name__ for part in PARTS])
    parser.add_argument("--output", type=Path, required=True)
    for name in ("clip", "dinov3"):
        parser.add_argument(f"--{name}", type=Path, nargs=2, metavar=("BUNDLE", "CHECKPOINT"))
    parser.add_argument("--tiny", type=Path, help="a small bundle, for the part `memory`")
    arguments = parser.parse_args()
    bundles = {
        name: tuple(paths)
        for name in ("clip", "dinov3")
        if (paths := getattr(arguments, name)) is not None
    }
    if arguments.tiny is not None:
        bundles["tiny"] = (arguments.tiny, arguments.tiny)
    part = next(part for part in PARTS if part.__name__ == arguments.part)
    with tempfile.TemporaryDirectory() as folder:
        found = part(bundles, jpegs(Path(folder)))
    report = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    report |= {"machine": machine(), arguments.part: found}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({arguments.part: found}, indent=2))


if __name__ == "__main__":
    main()
