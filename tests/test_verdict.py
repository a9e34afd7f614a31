"""``vistower verify --against``: a verdict on each graph, on the user's pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import run
from conftest import tiny_checkpoint
from vistower.bundle import Bundle
from vistower.errors import CheckpointError, CheckpointNotFoundError, EmptyInputError
from vistower.families.dinov3 import FAMILY as DINOV3
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle
from vistower_export.verdict import judge


@pytest.fixture(scope="module")
def bundle(dinov3_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(
        resolve_checkpoint(str(dinov3_checkpoint)),
        tmp_path_factory.mktemp("verdict") / "dinov3",
        precisions=["int8", "bf16"],
        resolutions=[(224, 224), (96, 160)],
    )


def test_every_graph_gets_a_verdict(
    bundle: Bundle,
    dinov3_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, path in zip("ab", SAMPLES, strict=False):
        # One name in two folders, as users have it.
        (tmp_path / name).mkdir()
        Image.open(path).convert("RGB").rotate(10).save(tmp_path / name / "1.png")
    code, text, _ = run(
        capsys, "verify", bundle.directory, "--against", dinov3_checkpoint, "--images", tmp_path
    )
    verdicts = {line[6:].partition(":")[0]: line[:4] for line in text.splitlines()[:8]}
    assert verdicts == {
        name + at: "----" if name == "bf16" else "pass"
        for name in ("portable", "ort", "int8", "bf16")
        for at in ("", "@96x160")
    }
    assert "bf16: cpu does not run bf16" in text
    assert "random-weight checkpoint" in text
    assert "on 2 pictures, against torch in float32: every graph run agrees" in text
    assert code == 0


def test_another_checkpoint_fails_with_code_1(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_checkpoint(tmp_path / "other", DINOV3, seed=7)
    code, text, _ = run(
        capsys, "verify", bundle.directory, "--against", other, "--images", SAMPLES[0]
    )
    assert code == 1
    assert text.count("FAIL") == 6
    assert "disagree: portable, ort" in text


def test_the_verdict_is_by_picture_file(bundle: Bundle, dinov3_checkpoint: Path) -> None:
    verdicts = list(judge(bundle, dinov3_checkpoint, SAMPLES[:2]))
    fp32 = next(verdict for verdict in verdicts if verdict.graph.name == "ort")
    assert fp32.parity is not None
    assert fp32.parity.images == tuple(str(path) for path in SAMPLES[:2])
    assert fp32.parity.method == "CPUExecutionProvider"
    assert fp32.parity.max_rel <= 2e-5
    lossy = next(verdict for verdict in verdicts if verdict.graph.name == "int8")
    assert lossy.parity is not None
    assert lossy.parity.patches.cosine < fp32.parity.patches.cosine
    assert np.isfinite(lossy.parity.max_abs)
    with pytest.raises(EmptyInputError, match="--images"):
        next(judge(bundle, dinov3_checkpoint, []))


def test_another_processor_is_named(
    bundle: Bundle, dinov3_checkpoint: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(dinov3_checkpoint, tmp_path / "other"))
    config = {"image_processor_type": "CLIPImageProcessorFast"}
    (other / "preprocessor_config.json").write_text(json.dumps(config))
    told = r"agrees with DINOv3ViTImageProcessor.* makes CLIPImageProcessor"
    with pytest.raises(CheckpointError, match=told):
        next(judge(bundle, other, SAMPLES[:1]))
    (other / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="PEFT adapter"):
        next(judge(bundle, other, SAMPLES[:1]))
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint directory"):
        next(judge(bundle, tmp_path / "nowhere", SAMPLES[:1]))


def test_the_two_options_go_together(
    bundle: Bundle, dinov3_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = run(capsys, "verify", bundle.directory, "--against", dinov3_checkpoint)
    assert code == 2
    assert "go together" in errors
