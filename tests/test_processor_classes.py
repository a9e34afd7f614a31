"""Every class of image processors that is reproduced, against the one of transformers."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor

from processors import (
    EVERY,
    HAS_LANCZOS,
    MODES,
    OWN_PIL,
    computed_by,
    error_allowed,
    expected,
    in_mode,
    megapixel,
    random_image,
    reference,
    reproduced,
)
from vistower.errors import ImageFormatError, ProcessorConfigError
from vistower.preprocess.classes import CLASSES
from vistower.preprocess.processor import Preprocessor
from vistower_export.reference import load_processor, transparency
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

NUMBER = st.floats(0.05, 1)
SIDE = st.integers(1, 300)
NOT_REPRODUCED = (np.bool_, np.int32, np.uint16)
"""Types of modes 1, I and I;16, where 4.57's torchvision classes resize them unconverted."""

MOSTLY = st.sampled_from([True, True, True, False])


def is_exact(name: str) -> bool:
    return name != "DINOv3ViTImageProcessor"


def read_as_rows(backend: str, height: int) -> bool:
    """4.57's PIL classes take a picture one pixel high for one of one channel, and refuse it."""
    return OWN_PIL and backend == "pil" and height == 1


@pytest.mark.parametrize(("name", "backend"), EVERY)
def test_a_silent_configuration_is_the_class_itself(name: str, backend: str) -> None:
    processor = reference(name, backend)
    silent = Preprocessor.from_config(
        {"image_processor_type": name},
        backend=backend,
        transparency=transparency(processor),
        transformers=transformers.__version__,
    )
    for size in [(640, 480), (97, 301)]:
        image = random_image(size)
        want = expected(processor, image)
        difference = np.abs(silent(image) - want).max()
        assert difference <= error_allowed(want, exact=is_exact(name))


def test_a_class_is_known_by_each_of_its_names() -> None:
    for name, record in CLASSES.items():
        stem = name.removesuffix("ImageProcessor")
        for spelled in (name, f"{name}Fast", f"{stem}FeatureExtractor"):
            ours = Preprocessor.from_config({"image_processor_type": spelled})
            assert ours.backend == "torchvision"
        if "pil" in record.backends:
            assert Preprocessor.from_config({"image_processor_type": f"{name}Pil"}).backend == "pil"
        else:
            with pytest.raises(ProcessorConfigError, match="no backend 'pil'"):
                Preprocessor.from_config({"image_processor_type": f"{name}Pil"})


@pytest.mark.parametrize("name", ["Siglip2ImageProcessor", "BlipImageProcessor", None, 3])
def test_other_classes_are_refused_by_name(name: Any) -> None:
    with pytest.raises(ProcessorConfigError, match=f"image_processor_type.*{name}"):
        Preprocessor.from_config({"image_processor_type": name})


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    which=st.sampled_from(EVERY),
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    engine=st.sampled_from(["native", "numpy"]),
)
def test_any_size(which: tuple[str, str], width: int, height: int, engine: str) -> None:
    name, backend = which
    image = random_image(megapixel(width, height))
    assume(not read_as_rows(backend, image.height))
    processor = reference(name, backend)
    want = expected(processor, image)
    with computed_by(engine):
        difference = np.abs(reproduced(processor)(image) - want).max()
    assert difference <= error_allowed(want, exact=is_exact(name))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    which=st.sampled_from(EVERY),
    mode=st.sampled_from(MODES),
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    convert=st.sampled_from([None, None, True, False]),
)
def test_any_mode(
    which: tuple[str, str], mode: str, width: int, height: int, convert: bool | None
) -> None:
    name, backend = which
    image = in_mode(mode, megapixel(width, height))
    assume(not read_as_rows(backend, image.height))
    processor = reference(name, backend, **({} if convert is None else {"do_convert_rgb": convert}))
    try:
        want = expected(processor, image)
    except (RuntimeError, ValueError, TypeError):
        with pytest.raises(ImageFormatError):
            reproduced(processor)(image)
        return
    ours = reproduced(processor)
    odd = np.asarray(image).dtype in NOT_REPRODUCED and not ours.convert_rgb
    if odd and name != "DINOv3ViTImageProcessor":
        with pytest.raises(ImageFormatError, match="not reproduced"):
            ours(image)
        return
    difference = np.abs(ours(image) - want).max()
    assert difference <= error_allowed(want, exact=is_exact(name) and mode != "F")


ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "Bit": ("dinov3", {"image_processor_type": "BitImageProcessor"}),
    "ViT": ("dinov3", {"image_processor_type": "ViTImageProcessor"}),
    "DeiT": ("clip", {"image_processor_type": "DeiTImageProcessor"}),
    "Siglip": ("clip", {"image_processor_type": "SiglipImageProcessor"}),
    "CLIP": ("dinov3", {"image_processor_type": "CLIPImageProcessor"}),
    "ConvNext-384": ("dinov3", {"image_processor_type": "ConvNextImageProcessor"}),
    "ConvNext-224": (
        "clip",
        {"image_processor_type": "ConvNextImageProcessor", "size": 224, "crop_pct": 0.95},
    ),
    "EfficientNet": (
        "clip",
        {
            "image_processor_type": "EfficientNetImageProcessor",
            "size": 256,
            "crop_size": 224,
            "do_center_crop": True,
            "rescale_offset": True,
        },
    ),
}
"""Checkpoints of a family with another's processor: the family, and the file."""


@pytest.mark.parametrize("which", ASKED)
def test_a_checkpoint_with_another_processor_is_exported_with_that_one(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    family, config = ASKED[which]
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(request.getfixturevalue(f"{family}_checkpoint"), checkpoint)
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(config))
    bundle = export_bundle(resolve_checkpoint(str(checkpoint)), tmp_path / "bundle")
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    assert bundle.manifest is not None
    assert bundle.manifest.preprocessing.processor == type(processor).__name__
    for size in [(311, 203), (64, 512)]:
        image = random_image(size)
        want = expected(processor, image)
        assert np.abs(bundle.preprocessor(image) - want).max() <= error_allowed(want, exact=False)


def drawn_options(data: st.DataObject, name: str, backend: str) -> dict[str, Any]:
    """Options that the class takes, whether sensible or not."""
    draw = data.draw
    edge = draw(SIDE)
    whole = {"height": draw(SIDE), "width": draw(SIDE)}
    longer = {"shortest_edge": edge, "longest_edge": draw(st.integers(edge, 600))}
    sizes = [whole, {"shortest_edge": edge}, longer]
    own_pil = OWN_PIL and backend == "pil"
    if CLASSES[name].crop_pct:
        sizes = [{"shortest_edge": draw(st.sampled_from([edge, 383, 384, 400]))}]
    elif own_pil and "shortest_edge" not in CLASSES[name].pil_sizes:
        sizes = [whole]
    filters = [0, 1, 2, 3, 4, 5] if backend == "pil" else [0, 2, 3]
    if HAS_LANCZOS and backend != "pil":
        filters.append(1)
    options: dict[str, Any] = {
        "size": draw(st.sampled_from(sizes)),
        "resample": draw(st.sampled_from(filters)),
        "image_mean": draw(st.lists(NUMBER, min_size=3, max_size=3)),
        "image_std": draw(st.one_of(NUMBER, st.lists(NUMBER, min_size=3, max_size=3))),
        "rescale_factor": draw(st.sampled_from([1 / 255, 1 / 127.5, 0.01])),
        "do_normalize": draw(st.booleans()),
        "do_rescale": draw(MOSTLY),
        "do_resize": draw(MOSTLY),
        "do_convert_rgb": draw(st.booleans()),
    }
    if CLASSES[name].crop_pct:
        options["crop_pct"] = draw(st.sampled_from([0.5, 0.7, 0.875, 1.0, 1.3]))
    else:
        options["do_center_crop"] = draw(MOSTLY)
        options["crop_size"] = {"height": draw(SIDE), "width": draw(SIDE)}
    if CLASSES[name].offset_and_top:
        options["rescale_offset"] = draw(st.booleans())
        options["include_top"] = draw(st.booleans())
    return options


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data(), which=st.sampled_from(EVERY))
def test_any_options(data: st.DataObject, which: tuple[str, str]) -> None:
    name, backend = which
    options = drawn_options(data, name, backend)
    processor = reference(name, backend, **options)
    image = random_image(megapixel(data.draw(st.integers(1, 700)), data.draw(st.integers(1, 700))))
    assume(not read_as_rows(backend, image.height))
    try:
        ours = reproduced(processor)
    except ProcessorConfigError as error:
        # Levels, not floats: no tower takes them.
        assert "do_rescale=false" in str(error)  # noqa: PT017
        assert not options["do_rescale"]
        assert not options["do_normalize"] or not is_exact(name)
        return
    try:
        want = expected(processor, image)
    except (RuntimeError, ValueError, ZeroDivisionError, TypeError) as error:
        if "report a bug to PyTorch" in str(error):
            # torch's kernel for uint8 fails on some pictures one pixel wide.
            assume(False)
        with pytest.raises((ImageFormatError, ProcessorConfigError)):
            ours(image)
        return
    try:
        size = ours.output_size
    except ProcessorConfigError:
        # Of every picture another size, which no graph takes.
        assert not options.get("do_center_crop") or (OWN_PIL and backend == "pil")
        return
    with computed_by(data.draw(st.sampled_from(["native", "numpy"]))):
        have = ours(image)
    assert have.shape[1:] == size == want.shape[1:]
    # The PIL backend computes in float32 what torch fuses; both are the reference.
    assert np.abs(have - want).max() <= error_allowed(want, exact=False)


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("option", ["do_resize", "do_center_crop", "do_rescale", "do_normalize"])
def test_a_null_is_off(option: str, backend: str, tmp_path: Path) -> None:
    """transformers reads ``null`` as written, and not as silence."""
    config = {
        "image_processor_type": "CLIPImageProcessor",
        option: None,
        "size": {"height": 224, "width": 224},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    processor = load_processor(tmp_path, backend)
    picture = Image.fromarray(
        np.random.default_rng(3).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    )
    want = np.asarray(processor(images=picture, return_tensors="pt")["pixel_values"])[0]
    ours = Preprocessor.from_config(
        config, backend=backend, transformers=importlib.metadata.version("transformers")
    )
    assert np.abs(ours(picture) - want).max() <= 1e-4 * max(1, np.abs(want).max())
