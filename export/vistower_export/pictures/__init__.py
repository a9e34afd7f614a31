"""The sample pictures, and small odd-sized crops of them for the golden vectors."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

SAMPLES: tuple[Path, ...] = tuple(
    Path(__file__).parent / name
    for name in ("astronaut.jpg", "cat.png", "coffee.jpg", "galaxies.jpg", "rocket.jpg")
)

GOLDEN_CROPS: dict[str, tuple[str, tuple[int, int, int, int]]] = {
    "eye-137x91": ("cat.png", (60, 30, 197, 121)),
    "saucer-400x37": ("coffee.jpg", (100, 300, 500, 337)),
    "flame-23x41": ("rocket.jpg", (330, 250, 353, 291)),
}
"""Name → sample and box (left, top, right, bottom): odd sizes, both orientations, one tiny."""


def write_golden_crops(directory: Path) -> tuple[Path, ...]:
    """Write the golden crops as PNG, which decodes to the same pixels everywhere."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (sample, box) in GOLDEN_CROPS.items():
        path = directory / f"{name}.png"
        with Image.open(Path(__file__).parent / sample) as image:
            image.convert("RGB").crop(box).save(path)
        paths.append(path)
    return tuple(paths)
