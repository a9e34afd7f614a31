"""Peak memory of the largest pictures that Pillow takes: docs/limits.json, docs/limits.md.

Each picture is embedded in a process of its own, by a tiny random-weight tower behind the real
preprocessing; what counts is how far the peak of resident memory lies above the peak after a small
picture. Linux only. ``scripts/limits`` runs it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MARK = "<!-- scripts/limits -->\n"
FAMILIES = {"clip": "CLIP", "dinov3": "DINOv3"}

CHILD = """
import json, re, sys
import numpy as np
from PIL import Image
from vistower import VisionEncoder
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
bundle, path, how = sys.argv[1:]
options = {"decode": "draft"} if how == "draft" else {}
encoder = VisionEncoder.open(bundle, device="cpu", threads=1, **options)
encoder.encode(np.zeros((300, 400, 3), np.uint8))
before = peak()
if how == "image":
    picture = Image.open(path)
elif how == "array":
    picture = np.full((13_300, 13_300, 3), 77, np.uint8)
else:
    picture = path
try:
    encoder.encode(picture)
    refused = None
except Exception as error:
    refused = f"{type(error).__name__}: {error}"
print(json.dumps({"peak_bytes": peak() - before, "refused": refused}))
"""


def png(colour_type: int, depth: int, channels: int) -> Callable[[Path, int, int], None]:
    """A writer of PNGs of one colour, which need no memory to be written."""

    def write(path: Path, width: int, height: int) -> None:
        line = b"\0" + b"\x4d" * ((width * channels * depth + 7) // 8)
        packer = zlib.compressobj(1)

        def packed() -> Iterator[bytes]:
            lines = max(1, 10_000_000 // len(line))
            for at in range(0, height, lines):
                yield packer.compress(line * min(lines, height - at))
            yield packer.flush()

        size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        data = [(b"IHDR", size + bytes([depth, colour_type, 0, 0, 0]))]
        if colour_type == 3:
            data.append((b"PLTE", bytes(range(256)) * 3))
        data += [(b"IDAT", b"".join(packed())), (b"IEND", b"")]
        with path.open("wb") as file:
            file.write(b"\x89PNG\r\n\x1a\n")
            for name, body in data:
                file.write(len(body).to_bytes(4, "big") + name + body)
                file.write(zlib.crc32(name + body).to_bytes(4, "big"))

    return write


def pillow(mode: str, kind: str) -> Callable[[Path, int, int], None]:
    """A writer of a picture of one colour by Pillow."""

    def write(path: Path, width: int, height: int) -> None:
        Image.new(mode, (width, height), 77).save(path, kind)

    return write


SQUARE = (13_300, 13_300)
LONG = 170_000_000
CASES: list[tuple[str, str, tuple[int, int], Callable[[Path, int, int], None], str]] = [
    ("JPEG, RGB", "a.jpg", SQUARE, pillow("RGB", "JPEG"), "path"),
    ('JPEG, RGB, `decode="draft"`', "a.jpg", SQUARE, pillow("RGB", "JPEG"), "draft"),
    ("PNG, RGB", "a.png", SQUARE, png(2, 8, 3), "path"),
    ("PNG, RGB, as a PIL image", "a.png", SQUARE, png(2, 8, 3), "image"),
    ("PNG, RGBA", "c.png", SQUARE, png(6, 8, 4), "path"),
    ("PNG, palette", "p.png", SQUARE, png(3, 8, 1), "path"),
    ("PNG, 16-bit grey", "g.png", SQUARE, png(0, 16, 1), "path"),
    ("PNG, 16-bit RGB", "r.png", SQUARE, png(2, 16, 3), "path"),
    ("PNG, 1 bit", "b.png", SQUARE, png(0, 1, 1), "path"),
    ("TIFF, RGB", "a.tif", SQUARE, pillow("RGB", "TIFF"), "path"),
    ("array, uint8, its own 531 MB counted", "", SQUARE, lambda *_: None, "array"),
    ("PNG, grey", "w.png", (LONG, 1), png(0, 8, 1), "path"),
    ("PNG, grey", "h.png", (1, LONG), png(0, 8, 1), "path"),
]


def measure(bundles: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    results = []
    for what, name, (width, height), write, how in CASES:
        path = folder / (name or "none")
        if not path.exists():
            write(path, width, height)
        row: dict[str, Any] = {"picture": what, "width": width, "height": height}
        for family, bundle in bundles.items():
            command = [sys.executable, "-W", "ignore", "-c", CHILD, str(bundle), str(path), how]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row[family] = json.loads(done.stdout)
        print(row, flush=True)
        results.append(row)
    return results


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"| picture | pixels | {' | '.join(FAMILIES.values())} |", "|---|---|---:|---:|"]
    for row in results:
        found = [row[family] for family in FAMILIES]
        cells = [one["refused"] or f"{one['peak_bytes'] / 1e6:,.0f} MB" for one in found]
        size = f"{row['width']:,}×{row['height']:,}"
        lines.append(f"| {row['picture']} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import prepare

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        bundles = {family: folder / "bundles" / f"tiny-{family}" for family in FAMILIES}
        results = measure(bundles, folder)
    releases = {name: version(name) for name in ("pillow", "numpy", "onnxruntime")}
    report = {"releases": releases, "peak_memory": results}
    (DOCS / "limits.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page = DOCS / "limits.md"
    before, _, after = page.read_text(encoding="utf-8").split(MARK)
    page.write_text(MARK.join((before, table(results), after)), encoding="utf-8")


if __name__ == "__main__":
    main()
