"""What `optimum-cli export onnx` writes for CLIP loads without a vistower.json."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from torch_mixins import TorchCLIP
from vistower import VisionEncoder
from vistower_export.pictures import SAMPLES


def test_an_optimum_export_loads_and_agrees_with_torch(
    clip_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "optimum-clip"
    cli = Path(sys.executable).parent / "optimum-cli"
    command = [cli, "export", "onnx", "--model", clip_checkpoint, "--task", "feature-extraction"]
    subprocess.run([*command, output], check=True, capture_output=True)
    assert not (output / "vistower.json").exists()
    encoder = VisionEncoder.open(output, device="cpu")
    embeddings = encoder.encode(SAMPLES[0])
    reference = TorchCLIP(model_path=str(clip_checkpoint))
    with Image.open(SAMPLES[0]) as image:
        expected = reference.get_features(image).numpy()
    assert np.abs(embeddings.patches[0] - expected).max() <= 1e-4
    assert (encoder.layout.image_size, encoder.layout.patch_size) == ((224, 224), 32)
