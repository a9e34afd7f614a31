"""A family's tower through the exporter and back, against transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.image_utils import load_image

from vistower import VisionEncoder
from vistower.bundle import Bundle
from vistower.golden import replay
from vistower_export.checkpoint import _build_model
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

OUTPUTS = {"pooled": "pooler_output", "projected": "image_embeds"}


def exported(checkpoint: Path, output: Path, **options: Any) -> Bundle:
    """A bundle with int8 and bf16, and without where several sizes are asked for.

    Of random weights int8 is calibrated to pass at one size, and fails at another by chance.
    """
    options = {"precisions": [] if options.get("resolutions") else ["int8", "bf16"]} | options
    return export_bundle(resolve_checkpoint(str(checkpoint)), output, **options)


def require_torchs_numbers(
    bundle: Bundle,
    checkpoint: Path,
    hf_class: str,
    *,
    resolution: tuple[int, int] | None = None,
    pixels: dict[str, Any] | None = None,
    forward: dict[str, Any] | None = None,
    **loading: Any,
) -> None:
    """Compare both dialects, from a picture's file on, with the Hugging Face class and processor.

    ``pixels`` are what is asked of the processor, ``forward`` of the model.
    """
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoint, use_fast=True)
    model = getattr(transformers, hf_class).from_pretrained(checkpoint, **loading).eval()
    inputs = processor(images=load_image(str(SAMPLES[0])), return_tensors="pt", **(pixels or {}))
    with torch.no_grad():
        want = model(**inputs, **(forward or {}))
    at = f"@{resolution[0]}x{resolution[1]}" if resolution else ""
    names = [name for name in ("ort" + at, "portable" + at) if name in _graphs(bundle)]
    assert names
    for name in names:
        encoder = VisionEncoder.open(bundle.directory, device="cpu", graph=name)
        found = encoder.encode(SAMPLES[0])
        tokens = encoder.forward(encoder.preprocess(SAMPLES[0]))
        require_close(tokens, want.last_hidden_state.numpy())
        for part, output in OUTPUTS.items():
            expected = getattr(want, output, None)
            assert (part in encoder.outputs) == (expected is not None)
            if expected is not None:
                require_close(getattr(found, part), expected.numpy())


def require_certified(bundle: Bundle) -> None:
    """Every graph is within its tolerance, by its certificate and its golden vectors."""
    assert bundle.manifest is not None
    for record in bundle.manifest.graphs.values():
        for parity in record.parity.compared.values():
            assert parity.max_rel <= (1e-4 if record.precision == "fp32" else 5e-2)
            assert parity.cosine >= (0.99999 if record.precision == "fp32" else 0.999)
    replayed = {one.what for one in replay(bundle)}
    for name, record in bundle.manifest.graphs.items():
        if record.precision != "bf16":
            assert any(what.startswith(f"{name} graph") for what in replayed)


def require_close(have: np.ndarray, want: np.ndarray) -> None:
    assert have.shape == want.shape
    norm = np.linalg.norm(want, axis=-1, keepdims=True)
    assert (np.abs(have - want) / norm).max() <= 1e-4


def parameters(backbone: Any) -> int:
    """Numbers in the module that transformers makes of a released config."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _build_model(backbone).parameters())


def _graphs(bundle: Bundle) -> Any:
    assert bundle.manifest is not None
    return bundle.manifest.graphs
