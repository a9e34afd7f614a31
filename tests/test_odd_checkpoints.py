"""Checkpoints as people have them: adapters, folders, wrapped or broken weights, short configs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from command_line import run
from hub_server import HubServer, Repo, commit_sha
from test_source import TOWER, User
from vistower import VisionEncoder, errors
from vistower.bundle import Bundle
from vistower.families import built_in
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

FAMILIES = pytest.mark.parametrize("family", ["clip", "dinov3"])


@pytest.fixture
def copy(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """A copy of a family's checkpoint that may be changed."""

    def of(family: str) -> Path:
        source = request.getfixturevalue(f"{family}_checkpoint")
        return Path(shutil.copytree(source, tmp_path / "checkpoint"))

    return of


def export(checkpoint: Path, output: Path, **options: Any) -> Bundle:
    return export_bundle(resolve_checkpoint(str(checkpoint)), output, **options)


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Save the weights as ``change`` returns them, or leaves them."""
    weights = load_file(checkpoint / "model.safetensors")
    changed = change(weights)
    save_file(changed or weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


@FAMILIES
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "backbone.", "module._orig_mod."])
def test_a_prefix_before_every_weight_is_named(
    family: str, prefix: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = copy(family)
    rewrite(checkpoint, lambda weights: {prefix + name: w for name, w in weights.items()})
    with pytest.raises(errors.CheckpointError, match=rf"named with '{prefix}.*save_pretrained"):
        export(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@FAMILIES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named(
    family: str, value: float, dtype: torch.dtype, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = copy(family)

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        name = next(name for name in weights if "layers.1" in name or "layer.1" in name)
        for key in weights:
            weights[key] = weights[key].to(dtype)
        weights[name].view(-1)[3:5] = value
        broken.append(name.removeprefix("vision_model.").removeprefix("model."))

    broken: list[str] = []
    rewrite(checkpoint, spoil)
    with pytest.raises(errors.CheckpointError, match=rf"NaN or infinite.* 2 in .*{broken[0]}\."):
        export(checkpoint, tmp_path / "bundle")


@FAMILIES
@pytest.mark.parametrize(
    "file", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_an_adapter_beside_its_base_is_refused(
    family: str, file: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = copy(family)
    (checkpoint / file).write_text("{}")
    told = rf"PEFT adapter \({file}.*merge_and_unload"
    with pytest.raises(errors.CheckpointError, match=told):
        export(checkpoint, tmp_path / "bundle")
    with HubServer({TOWER: Repo.of_directory(checkpoint)}) as hub:
        outcome = User(hub.endpoint, tmp_path / "home").resolve(TOWER)
        assert outcome.error is errors.CheckpointError
        assert "merge_and_unload" in outcome.message
        assert hub.downloaded() == []


def test_an_adapter_without_its_base_is_refused_as_one(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(errors.CheckpointError, match="PEFT adapter"):
        resolve_checkpoint(str(tmp_path))


@FAMILIES
def test_an_adapter_among_the_weights_is_refused(
    family: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = copy(family)

    def adapt(weights: dict[str, torch.Tensor]) -> None:
        name = next(name for name in weights if name.endswith("q_proj.weight"))
        module = name.removesuffix(".weight")
        weights[f"{module}.lora_A.default.weight"] = torch.ones(4, 64)
        weights[f"{module}.lora_B.default.weight"] = torch.ones(64, 4)

    rewrite(checkpoint, adapt)
    with pytest.raises(errors.CheckpointError, match=r"lora_A.*merge_and_unload"):
        export(checkpoint, tmp_path / "bundle")


def test_a_merged_adapter_exports(clip_checkpoint: Path, tmp_path: Path) -> None:
    """What the message asks for, done by hand: the product of the two added to the weight."""
    checkpoint = Path(shutil.copytree(clip_checkpoint, tmp_path / "merged"))
    before = VisionEncoder.open(export(clip_checkpoint, tmp_path / "a").directory, device="cpu")

    def merge(weights: dict[str, torch.Tensor]) -> None:
        name = next(name for name in weights if name.endswith("q_proj.weight"))
        weights[name] += 0.3 * torch.ones(64, 4) @ torch.ones(4, 64)

    rewrite(checkpoint, merge)
    after = VisionEncoder.open(export(checkpoint, tmp_path / "b").directory, device="cpu")
    assert np.abs(after.encode(SAMPLES[0]).cls - before.encode(SAMPLES[0]).cls).max() > 1e-3


@pytest.mark.parametrize("folder", ["image_encoder", "nested/twice"])
def test_a_checkpoint_in_a_subfolder(
    folder: str, clip_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = tmp_path / "pipeline"
    shutil.copytree(clip_checkpoint, top / folder)
    (top / "model_index.json").write_text("{}")
    local = resolve_checkpoint(str(top), subfolder=f"{folder}/")
    assert local == resolve_checkpoint(str(top / folder))
    with HubServer({TOWER: Repo.of_directory(top)}) as hub:
        user = User(hub.endpoint, tmp_path / "home")
        found = user.succeed(TOWER, subfolder=folder)
        assert (found.source, found.name) == (f"{TOWER}/{folder}", "tower")
        assert found.revision == commit_sha("first")
        expected = ["config.json", "model.safetensors", "preprocessor_config.json"]
        assert sorted(hub.downloaded()) == expected
        assert user.succeed(TOWER, subfolder=folder, offline=True) == found
        assert user.succeed(TOWER, subfolder=folder, revision=found.revision) == found
        told = user.resolve(TOWER).message
        cold = user.fail(errors.HubUnreachableError, TOWER, subfolder="other", offline=True)
        assert f"vistower export {TOWER} --subfolder other`" in cold.message
    if "/" not in folder:
        assert f"in {folder}: name it with --subfolder" in told
        with pytest.raises(errors.CheckpointError, match=f"in {folder}: name it with --subfolder"):
            resolve_checkpoint(str(top))
    code, _, wrong = run(
        capsys, "export", top, "--subfolder", folder, "--output", tmp_path / "bundle"
    )
    assert code == 0, wrong
    assert Bundle.load(tmp_path / "bundle").layout.hidden_size == 64


@pytest.mark.parametrize("folder", ["../other", "/etc", "a/../../b", "..\\other"])
def test_a_subfolder_stays_inside(folder: str, tmp_path: Path) -> None:
    for model in (str(tmp_path), TOWER):
        with pytest.raises(errors.CheckpointNotFoundError, match="does not lie in"):
            resolve_checkpoint(model, subfolder=folder, offline=True)


def test_a_subfolder_that_is_not_there(clip_checkpoint: Path) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match="no subfolder 'vision'"):
        resolve_checkpoint(str(clip_checkpoint), subfolder="vision")


def test_the_bundle_of_a_hub_subfolder_is_found_by_its_name(
    clip_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VISTOWER_CACHE", str(tmp_path / "cache"))
    name = f"{TOWER}/image_encoder"
    with pytest.raises(errors.BundleNotFoundError, match=f"{TOWER} --subfolder image_encoder"):
        VisionEncoder.open(name)
    shutil.copytree(clip_checkpoint, tmp_path / "repository" / "image_encoder")
    with HubServer({TOWER: Repo.of_directory(tmp_path / "repository")}) as hub:
        user = User(hub.endpoint, tmp_path / "home")
        user.succeed(TOWER, subfolder="image_encoder", cache_dir=str(tmp_path / "hub"))
    options = ("--subfolder", "image_encoder", "--cache-dir", tmp_path / "hub", "--offline")
    code, _, wrong = run(capsys, "export", TOWER, *options)
    assert code == 0, wrong
    assert VisionEncoder.open(name, device="cpu").layout.hidden_size == 64


@pytest.mark.parametrize(
    ("name", "size"),
    [("CLIPImageProcessor", (320, 336)), ("DINOv3ViTImageProcessorFast", (320, 320))],
)
def test_a_centre_crop_with_another_resolution_is_refused_in_words(
    name: str, size: tuple[int, int], copy: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = copy("dinov3")
    options = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    (checkpoint / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": name, **options})
    )
    asked: dict[str, Any] = {"resolutions": [size]}
    with pytest.raises(errors.ProcessorConfigError, match=r"320x3\d+ .* cuts the middle 224x224"):
        export(checkpoint, tmp_path / "bundle", **asked)
    bundle = export(checkpoint, tmp_path / "bundle", resolutions=[(224, 224)])
    assert bundle.layout.image_size == (224, 224)


def test_a_vision_config_that_omits_its_defaults(tmp_path: Path) -> None:
    """What `to_diff_dict` writes of a composite: B/32's sizes are CLIP's defaults."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 9, "intermediate_size": 32}
    torch.manual_seed(3)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=text | ends, vision_config=small)
    model = transformers.CLIPModel(config).eval()
    checkpoint = tmp_path / "whole"
    model.save_pretrained(checkpoint)
    written = json.loads((checkpoint / "config.json").read_text())
    written["vision_config"] = small | {"model_type": "clip_vision_model"}
    (checkpoint / "config.json").write_text(json.dumps(written))
    (checkpoint / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessorFast"})
    )
    bundle = export(checkpoint, tmp_path / "bundle")
    assert (bundle.layout.patch_size, bundle.layout.hidden_size) == (32, 768)
    image = Image.open(SAMPLES[0])
    pixel_values = AutoImageProcessor.from_pretrained(checkpoint)(image, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.vision_model(**pixel_values).last_hidden_state[0].numpy()
    found = VisionEncoder.open(bundle.directory, device="cpu").encode(image)
    assert np.abs(found.cls[0] - tokens[0]).max() <= 1e-4 * np.linalg.norm(tokens[0])

    # The same without a manifest, as other exporters leave it.
    (bundle.directory / "vistower.json").unlink()
    for short in (written, written["vision_config"]):
        (bundle.directory / "config.json").write_text(json.dumps(short))
        assert Bundle.load(bundle.directory).layout == bundle.layout


@pytest.mark.parametrize("model_type", built_in())
def test_the_defaults_of_the_architectures_are_those_of_transformers(model_type: str) -> None:
    family = built_in()[model_type]
    config = getattr(transformers, family.config_class)()
    assert config.model_type == model_type
    assert family.config_defaults.items() <= config.to_dict().items()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_what_is_no_file_is_said_to_be_none(
    name: str, kind: str, copy: Callable[[str], Path]
) -> None:
    path = copy("clip") / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.parent / "nothing")
    with pytest.raises(errors.CheckpointError, match=rf"{name} is no file that can be read"):
        resolve_checkpoint(str(path.parent))
