"""The picture of the README's first command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vistower_export.pictures import SAMPLES

WITHOUT_TORCH = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script as in an environment that has none."""

DEMO = Path(__file__).parents[1] / "scripts" / "demo.py"


def test_the_demo_draws_what_the_towers_see(
    clip_bundle: Path, dinov3_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "demo.png"
    command = [sys.executable, "-c", WITHOUT_TORCH, DEMO, clip_bundle, dinov3_bundle]
    command += ["--pictures", SAMPLES[0].parent, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("random-weight") == 2
    with Image.open(output) as drawn:
        assert np.asarray(drawn.convert("RGB")).std() > 20
