"""The files every backend works on: checkpoint, exports, pictures, and torch's own numbers.

``python -m benchmarks.artifacts FOLDER DEVICE MODEL...`` in the environment with torch. What is
there is kept, but for our bundle: that is what is being measured, so it is made anew.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.models import MODELS, Model

if TYPE_CHECKING:
    import torch

    from vistower.tolerance import GraphPrecision

PICTURES = 8
PICTURE_SIZE = (1024, 768)
PROJECTION = 512

REDUCED: dict[str, dict[str, tuple[GraphPrecision, ...]]] = {
    "cpu": {"clip": ("int8",), "dinov3": ("int8",)},
    "cuda": {"clip": ("fp16", "bf16"), "dinov3": ("bf16",)},
}
"""Device → family → the precisions exported beside float32. DINOv3's upstream rules fp16 out."""

Array = npt.NDArray[np.float32]


def pictures(root: Path) -> list[Path]:
    """The benchmark's pictures, in order."""
    return sorted((root / "pictures").glob("*.jpg"))


def write_pictures(root: Path) -> list[Path]:
    """Eight JPEG files of 1024×768, quality 90, cut from the sample photographs."""
    from vistower_export.pictures import SAMPLES

    folder = root / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    photographs = [sample for sample in SAMPLES if sample.suffix == ".jpg"]
    for index in range(PICTURES):
        path = folder / f"{index}.jpg"
        if path.exists():
            continue
        with Image.open(photographs[index % len(photographs)]) as image:
            picture = image.convert("RGB")
        # Each photograph twice: whole, and its middle; so no two files are alike.
        width, height = picture.size
        inset = 0 if index < len(photographs) else min(width, height) // 8
        picture = picture.crop((inset, inset, width - inset, height - inset))
        picture.resize(PICTURE_SIZE, Image.Resampling.LANCZOS).save(path, quality=90)
    return pictures(root)


def write_reference(root: Path, model: Model, files: Sequence[Path]) -> None:
    """What torch eager in float32 makes of the pictures, and for CLIP of Pillow's pixels too.

    ``pixel_values`` (8, 3, H, W), ``tokens`` (8, T, D), ``features`` (the same without register
    tokens) and for CLIP ``projected`` (8, 512): the normalized projection of the pooled CLS token.
    """
    import torch

    from vistower_export import reference as hf

    checkpoint = root / "checkpoints" / model.name
    tower = hf.load_model(checkpoint)
    processor = hf.load_processor(checkpoint, "torchvision")
    images = [Image.open(file).convert("RGB") for file in files]

    def state(backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loaded = processor if backend == "torchvision" else hf.load_processor(checkpoint, backend)
        values = loaded(images=images, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            output = tower(pixel_values=values)
        return values, output.last_hidden_state, output.pooler_output

    values, tokens, _ = state("torchvision")
    registers = getattr(tower.config, "num_register_tokens", 0)
    features = torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], dim=1)
    arrays = {
        "pixel_values": values.numpy(),
        "tokens": tokens.numpy(),
        "features": features.numpy(),
    }
    if model.family == "clip":
        projected = state("pil")[2].numpy() @ projection(model)
        arrays["projected"] = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    path = root / "reference" / f"{model.name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, allow_pickle=False, **arrays)


def projection(model: Model) -> Array:
    """A random projection (D, 512): the checkpoint is a vision tower and has none."""
    draw = np.random.default_rng(0).standard_normal((model.hidden, PROJECTION))
    return np.asarray(draw * model.hidden**-0.5, dtype=np.float32)


def write_plain(root: Path, model: Model) -> None:
    """torch's export as its documentation shows it, and for CLIP one with a projection on top."""
    import torch

    from vistower_export import reference as hf

    plain = root / "plain" / model.name / "model.onnx"
    projected = root / "projected" / model.name
    if plain.exists() and (model.family != "clip" or projected.exists()):
        return
    checkpoint = root / "checkpoints" / model.name
    tower = hf.load_model(checkpoint)

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            state: torch.Tensor = self.tower(pixel_values=pixel_values).last_hidden_state
            return state

    class Projected(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.projection = torch.nn.Parameter(torch.from_numpy(projection(model)))

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            pooled: torch.Tensor = self.tower(pixel_values=pixel_values).pooler_output
            return pooled @ self.projection

    _export(Tokens(), "last_hidden_state", plain)
    if model.family == "clip":
        partial = projected.with_name(f".{projected.name}")
        shutil.rmtree(partial, ignore_errors=True)
        _export(Projected(), "image_embeds", partial / "model.onnx")
        for name in ("config.json", "preprocessor_config.json"):
            shutil.copy(checkpoint / name, partial / name)
        shutil.rmtree(projected, ignore_errors=True)
        partial.rename(projected)


def _export(module: torch.nn.Module, output: str, path: Path) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            (torch.zeros(2, 3, 224, 224),),
            path,
            input_names=["pixel_values"],
            output_names=[output],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            opset_version=20,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def write_optimum(root: Path, model: Model, python: str) -> None:
    """optimum's own export, made in optimum's environment; it knows CLIP only."""
    output = root / "optimum" / model.name
    if model.family != "clip" or output.exists():
        return
    partial = output.with_name(f".{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    command = [python, "-m", "optimum.commands.optimum_cli", "export", "onnx"]
    command += ["--model", str(root / "checkpoints" / model.name)]
    subprocess.run(
        [*command, "--task", "feature-extraction", str(partial)], check=True, capture_output=True
    )
    partial.rename(output)


def graphs(root: Path, name: str) -> dict[str, str]:
    """Kind → precision of the graphs that a model's bundle holds, from its manifest.

    Of one resolution, and with ``pixel_values`` as their input, which is what others take too.
    """
    manifest = json.loads((root / "bundles" / name / "vistower.json").read_text("utf-8"))
    return {
        kind: graph["precision"]
        for kind, graph in manifest["graphs"].items()
        if "@" not in kind and not kind.endswith("_uint8")
    }


def write_bundle(root: Path, model: Model, device: str) -> None:
    """Our export, with the reduced precisions of the device; without those that fail its gate."""
    from vistower.errors import ParityError
    from vistower_export.source import resolve_checkpoint
    from vistower_export.steps import export_bundle

    checkpoint = resolve_checkpoint(str(root / "checkpoints" / model.name))
    bundle = root / "bundles" / model.name
    try:
        export_bundle(checkpoint, bundle, precisions=REDUCED[device][model.family], overwrite=True)
    except ParityError as error:
        print(f"{model.name}: float32 only: {error}", flush=True)
        export_bundle(checkpoint, bundle, overwrite=True)


def make(root: Path, device: str, names: Sequence[str]) -> None:
    """Make everything for some models, but optimum's export."""
    from vistower_export.checkpoint import write_random_checkpoint

    files = write_pictures(root)
    for name in names:
        model = MODELS[name]
        checkpoint = root / "checkpoints" / name
        if not checkpoint.exists():
            print(f"{name}: random-weight checkpoint", flush=True)
            write_random_checkpoint(name, checkpoint)
        print(f"{name}: our bundle, torch's plain export, torch's numbers", flush=True)
        write_bundle(root, model, device)
        write_plain(root, model)
        write_reference(root, model, files)


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
