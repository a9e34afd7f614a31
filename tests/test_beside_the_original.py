"""The five scores on a copy of the original's mixins, as transformers takes the processor there.

Of a picture and its edit, as the pipeline compares them; of unlike pictures a cosine may be near 0,
where the bar of tests/test_consumers.py is absolute. scripts/test runs this beside the very
releases the original pipeline pins, where CLIP's processor is the PIL one, with bundles that
transformers 4.57 exported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from consumers import SCORES, clip_pipe
from torch_mixins import TorchCLIP, TorchDINOv3
from vistower import CLIPMixin, DINOv3Mixin
from vistower_export.pictures import SAMPLES

TOLERANCE = 1e-6


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mode", [None, "inner", "outer"])
def test_the_scores_are_the_originals(score: str, mode: str | None, scaled_models: Path) -> None:
    pipe, method = SCORES[score]
    name = "scaled-clip" if pipe is clip_pipe else "scaled-dinov3"
    ours: Any = CLIPMixin if pipe is clip_pipe else DINOv3Mixin
    theirs: Any = TorchCLIP if pipe is clip_pipe else TorchDINOv3
    ours = pipe(ours)(model_path=str(scaled_models / "bundles" / name), device="cpu")
    theirs = pipe(theirs)(model_path=str(scaled_models / "checkpoints" / name), device="cpu")
    one, other = (Image.open(path).convert("RGB") for path in SAMPLES[2:4])
    other = Image.blend(one, other.resize(one.size), 0.3)
    width, height = one.size
    boxes = [(width // 5, height // 4, width // 2 + 1, height * 3 // 4 + 1)]
    want = getattr(theirs, method)(one, other, boxes, mode)
    assert getattr(ours, method)(one, other, boxes, mode) == pytest.approx(want, rel=TOLERANCE)
