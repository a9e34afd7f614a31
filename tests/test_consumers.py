"""The three consumers of the mixins, as real classes over a real MRO: same scores on both."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from scipy.spatial.distance import cdist

from torch_mixins import TorchCLIPMixin, TorchDINOv3Mixin
from vistower import CLIPMixin, DINOv3Mixin
from vistower_export.pictures import SAMPLES

TOLERANCE = 1e-4


class BasePipe:
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.name = kwargs.get("name", "pipe")


class MaskProcessor:
    """Boxes to boolean patch masks."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def patch_mask(self, grid: int, box: tuple[int, int, int, int]) -> np.ndarray:
        left, top, right, bottom = box
        mask = np.zeros((grid, grid), dtype=bool)
        mask[top:bottom, left:right] = True
        return mask.reshape(-1)


class PatchEmd:
    """Earth mover's distance between the CLIP patches of two pictures."""

    def score(self, one: Image.Image, two: Image.Image) -> float:
        grid = self.img_input_size // self.patch_size
        mask = self.patch_mask(grid, (1, 1, grid - 1, grid - 1))
        a = self.get_features(one, mask).cpu().numpy()
        b = self.get_features(two).cpu().numpy()
        cost = cdist(a, b, metric="cosine")
        weights = np.full(len(a), 1 / len(a)), np.full(len(b), 1 / len(b))
        return float(ot.emd2(*weights, cost))


class PatchSimilarity:
    """Masked DINOv3 patches of an edit, each against its best match in the original."""

    def score(self, one: Image.Image, two: Image.Image) -> float:
        grid = self.input_image_size // self.patch_size
        mask = torch.from_numpy(self.patch_mask(grid, (2, 3, grid - 4, grid - 1)))
        a = F.normalize(self.get_features(one, mask=mask).cpu(), dim=-1)
        b = F.normalize(self.get_features(two, mask=mask).cpu(), dim=-1)
        best = torch.matmul(a, b.t()).max(dim=1).values
        center_a, center_b = torch.mean(a, dim=0), torch.mean(b, dim=0)
        return float(torch.sum(best) / len(best) + torch.dot(center_a, center_b))


class BodyAppearance:
    """CLS and mean patch similarity of padded crops, passed as arrays."""

    def crop(self, image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
        pixels = np.asarray(image.convert("RGB").crop(box))
        side = max(pixels.shape[:2])
        height, width = side - pixels.shape[0], side - pixels.shape[1]
        padding = ((height // 2, height - height // 2), (width // 2, width - width // 2), (0, 0))
        return np.pad(pixels, padding)

    def score(self, one: Image.Image, two: Image.Image) -> float:
        a, b = self.crop(one, (30, 10, 171, 190)), self.crop(two, (40, 50, 140, 187))
        cls = F.cosine_similarity(
            self.get_cls_feature(a).squeeze(0), self.get_cls_feature(b).squeeze(0), dim=0
        )
        features = self.get_features(a)
        unit = features / features.norm(p=2, dim=-1, keepdim=True)
        return float(cls + unit.mean(dim=0).norm())


class ClipPipe(CLIPMixin, PatchEmd, MaskProcessor, BasePipe): ...


class TorchClipPipe(TorchCLIPMixin, PatchEmd, MaskProcessor, BasePipe): ...


class SimilarityPipe(DINOv3Mixin, PatchSimilarity, MaskProcessor, BasePipe): ...


class TorchSimilarityPipe(TorchDINOv3Mixin, PatchSimilarity, MaskProcessor, BasePipe): ...


class BodyPipe(DINOv3Mixin, BodyAppearance, MaskProcessor): ...


class TorchBodyPipe(TorchDINOv3Mixin, BodyAppearance, MaskProcessor): ...


@pytest.mark.parametrize(
    ("ours", "theirs", "family"),
    [
        (ClipPipe, TorchClipPipe, "clip"),
        (SimilarityPipe, TorchSimilarityPipe, "dinov3"),
        (BodyPipe, TorchBodyPipe, "dinov3"),
    ],
)
def test_the_same_scores_as_with_the_torch_mixins(
    ours: Any, theirs: Any, family: str, request: pytest.FixtureRequest
) -> None:
    bundle: Path = request.getfixturevalue(f"{family}_bundle")
    checkpoint: Path = request.getfixturevalue(f"{family}_checkpoint")
    # BodyPipe has no BasePipe to end the chain of keywords: only vistower's mixin copes alone.
    keywords = {"device": "cpu"}
    pipe = ours(model_path=str(bundle), **keywords) if ours is not BodyPipe else None
    if pipe is None:

        class Rooted(BodyPipe, BasePipe): ...

        pipe = Rooted(model_path=str(bundle), **keywords)
    reference = theirs(model_path=str(checkpoint), **keywords)
    images = [Image.open(path).convert("RGB") for path in SAMPLES]
    scores = []
    for one, two in itertools.pairwise(images):
        expected = reference.score(one, two)
        assert abs(pipe.score(one, two) - expected) <= TOLERANCE
        scores.append(expected)
    assert np.ptp(scores) > 10 * TOLERANCE
