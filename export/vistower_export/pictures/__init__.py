"""The sample pictures, and small odd-sized crops of them for the golden vectors."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

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


def calibration_pictures() -> tuple[Image.Image, ...]:
    """Quarters and mirror images of the samples, RGB: none of the pictures a bundle is gated on."""
    pictures = []
    for path in SAMPLES:
        with Image.open(path) as file:
            image = file.convert("RGB")
        width, height = image.size
        half_width, half_height = width // 2, height // 2
        pictures += [
            image.crop((left, top, left + half_width, top + half_height))
            for left in (0, half_width)
            for top in (0, half_height)
        ]
        pictures.append(ImageOps.mirror(image))
    return tuple(pictures)
