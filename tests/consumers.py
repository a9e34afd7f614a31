"""The three consumers of the contract, five scores, as real classes over a real MRO.

Nothing in them knows whose mixins they stand on: `clip_pipe`, `structure_pipe` and `body_pipe`
make one class of a consumer and a mixin, torch's or vistower's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import ot
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from scipy.spatial.distance import cdist

Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels of the picture."""

GREY = (124, 116, 104)


class BasePipe:
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.name = kwargs.get("name", "pipe")


class MaskProcessor:
    """Boxes to patch masks; it has no ``__init__`` of its own."""

    def patch_mask(
        self,
        size: tuple[int, int],
        boxes: list[Box],
        mode: str | None,
        input_size: int,
        patch_size: int,
        threshold: float = 0.1,
    ) -> npt.NDArray[np.bool_] | None:
        """A mask of the patches outside (``outer``) or inside (``inner``) of the boxes."""
        if mode is None:
            return None
        inside = 0 if mode == "outer" else 1
        pixels = np.full((input_size, input_size), 1 - inside, dtype=np.float32)
        for left, top, right, bottom in boxes:
            x, y = input_size / size[0], input_size / size[1]
            rows = slice(int(top * y), int(bottom * y))
            pixels[rows, int(left * x) : int(right * x)] = inside
        side = input_size // patch_size
        cells = pixels.reshape(side, patch_size, side, patch_size)
        return (cells.mean(axis=(1, 3)) > threshold).astype(np.int64).reshape(-1) == 1


def square_crop(picture: Image.Image, box: Box, side: int) -> npt.NDArray[np.uint8]:
    """A crop padded to a square with a colour: by areas where it shrinks, cubic where it grows."""
    crop = picture.convert("RGB").crop(box)
    longest = max(crop.size)
    square = Image.new("RGB", (longest, longest), GREY)
    square.paste(crop, ((longest - crop.width) // 2, (longest - crop.height) // 2))
    filter_ = Image.Resampling.BOX if longest > side else Image.Resampling.BICUBIC
    return np.array(square.resize((side, side), filter_))


class ClipScores:
    def patch_emd(
        self, one: Image.Image, edited: Image.Image, boxes: list[Box], mode: str | None
    ) -> float:
        size = self.img_input_size, self.patch_size
        mask = self.patch_mask(edited.size, boxes, mode, *size)
        a = self.get_features(one).cpu().numpy()
        b = self.get_features(edited, mask=mask).cpu().numpy()
        cost = cdist(a, b, "sqeuclidean")
        weights = np.full(len(a), 1 / len(a)), np.full(len(b), 1 / len(b))
        return float(ot.emd2(*weights, cost))

    def object_similarity(
        self, one: Image.Image, edited: Image.Image, boxes: list[Box], mode: str | None
    ) -> float:
        u, v = (
            self.get_cls_feature(square_crop(picture, boxes[0], self.img_input_size))
            for picture in (one, edited)
        )
        u = u / u.norm(p=2, dim=-1, keepdim=True)
        v = v / v.norm(p=2, dim=-1, keepdim=True)
        return torch.sum(u * v).item()


class StructureScores:
    def structure_similarity(
        self, one: Image.Image, edited: Image.Image, boxes: list[Box], mode: str | None
    ) -> float:
        size = self.input_image_size, self.patch_size
        similarities = []
        for picture in (one, edited):
            mask = self.patch_mask(picture.size, boxes, mode, *size)
            features = self.get_features(picture, mask=mask).cpu()
            unit = F.normalize(features, dim=-1, p=2)
            similarities.append(torch.matmul(unit, unit.t()))
        return 1 / (1 + 100 * F.mse_loss(*similarities).item())


class BodyScores:
    def object_similarity(
        self, one: Image.Image, edited: Image.Image, boxes: list[Box], mode: str | None
    ) -> float:
        u, v = (
            self.get_cls_feature(square_crop(picture, boxes[0], self.input_image_size))
            for picture in (one, edited)
        )
        return F.cosine_similarity(u, v, dim=0).item()

    def body_appearance(
        self, one: Image.Image, edited: Image.Image, boxes: list[Box], mode: str | None
    ) -> float:
        means = []
        for picture in (one, edited):
            mask = self.patch_mask(
                picture.size, boxes, mode, self.input_image_size, self.patch_size
            )
            if mask is not None:
                mask = torch.from_numpy(mask)
            features = self.get_features(picture, mask=mask).cpu()
            means.append(F.normalize(torch.mean(features, dim=0), p=2, dim=0))
        return torch.dot(*means).item()


def clip_pipe(mixin: Any) -> Any:
    class ClipPipe(mixin, ClipScores, MaskProcessor, BasePipe): ...

    return ClipPipe


def structure_pipe(mixin: Any) -> Any:
    class StructurePipe(mixin, StructureScores, MaskProcessor, BasePipe): ...

    return StructurePipe


def body_pipe(mixin: Any) -> Any:
    class BodyPipe(mixin, BodyScores, MaskProcessor): ...

    return BodyPipe


SCORES = {
    "patch EMD (CLIP)": (clip_pipe, "patch_emd"),
    "object similarity (CLIP)": (clip_pipe, "object_similarity"),
    "structure similarity (DINOv3)": (structure_pipe, "structure_similarity"),
    "object similarity (DINOv3)": (body_pipe, "object_similarity"),
    "body appearance (DINOv3)": (body_pipe, "body_appearance"),
}
