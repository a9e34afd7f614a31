"""The five scores of the contract's three consumers: the same on torch's mixins and on vistower's.

The bar is 1e-6 of the score. Two scores can be small differences of large numbers: float32 then
holds as many digits less as their condition number κ has, torch's no more than ours.

- Patch EMD, E = Σ P_ij |a_i − b_j|²: tokens that are off by ε of their norm move it by at most
  Σ P_ij 2 |a_i − b_j| ε (|a_i| + |b_j|), with the plan P fixed (it is optimal, so to first order
  its own change counts nothing). Relative to E this is κ ε. Of towers of the real size κ is 4 to 20
  on edited pictures; where it is above 10, the bar is 1e-7 κ.
- A cosine, Σ u_i v_i of unit vectors, is exact to ε of Σ |u_i v_i| ≤ 1: where tokens are nearly
  orthogonal, its bar is absolute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from conftest import tiny_checkpoint
from consumers import SCORES, Box, clip_pipe, square_crop
from torch_mixins import TorchCLIP, TorchCLIPMixin, TorchDINOv3
from vistower import CLIPMixin, DINOv3Mixin
from vistower.families.clip import FAMILY as CLIP
from vistower.families.dinov3 import FAMILY as DINOV3
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

RELATIVE = 1e-6
MODES = (None, "inner", "outer")
SIZES = ((64, 48), (37, 91), (31, 200), (640, 33), (500, 451))
CLIP_MODES = ("L", "LA", "RGBA", "P", "CMYK", "1", "I;16")
DINOV3_MODES = ("L", "P", "1")


class Remembered:
    """A torch model that keeps its outputs: the scores ask for the same pictures many times."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        self.outputs: dict[bytes, Any] = {}

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        key = pixel_values.numpy().tobytes()
        if key not in self.outputs:
            self.outputs[key] = self.model(pixel_values=pixel_values)
        return self.outputs[key]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("consumers")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "scaled": True}
    return {
        "clip": tiny_checkpoint(root / "clip", CLIP, **sizes),
        "dinov3": tiny_checkpoint(root / "dinov3", DINOV3, **sizes),
    }


@pytest.fixture(scope="module")
def pipes(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[Any, tuple[Any, Any]]]:
    """By processor backend and consumer: ours and the original."""
    found: dict[str, dict[Any, tuple[Any, Any]]] = {}
    for name, backend in (("clip", "torchvision"), ("clip", "pil"), ("dinov3", "torchvision")):
        checkpoint = checkpoints[name]
        output = tmp_path_factory.mktemp("bundles") / name
        export_bundle(resolve_checkpoint(str(checkpoint)), output, backend=backend)
        if name == "clip":
            theirs: Any = type("Original", (TorchCLIP,), {"backend": backend})
        else:
            theirs = TorchDINOv3
        ours = CLIPMixin if name == "clip" else DINOv3Mixin
        for pipe in {pipe for pipe, _ in SCORES.values()}:
            if (pipe is clip_pipe) is not (name == "clip"):
                continue
            original = pipe(theirs)(model_path=str(checkpoint), device="cpu")
            original.model = Remembered(original.model)
            pair = pipe(ours)(model_path=str(output), device="cpu"), original
            found.setdefault(backend, {})[pipe] = pair
    return found


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in SAMPLES]


def boxes_of(picture: Image.Image) -> list[Box]:
    """Two boxes, an object and something beside it."""
    width, height = picture.size
    return [
        (width // 5, height // 4, width // 2 + 1, height * 3 // 4 + 1),
        (width * 6 // 10, 0, width * 9 // 10, height // 3),
    ]


def edit(picture: Image.Image, other: Image.Image) -> Image.Image:
    """The picture with something else over part of its object, and all of it changed."""
    edited = Image.blend(picture, other.resize(picture.size), 0.3)
    left, top, right, bottom = boxes_of(picture)[0]
    middle = (left + right) // 2 + 1
    edited.paste(other.resize((middle - left, bottom - top)), (left, top))
    return edited


def condition(a: np.ndarray, b: np.ndarray) -> float:
    """κ of the patch EMD of tokens (N, D) and (M, D), see the module's docstring."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cost = cdist(a, b, "sqeuclidean")
    plan = ot.emd(np.full(len(a), 1 / len(a)), np.full(len(b), 1 / len(b)), cost)
    norms = np.linalg.norm(a, axis=1)[:, None] + np.linalg.norm(b, axis=1)
    return float((plan * 2 * np.sqrt(cost) * norms).sum() / (plan * cost).sum())


def assert_same_score(
    pipes: dict[Any, tuple[Any, Any]], score: str, one: Image.Image, edited: Image.Image
) -> list[float]:
    """Compare all mask modes; returns the original's scores."""
    pipe, method = SCORES[score]
    ours, theirs = pipes[pipe]
    scores = []
    for mode in MODES:
        arguments = one, edited, boxes_of(one), mode
        expected = getattr(theirs, method)(*arguments)
        actual = getattr(ours, method)(*arguments)
        assert type(actual) is type(expected) is float
        bar = RELATIVE
        if method == "patch_emd":
            tokens = (theirs.get_features(picture).numpy() for picture in (one, edited))
            bar = max(bar, 1e-7 * condition(*tokens))
        assert abs(actual - expected) <= bar * abs(expected), (mode, bar, actual, expected)
        scores.append(expected)
    return scores


COMBINATIONS = [
    (score, backend)
    for score in SCORES
    for backend in (("torchvision", "pil") if "CLIP" in score else ("torchvision",))
]


@pytest.mark.parametrize(("score", "backend"), COMBINATIONS)
def test_photographs_and_their_edits(
    score: str, backend: str, pipes: Any, photographs: list[Image.Image]
) -> None:
    scores = []
    for one, other in zip(photographs, photographs[1:] + photographs[:1], strict=True):
        scores += assert_same_score(pipes[backend], score, one, edit(one, other))
    # Scores that hardly differ would agree whatever was compared.
    assert np.ptp(scores) > 1000 * RELATIVE


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize(("score", "backend"), COMBINATIONS)
def test_odd_sizes(
    score: str, backend: str, size: tuple[int, int], pipes: Any, photographs: list[Image.Image]
) -> None:
    one = photographs[0].resize(size)
    assert_same_score(pipes[backend], score, one, edit(one, photographs[1]))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(
    ("score", "backend", "mode"),
    [
        (score, backend, mode)
        for score, backend in COMBINATIONS
        for mode in (CLIP_MODES if "CLIP" in score else DINOV3_MODES)
    ],
)
def test_picture_modes(
    score: str, backend: str, mode: str, pipes: Any, photographs: list[Image.Image]
) -> None:
    def of_mode(picture: Image.Image) -> Image.Image:
        if mode == "I;16":
            return picture.convert("L").convert("I").convert("I;16")
        if mode in ("LA", "RGBA"):
            picture = picture.copy()
            picture.putalpha(photographs[2].convert("L").resize(picture.size))
        return picture.convert(mode)

    one = photographs[3].resize((120, 90))
    assert_same_score(pipes[backend], score, of_mode(one), of_mode(edit(one, photographs[4])))


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_the_distance_of_near_equal_pictures(
    backend: str, pipes: Any, photographs: list[Image.Image]
) -> None:
    ours, theirs = pipes[backend][clip_pipe]
    one = photographs[0]
    edited = one.copy()
    edited.paste((255, 0, 0), (0, 0, 2, 2))
    kappa = condition(*(theirs.get_features(picture).numpy() for picture in (one, edited)))
    assert kappa > 50
    expected = theirs.patch_emd(one, edited, [], None)
    assert abs(ours.patch_emd(one, edited, [], None) - expected) <= 1e-7 * kappa * expected
    assert ours.patch_emd(one, one, [], None) == theirs.patch_emd(one, one, [], None) == 0


@pytest.mark.parametrize("score", [name for name in SCORES if "DINOv3" in name])
def test_scores_of_unlike_pictures(score: str, pipes: Any, photographs: list[Image.Image]) -> None:
    pipe, method = SCORES[score]
    ours, theirs = pipes["torchvision"][pipe]
    for one, other in zip(photographs, photographs[1:] + photographs[:1], strict=True):
        arguments = one, other.resize(one.size), boxes_of(one), None
        expected = getattr(theirs, method)(*arguments)
        assert abs(getattr(ours, method)(*arguments) - expected) <= RELATIVE


def test_crops_are_enlarged_and_reduced(photographs: list[Image.Image]) -> None:
    for box in ((0, 0, 60, 90), (0, 0, 400, 300)):
        crop = square_crop(photographs[0], box, 224)
        assert crop.shape == (224, 224, 3)
        assert crop.dtype == np.uint8


def test_the_reference_stands_in_the_mro_as_the_original() -> None:
    names = [cls.__name__ for cls in clip_pipe(TorchCLIPMixin).__mro__]
    assert names[1:] == ["TorchCLIPMixin", "ClipScores", "MaskProcessor", "BasePipe", "object"]
