"""The sample pictures, small odd-sized crops of them for the golden vectors, and hard ones.

The samples decide whether tokens agree. Whether *pixels* agree is decided on `write_hard_pictures`
too: sizes, shapes and modes on which any two image processors part ways.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
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


def write_hard_pictures(directory: Path, size: tuple[int, int]) -> tuple[Path, ...]:
    """Write pictures that tell image processors apart; the same ones every time.

    By shape, in RGB: of no structure but noise, tiny and enlarged, much reduced, wide and tall
    (a crop, a squash and padding differ), with no or one axis to resample. By mode: one or four
    channels, alpha, palettes with and without transparency, sixteen bits, EXIF orientation.

    None is one or three pixels high: the PIL processors of transformers 4.57 take that axis for
    the channels.

    Args:
        directory: made if need be.
        size: (height, width) in pixels that the processor gives.

    Returns:
        The files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(5)

    def noise(width: int, height: int, channels: int = 3) -> Image.Image:
        shape = (height, width, channels) if channels > 1 else (height, width)
        return Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))

    with Image.open(Path(__file__).parent / "coffee.jpg") as file:
        photo = file.convert("RGB")
    height, width = size
    shapes = {
        "noise-97x61": noise(97, 61),
        "output-size": noise(width, height),
        # A centre crop of these starts at one and a half.
        "output-height": noise(width + 3, height),
        "output-width": noise(width, height + 3),
        "noise-107x100": noise(107, 100),
        "noise-100x107": noise(100, 107),
        "square-256": noise(256, 256),
        "wide-700x90": photo.resize((700, 90)),
        "tall-90x700": photo.resize((90, 700)),
        "strip-2x90": noise(2, 90),
        "strip-100x2": noise(100, 2),
        "tiny-5x4": noise(5, 4),
        "enlarged-40x30": photo.crop((100, 100, 140, 130)),
        # Every filter overshoots here, so that where it is clamped shows.
        "checks-320x240": Image.fromarray(
            np.kron(np.indices((30, 40)).sum(axis=0) % 2, np.full((8, 8), 255)).astype(np.uint8)
        ).convert("RGB"),
    }
    small = photo.resize((150, 110))
    clear = Image.linear_gradient("L").resize(small.size)
    see_through = small.copy()
    see_through.putalpha(clear)
    grey_through = small.convert("L")
    grey_through.putalpha(clear)
    palette = small.quantize(40)
    modes = {
        "grey": small.convert("L"),
        "grey-alpha": grey_through,
        "alpha": see_through,
        "palette": palette,
        "bits": small.convert("1"),
        "deep": Image.fromarray(random.integers(0, 1 << 16, (61, 97), dtype=np.uint16)),
    }
    paths = []
    for name, image in (shapes | modes).items():
        paths.append(directory / f"{name}.png")
        image.save(paths[-1])
    transparent = {
        "palette-one-clear": (palette, 3),
        "palette-alpha": (palette, bytes(range(0, 240, 6))),
        "grey-one-clear": (small.convert("L"), 90),
        "colour-one-clear": (small, small.getpixel((70, 50))),
    }
    for name, (image, transparency) in transparent.items():
        paths.append(directory / f"{name}.png")
        image.save(paths[-1], transparency=transparency)
    paths.append(directory / "four-inks.tiff")
    small.convert("CMYK").save(paths[-1])
    paths.append(directory / "large-1700x1300.jpg")
    photo.resize((1700, 1300)).save(paths[-1], quality=95)
    paths.append(directory / "turned.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    small.save(paths[-1], exif=exif, quality=90)
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
