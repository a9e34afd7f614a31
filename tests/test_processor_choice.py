"""Which image processor a bundle agrees with: the one transformers itself loads for a checkpoint.

The expected values come from `AutoImageProcessor` (and `AutoProcessor`) of the transformers the
tests run under; both majors are supported and they choose differently.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor
from transformers.image_utils import load_image

from command_line import run
from hub_server import HubServer, Repo
from processors import EVERY, OWN_PIL, RELEASE, expected, reference, reproduced
from test_source import TOWER, User
from vistower.bundle import Bundle
from vistower.errors import (
    CheckpointError,
    OptionError,
    ParityError,
    ProcessorConfigError,
)
from vistower.preprocess.classes import CLASSES
from vistower.preprocess.processor import Preprocessor
from vistower_export import reference as hf
from vistower_export.pictures import SAMPLES, write_hard_pictures
from vistower_export.pixels import require_same_processor
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

# Pillow says so wherever such a picture becomes RGB.
pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")

OPEN_MEAN = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.27, 0.26, 0.28]}
SIDE = {"height": 224, "width": 224}
NESTED = {"image_processor_type": "CLIPImageProcessorFast", **OPEN_MEAN}
OLD = {"image_processor_type": "CLIPImageProcessorFast", "image_mean": [0.1, 0.2, 0.3]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_hard_pictures(tmp_path_factory.mktemp("hard"), (224, 224))


def with_files(checkpoint: Path, directory: Path, **files: Mapping[str, Any]) -> Path:
    """A checkpoint's model with other processor files (JSON by name)."""
    directory.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, directory)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def export(checkpoint: Path, output: Path, **options: Any) -> Bundle:
    return export_bundle(resolve_checkpoint(str(checkpoint)), output, **options)


def worst(processor: Any, bundle: Bundle, pictures: tuple[Path, ...]) -> float:
    """Largest difference of a bundle's pixels from a processor's, on photographs as files."""
    differences = []
    for path in (*SAMPLES, *pictures):
        expected = processor(images=load_image(str(path)), return_tensors="pt")["pixel_values"]
        differences.append(np.abs(expected[0].numpy() - bundle.preprocessor(path)).max())
    return float(max(differences))


def require_reference(checkpoint: Path, bundle: Bundle, pictures: tuple[Path, ...]) -> None:
    """The bundle is that of the processor transformers loads, and hands it on."""
    reference = AutoImageProcessor.from_pretrained(checkpoint)
    assert bundle.manifest is not None
    assert bundle.manifest.preprocessing.processor == type(reference).__name__
    assert worst(reference, bundle, pictures) <= 1e-4
    handed_on = AutoImageProcessor.from_pretrained(bundle.directory)
    assert type(handed_on) is type(reference)
    assert worst(handed_on, bundle, pictures) <= 1e-4


@pytest.mark.parametrize("family", ["clip", "dinov3"])
@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config": OLD},
        {"preprocessor_config": OLD, "processor_config": {"image_processor": NESTED}},
        {"preprocessor_config": OLD, "processor_config": {"processor_class": "CLIPProcessor"}},
        {"processor_config": {"image_processor": NESTED, "processor_class": "CLIPProcessor"}},
        {"preprocessor_config": {"image_processor": NESTED}},
        {"preprocessor_config": {"feature_extractor_type": "CLIPFeatureExtractor", **OPEN_MEAN}},
        {"preprocessor_config": {"image_processor_type": "DINOv3ViTImageProcessorFast"}},
        {"preprocessor_config": OPEN_MEAN},
        {"processor_config": {"image_processor_type": "CLIPImageProcessorFast", **OPEN_MEAN}},
        {"processor_config": {"processor_class": "CLIPProcessor"}},
        {},
    ],
    ids=lambda files: "+".join(files) if isinstance(files, dict) else files,
)
def test_the_files_are_read_as_transformers_reads_them(
    family: str,
    files: dict[str, Any],
    request: pytest.FixtureRequest,
    pictures: tuple[Path, ...],
    tmp_path: Path,
) -> None:
    source = request.getfixturevalue(f"{family}_checkpoint")
    checkpoint = with_files(source, tmp_path / "checkpoint", **files)
    try:
        AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError):
        with pytest.raises(CheckpointError, match=r"processor"):
            export(checkpoint, tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()
        return
    require_reference(checkpoint, export(checkpoint, tmp_path / "bundle"), pictures)


def sized(name: str) -> dict[str, Any]:
    """Options by which a class gives 224 x 224."""
    if name == "ConvNextImageProcessor":
        return {"size": {"shortest_edge": 224}}
    return {"size": SIDE, "crop_size": SIDE}


@pytest.mark.parametrize("family", ["clip", "dinov3"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_exports_with_the_processor_its_file_names(
    family: str,
    name: str,
    request: pytest.FixtureRequest,
    pictures: tuple[Path, ...],
    tmp_path: Path,
) -> None:
    if OWN_PIL and name == "DINOv3ViTImageProcessor":
        name = "DINOv3ViTImageProcessorFast"
    source = request.getfixturevalue(f"{family}_checkpoint")
    files = {"preprocessor_config": {"image_processor_type": name, **sized(name)}}
    checkpoint = with_files(source, tmp_path / "checkpoint", **files)
    require_reference(checkpoint, export(checkpoint, tmp_path / "bundle"), pictures)


OWN_CODE = """
from pathlib import Path
Path(__file__).with_name("executed").touch()
from transformers import CLIPImageProcessor
class OwnProcessor(CLIPImageProcessor):
    pass
"""


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("preprocessor_config", {"image_processor_type": "OwnProcessor"}),
        ("preprocessor_config", {"image_processor_type": "CLIPImageProcessor"}),
        ("preprocessor_config", {}),
        ("processor_config", {"image_processor_type": "OwnProcessor"}),
        ("config", {}),
    ],
)
def test_a_checkpoint_s_own_code_is_refused_by_name_and_not_run(
    file: str, content: dict[str, Any], clip_checkpoint: Path, tmp_path: Path
) -> None:
    section = content | {"auto_map": {"AutoImageProcessor": "own.OwnProcessor"}}
    files = {file: {"image_processor": section} if file == "processor_config" else section}
    if file == "config":
        files["config"] |= json.loads((clip_checkpoint / "config.json").read_text())
        files["preprocessor_config"] = OPEN_MEAN
    checkpoint = with_files(clip_checkpoint, tmp_path / "checkpoint", **files)
    (checkpoint / "own.py").write_text(OWN_CODE)
    with pytest.raises(ProcessorConfigError, match=r"own\.OwnProcessor"):
        export(checkpoint, tmp_path / "bundle")
    assert not list(tmp_path.rglob("executed"))


@pytest.mark.parametrize(
    "name",
    ["NoSuchImageProcessor", "AutoImageProcessor", "CLIPModel", "CLIPProcessor", "pipeline", 7, ""],
)
def test_a_name_that_is_no_image_processor_is_refused(
    name: Any, clip_checkpoint: Path, tmp_path: Path
) -> None:
    files = {"preprocessor_config": {"image_processor_type": name}}
    checkpoint = with_files(clip_checkpoint, tmp_path / "checkpoint", **files)
    with pytest.raises((CheckpointError, ProcessorConfigError), match="image processor"):
        export(checkpoint, tmp_path / "bundle")


def test_an_unknown_processor_of_transformers_is_refused_by_its_class(
    clip_checkpoint: Path, tmp_path: Path
) -> None:
    files = {"preprocessor_config": {"image_processor_type": "SegformerImageProcessor"}}
    checkpoint = with_files(clip_checkpoint, tmp_path / "checkpoint", **files)
    with pytest.raises(ProcessorConfigError, match="SegformerImageProcessor"):
        export(checkpoint, tmp_path / "bundle")


@pytest.mark.parametrize("family", ["clip", "dinov3"])
@pytest.mark.parametrize(
    "name", ["CLIPImageProcessor", "ConvNextImageProcessor", "DINOv3ViTImageProcessor"]
)
@pytest.mark.parametrize("ending", ["", "Fast", "Pil"])
@pytest.mark.parametrize("backend", [None, "torchvision", "pil"])
def test_the_backend_is_transformers_choice_or_the_one_asked_for(
    family: str,
    name: str,
    ending: str,
    backend: str | None,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    source = request.getfixturevalue(f"{family}_checkpoint")
    files = {"preprocessor_config": {"image_processor_type": name + ending}}
    checkpoint = with_files(source, tmp_path / "checkpoint", **files)
    asked: dict[str, Any] = {}
    if backend is not None:
        asked = {"backend": backend} if not OWN_PIL else {"use_fast": backend == "torchvision"}
    try:
        expected = AutoImageProcessor.from_pretrained(checkpoint, **asked)
    except ValueError:
        with pytest.raises(CheckpointError, match="--processor-backend"):
            hf.load_processor(checkpoint, backend)
        return
    if backend == "pil" and name.startswith("DINOv3"):
        # transformers falls back on torchvision, with a warning.
        with pytest.raises(ProcessorConfigError, match=f"{name}.* has no backend 'pil'"):
            hf.load_processor(checkpoint, backend)
        return
    processor = hf.load_processor(checkpoint, backend)
    assert type(processor) is type(expected)
    assert processor.to_dict() == expected.to_dict()
    found = hf.processor_backend(processor)
    assert found == (backend or found)
    # The one place where the majors differ.
    if backend is None and ending == "":
        assert found == ("torchvision" if not OWN_PIL else "pil")


def test_a_backend_that_is_none_is_refused(clip_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"'opencv'.*torchvision or pil"):
        export(clip_checkpoint, tmp_path / "bundle", backend="opencv")


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_a_bundle_hands_its_processor_on(
    backend: str, clip_checkpoint: Path, pictures: tuple[Path, ...], tmp_path: Path
) -> None:
    bundle = export(clip_checkpoint, tmp_path / "bundle", backend=backend)
    assert bundle.manifest is not None
    assert bundle.manifest.preprocessing.backend == backend
    asked = {"backend": backend} if not OWN_PIL else {"use_fast": backend == "torchvision"}
    reference = AutoImageProcessor.from_pretrained(clip_checkpoint, **asked)
    assert bundle.manifest.preprocessing.processor == type(reference).__name__
    assert worst(reference, bundle, pictures) <= 1e-4
    # 4.57 takes the right one unasked; 5 takes torchvision, whatever the file says.
    again = AutoImageProcessor.from_pretrained(
        bundle.directory, **(asked if not OWN_PIL and backend == "pil" else {})
    )
    assert type(again) is type(reference)
    assert worst(again, bundle, pictures) <= 1e-4
    # The names that both majors know.
    saved = json.loads((bundle.directory / "preprocessor_config.json").read_text())
    ending = "Fast" if backend == "torchvision" else ""
    assert saved["image_processor_type"] == f"CLIPImageProcessor{ending}"


VOCABULARY = ["a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]


def whole_clip(clip_checkpoint: Path, directory: Path, name: str) -> Path:
    """What `AutoProcessor` needs of a whole CLIP checkpoint: a tokenizer, and CLIP's config."""
    files = {
        "preprocessor_config": {"image_processor_type": name, **OPEN_MEAN},
        "config": transformers.CLIPConfig().to_dict(),
        "vocab": {word: index for index, word in enumerate(VOCABULARY)},
        "tokenizer_config": {"tokenizer_class": "CLIPTokenizer"},
    }
    checkpoint = with_files(clip_checkpoint, directory, **files)
    (checkpoint / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return checkpoint


@pytest.mark.parametrize(
    "name", ["CLIPImageProcessor", "CLIPImageProcessorFast", "BitImageProcessor"]
)
def test_when_auto_processor_agrees(name: str, clip_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = whole_clip(clip_checkpoint, tmp_path / "clip", name)
    found = AutoProcessor.from_pretrained(checkpoint).image_processor
    chosen = hf.load_processor(checkpoint)
    if not OWN_PIL or name == "CLIPImageProcessor":
        assert type(found) is type(chosen)
        assert found.to_dict() == chosen.to_dict()
        return
    # 4.57's takes CLIP's PIL processor, whatever the file says.
    assert type(found) is transformers.CLIPImageProcessor
    assert type(chosen).__name__ == name
    if name.startswith("CLIP"):
        assert type(hf.load_processor(checkpoint, "pil")) is type(found)


SHARED = {"resample": 3, "rescale_factor": 1 / 255, "do_convert_rgb": True, **OPEN_MEAN}
SIZES: list[dict[str, Any]] = [
    {"size": SIDE, "crop_size": SIDE},
    {"size": {"shortest_edge": 224}, "crop_size": SIDE, "do_center_crop": True},
    {"size": {"shortest_edge": 256}, "crop_size": SIDE, "do_center_crop": True},
    {"size": {"shortest_edge": 224}},
]


Processor = tuple[str, str, str, Any, Preprocessor, list[np.ndarray | None]]


@pytest.fixture(scope="module")
def every_processor(pictures: tuple[Path, ...]) -> list[Processor]:
    """Every class and backend with the same filter, mean and deviation, at 224 x 224:
    class, backend, size, transformers' and ours, and what the first makes of pictures that the
    gate does not have."""
    unseen = [
        Image.effect_noise((311, 203), 80).convert("RGB"),
        Image.effect_noise((130, 250), 80),
        Image.open(pictures[0]).resize((90, 90)).convert("RGBA"),
    ]
    unseen[2].putalpha(Image.linear_gradient("L").resize((90, 90)))
    every = []
    for name, backend in EVERY:
        for size in SIZES:
            with suppress(ProcessorConfigError, ValueError):
                theirs = reference(name, backend, **SHARED, **size)
                ours = reproduced(theirs)
                if ours.output_size == (224, 224):
                    every.append((name, backend, str(size), theirs, ours, seen(theirs, unseen)))
    return every


@pytest.mark.parametrize("known", EVERY, ids="-".join)
def test_the_gate_refuses_every_other_processor(
    known: tuple[str, str], every_processor: list[Processor], pictures: tuple[Path, ...]
) -> None:
    """Unless transformers itself makes the same of both: some classes differ in name alone."""
    told_apart = 0
    for name, backend, size, theirs, ours, made in every_processor:
        if (name, backend) != known:
            continue
        assert require_same_processor(theirs, ours, pictures) <= 1e-4
        for _, _, other_size, _, wrong, made_by_other in every_processor:
            comparable = size == other_size or name == "ConvNextImageProcessor"
            if comparable and not same(made, made_by_other):
                told_apart += 1
                with pytest.raises(ParityError):
                    require_same_processor(theirs, wrong, pictures)
    assert told_apart >= 3


def seen(processor: Any, images: list[Image.Image]) -> list[np.ndarray | None]:
    """What a processor makes of images; None of those it does not take."""
    made: list[np.ndarray | None] = []
    for image in images:
        try:
            made.append(expected(processor, image))
        except (RuntimeError, ValueError):
            made.append(None)
    return made


def same(one: list[np.ndarray | None], other: list[np.ndarray | None]) -> bool:
    return all(
        (a is None and b is None)
        or (a is not None and b is not None and a.shape == b.shape and np.abs(a - b).max() <= 1e-4)
        for a, b in zip(one, other, strict=True)
    )


def changed(processor: Any, **changes: Any) -> Preprocessor:
    return Preprocessor.from_config(
        hf.processor_config(processor) | changes,
        backend=hf.processor_backend(processor),
        transparency=hf.transparency(processor),
        transformers=transformers.__version__,
    )


@pytest.mark.parametrize("known", EVERY, ids="-".join)
def test_the_gate_refuses_every_other_option(
    known: tuple[str, str], pictures: tuple[Path, ...]
) -> None:
    processor = reference(*known, **SHARED, **sized(known[0]))
    right = reproduced(processor)
    changes: list[dict[str, Any]] = [
        {"resample": 1},
        {"resample": 2},
        {"image_mean": [0.48, 0.45, 0.401]},
        {"image_std": [0.27, 0.26, 0.281]},
        {"rescale_factor": 1 / 256},
        {"rescale_offset": True},
        {"include_top": False},
        {"do_normalize": False},
        {"do_convert_rgb": False},
        {"crop_pct": 0.8},
        {"size": {"shortest_edge": 225}},
        {"size": {"height": 225, "width": 224}},
        {"do_center_crop": True, "size": {"shortest_edge": 224}},
        {"do_center_crop": True, "size": {"height": 226, "width": 226}},
    ]
    told_apart = 0
    for change in changes:
        with suppress(ProcessorConfigError):
            wrong = changed(processor, **change)
            # Where a class has no such option, nothing changes.
            if replace(wrong, processor=right.processor) == right or not has_size(wrong):
                continue
            told_apart += 1
            with pytest.raises(ParityError):
                require_same_processor(processor, wrong, pictures)
    assert told_apart >= 6


def has_size(preprocessor: Preprocessor) -> bool:
    try:
        return bool(preprocessor.output_size)
    except ProcessorConfigError:
        return False


def test_the_gate_knows_what_becomes_of_alpha(pictures: tuple[Path, ...]) -> None:
    processor = reference("CLIPImageProcessor")
    right = hf.transparency(processor)
    assert right == ("white" if RELEASE.converts_arrays else "dropped")
    wrong = replace(reproduced(processor), transparency="dropped" if right == "white" else "white")
    with pytest.raises(ParityError, match="as a PIL image of mode"):
        require_same_processor(processor, wrong, pictures)


def test_the_command_line_names_class_backend_and_file(
    clip_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"preprocessor_config": OLD, "processor_config": {"image_processor": NESTED}}
    checkpoint = with_files(clip_checkpoint, tmp_path / "checkpoint", **files)
    code, text, errors = run(capsys, "export", checkpoint, "--output", tmp_path / "bundle")
    assert code == 0, errors
    name = "CLIPImageProcessor" if not OWN_PIL else "CLIPImageProcessorFast"
    file = "processor_config.json" if not OWN_PIL else "preprocessor_config.json"
    assert f"the processor is {name} (torchvision), from {file}" in errors
    assert f"against {name} (torchvision)" in text
    command = ["export", checkpoint, "--output", tmp_path / "other", "--processor-backend"]
    code, _, errors = run(capsys, *command, "fast")
    assert code == 2
    assert "Processor backend 'fast' is not known" in errors
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("old", [False, True])
def test_a_hub_checkpoint_is_read_as_the_local_one(
    old: bool, clip_checkpoint: Path, tmp_path: Path, pictures: tuple[Path, ...]
) -> None:
    files = {"preprocessor_config": OLD} if old else {}
    local = with_files(
        clip_checkpoint, tmp_path / "local", processor_config={"image_processor": NESTED}, **files
    )
    with HubServer({TOWER: Repo.of_directory(local)}) as hub:
        user = User(hub.endpoint, tmp_path / "home")
        checkpoint = user.succeed(TOWER)
        assert user.succeed(TOWER, offline=True) == checkpoint
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    require_reference(local, bundle, pictures)
