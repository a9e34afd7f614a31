"""The contract of the mixins, clause by clause, against the torch mixins written in this folder."""

from __future__ import annotations

import logging
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_checkpoint
from torch_mixins import TorchCLIPMixin, TorchDINOv3Mixin
from vistower import EMBED_MODEL_RESOLUTION, CLIPMixin, DINOv3Mixin
from vistower.bundle import cache_path
from vistower.errors import (
    BundleCorruptError,
    BundleNotFoundError,
    DeviceError,
    ImageDecodeError,
    ImageFormatError,
    MaskError,
    MissingModelPathError,
    OptionError,
    OutputTypeError,
)
from vistower.output import FeatureArray
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle
from vistower_export.towers import DINOV3

TOLERANCE = 1e-4
RNG = np.random.default_rng(7)


class BasePipe:
    """A pipeline's root: takes what is left of the keywords."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.root_kwargs = kwargs


class MaskProcessor:
    """A consumer's own mixin: reads its key, passes everything on."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = kwargs.get("threshold", 0.5)


@pytest.fixture
def clip(clip_bundle: Path) -> CLIPMixin:
    return CLIPMixin(model_path=str(clip_bundle), device="cpu")


@pytest.fixture
def dinov3(dinov3_bundle: Path) -> DINOv3Mixin:
    return DINOv3Mixin(model_path=str(dinov3_bundle), device="cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VISTOWER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(mode: str = "RGB", size: tuple[int, int] = (90, 61)) -> Image.Image:
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(RNG.integers(0, 256, pixels.shape[:2], dtype=np.uint8)))
        return image
    return image.convert(mode)


def assert_same(ours: Any, theirs: torch.Tensor) -> None:
    assert tuple(ours.shape) == tuple(theirs.shape)
    assert float((ours.cpu() - theirs.cpu()).abs().max()) <= TOLERANCE


# Construction


def test_it_stands_first_in_an_mro_and_passes_every_keyword_on(clip_bundle: Path) -> None:
    class ClipPipe(CLIPMixin, MaskProcessor, BasePipe):
        pass

    keywords = {"model_path": str(clip_bundle), "device": "cpu", "threshold": 0.7, "other": 1}
    pipe = ClipPipe(**keywords)
    assert pipe.root_kwargs == keywords
    assert pipe.threshold == 0.7
    assert pipe.get_features(SAMPLES[0]).shape == (49, 64)


def test_it_stands_last_in_an_mro(dinov3_bundle: Path) -> None:
    class BodyPipe(MaskProcessor, DINOv3Mixin):
        pass

    pipe = BodyPipe(model_path=str(dinov3_bundle), device="cpu", threshold=0.1)
    assert pipe.threshold == 0.1
    assert pipe.get_cls_feature(SAMPLES[0]).shape == (1, 64)


def test_super_init_comes_first() -> None:
    class Complains:
        def __init__(self, **kwargs: Any) -> None:
            raise RuntimeError("reached first")

    class Pipe(DINOv3Mixin, Complains):
        pass

    with pytest.raises(RuntimeError, match="reached first"):
        Pipe()


def test_both_mixins_in_one_class(dinov3_bundle: Path) -> None:
    class Both(CLIPMixin, DINOv3Mixin):
        pass

    assert Both(model_path=str(dinov3_bundle), device="cpu").input_image_size == 224


def test_clip_has_a_default_model(cache: Path, clip_bundle: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="vistower export openai/clip-vit-base-patch32"):
        CLIPMixin()
    shutil.copytree(clip_bundle, cache / "openai--clip-vit-base-patch32")
    assert CLIPMixin().img_input_size == 224


def test_dinov3_has_none() -> None:
    with pytest.raises(MissingModelPathError, match="model_path") as caught:
        DINOv3Mixin(device="cpu")
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("form", [str, Path, "{}/".format])
def test_model_path_forms(form: Any, clip_bundle: Path) -> None:
    assert CLIPMixin(model_path=form(clip_bundle), device="cpu").patch_size == 32


def test_a_checkpoint_directory_finds_its_bundle_in_the_cache(
    cache: Path, dinov3_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "dinov3-vits16-pretrain-lvd1689m"
    shutil.copytree(dinov3_checkpoint, checkpoint)
    with pytest.raises(BundleNotFoundError, match=f"vistower export {checkpoint}"):
        DINOv3Mixin(model_path=str(checkpoint))
    export_bundle(resolve_checkpoint(str(checkpoint)), cache_path(str(checkpoint)))
    mixin = DINOv3Mixin(model_path=f"{checkpoint}/")
    assert (mixin.input_image_size, mixin.patch_size) == EMBED_MODEL_RESOLUTION[checkpoint.name]
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(BundleCorruptError, match="changed after"):
        DINOv3Mixin(model_path=str(checkpoint))


def test_a_hub_id_finds_its_bundle_in_the_cache(cache: Path, dinov3_bundle: Path) -> None:
    hub_id = "facebook/dinov3-vits16-pretrain-lvd1689m"
    with pytest.raises(BundleNotFoundError, match=f"vistower export {hub_id}"):
        DINOv3Mixin(model_path=hub_id)
    shutil.copytree(dinov3_bundle, cache / hub_id.replace("/", "--"))
    assert DINOv3Mixin(model_path=hub_id).patch_size == 16


def test_the_bundles_own_truth_wins(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "dinov3-vits16", DINOV3, patch_size=14)
    bundle = export_bundle(resolve_checkpoint(str(checkpoint)), tmp_path / "bundle")
    mixin = DINOv3Mixin(model_path=str(bundle.directory))
    assert (mixin.input_image_size, mixin.patch_size) == (224, 14)
    assert mixin.get_features(SAMPLES[0]).shape == (256, 64)


def test_attributes_and_one_log_line(clip_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vistower"):
        mixin = CLIPMixin(model_path=str(clip_bundle), device=torch.device("cpu"))
    assert [record.getMessage() for record in caplog.records] == [
        "random-weight tiny-clip, graph ort, on cpu (CPUExecutionProvider)"
    ]
    assert mixin.device == "cpu"
    assert mixin.processor(SAMPLES[0]).shape == (3, 224, 224)
    assert mixin.model.encode(SAMPLES[0]).cls.shape == (1, 64)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_cuda_is_had_or_refused(device: Any, clip_bundle: Path) -> None:
    if torch.cuda.is_available():
        assert CLIPMixin(model_path=str(clip_bundle), device=device).device.startswith("cuda")
        return
    with pytest.raises(DeviceError, match="was asked for, but"):
        CLIPMixin(model_path=str(clip_bundle), device=device)


# Methods


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_clip_gives_what_torch_gives(path: Path, clip: CLIPMixin, clip_checkpoint: Path) -> None:
    reference = TorchCLIPMixin(model_path=str(clip_checkpoint))
    image = Image.open(path)
    assert_same(clip.get_features(image), reference.get_features(image))
    assert_same(clip.get_cls_feature(image), reference.get_cls_feature(image))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_dinov3_gives_what_torch_gives(
    path: Path, dinov3: DINOv3Mixin, dinov3_checkpoint: Path
) -> None:
    reference = TorchDINOv3Mixin(model_path=str(dinov3_checkpoint))
    image = Image.open(path)
    assert_same(dinov3.get_features(image), reference.get_features(image))
    assert_same(dinov3.get_cls_feature(image), reference.get_cls_feature(image))


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_clip_takes_every_mode(mode: str, clip: CLIPMixin, clip_checkpoint: Path) -> None:
    reference = TorchCLIPMixin(model_path=str(clip_checkpoint))
    image = picture("L").convert("I;16") if mode == "I;16" else picture(mode)
    assert_same(clip.get_features(image), reference.get_features(image))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_dinov3_takes_what_its_processor_takes(
    mode: str, dinov3: DINOv3Mixin, dinov3_checkpoint: Path
) -> None:
    reference = TorchDINOv3Mixin(model_path=str(dinov3_checkpoint))
    image = picture(mode)
    assert_same(dinov3.get_features(image), reference.get_features(image))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "CMYK"])
def test_dinov3_refuses_what_its_processor_refuses(
    mode: str, dinov3: DINOv3Mixin, dinov3_checkpoint: Path
) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        TorchDINOv3Mixin(model_path=str(dinov3_checkpoint)).get_features(picture(mode))
    with pytest.raises(ImageFormatError, match=r"convert\('RGB'\)"):
        dinov3.get_features(picture(mode))


@pytest.mark.parametrize("size", [(1, 1), (900, 3), (3, 900), (1500, 1100)])
def test_odd_sizes_and_arrays(
    size: tuple[int, int], clip: CLIPMixin, clip_checkpoint: Path
) -> None:
    reference = TorchCLIPMixin(model_path=str(clip_checkpoint))
    image = picture(size=size)
    for given in (image, np.array(image)):
        # An array 1 or 3 pixels high is taken for one with its channels first, as there.
        assert_same(clip.get_features(given), reference.get_features(given))


@pytest.mark.parametrize("registers", [0, 1, 5])
def test_registers_come_from_the_checkpoint(registers: int, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "c", DINOV3, num_register_tokens=registers)
    export_bundle(resolve_checkpoint(str(checkpoint)), tmp_path / "bundle")
    mixin = DINOv3Mixin(model_path=str(tmp_path / "bundle"))
    reference = TorchDINOv3Mixin(model_path=str(checkpoint))
    assert mixin.get_features(SAMPLES[0]).shape == (196, 64)
    assert_same(mixin.get_features(SAMPLES[1]), reference.get_features(Image.open(SAMPLES[1])))


def test_clip_features_are_raw(clip: CLIPMixin, clip_checkpoint: Path) -> None:
    reference = TorchCLIPMixin(model_path=str(clip_checkpoint))
    pooled = reference.pooled(Image.open(SAMPLES[0]))
    assert float((clip.get_cls_feature(SAMPLES[0]) - pooled).abs().max()) > 0.01


# Masks


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_masks(kind: str, clip: CLIPMixin) -> None:
    mask = RNG.random(49) < 0.4
    whole = clip.get_features(SAMPLES[0])
    given = mask if kind == "numpy" else torch.from_numpy(mask)
    assert torch.equal(clip.get_features(SAMPLES[0], given), whole[torch.from_numpy(mask)])
    nothing = np.zeros(49, bool) if kind == "numpy" else torch.zeros(49, dtype=torch.bool)
    assert clip.get_features(SAMPLES[0], mask=nothing).shape == (0, 64)


@pytest.mark.parametrize(
    "mask",
    [np.ones(48, bool), torch.ones(50, dtype=torch.bool), np.ones((7, 7), bool), np.ones(49, int)],
    ids=["short", "long", "two-dimensional", "integers"],
)
def test_a_wrong_mask_is_an_index_error(mask: Any, clip: CLIPMixin) -> None:
    with pytest.raises(IndexError) as caught:
        clip.get_features(SAMPLES[0], mask)
    assert isinstance(caught.value, MaskError)
    assert "boolean" in str(caught.value)


# Results


def test_tensors_share_memory_with_the_forward(clip: CLIPMixin) -> None:
    features = clip.get_features(SAMPLES[0])
    assert type(features) is torch.Tensor
    assert features.dtype == torch.float32
    assert features._base is None
    features.numpy()[0, 0] = 42
    assert features[0, 0] == 42


def test_numpy_on_request(clip: CLIPMixin, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = clip.get_features(SAMPLES[0])
    monkeypatch.setenv("VISTOWER_OUTPUT", "numpy")
    array = clip.get_features(SAMPLES[0])
    assert type(array) is FeatureArray
    plain = array.cpu().numpy()
    assert type(plain) is np.ndarray
    assert np.array_equal(plain, tensor.numpy())
    monkeypatch.setenv("VISTOWER_OUTPUT", "tensorflow")
    with pytest.raises(OutputTypeError, match="auto, torch or numpy"):
        clip.get_features(SAMPLES[0])


def test_without_torch(clip_bundle: Path) -> None:
    program = f"""
import os, sys
sys.modules["torch"] = None
from vistower import CLIPMixin
del sys.modules["torch"]
mixin = CLIPMixin(model_path={str(clip_bundle)!r}, device="cpu")
features = mixin.get_features({str(SAMPLES[0])!r})
array = features.cpu().numpy()
assert array.shape == (49, 64) and type(array).__module__ == "numpy"
loaded = {{"torch", "transformers", "onnx"}} & set(sys.modules)
assert not loaded, loaded
os.environ["VISTOWER_OUTPUT"] = "torch"
try:
    mixin.get_features({str(SAMPLES[0])!r})
except Exception as error:
    print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "OutputTypeError"


# The two features of one picture


@pytest.fixture
def forwards(clip: CLIPMixin, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each forward pass of the fixture `clip`."""
    calls: list[int] = []
    run = clip.model.session.run

    def counted(pixel_values: np.ndarray) -> np.ndarray:
        calls.append(len(pixel_values))
        return run(pixel_values)

    monkeypatch.setattr(clip.model.session, "run", counted)
    return calls


def test_both_features_of_a_picture_cost_one_forward(clip: CLIPMixin, forwards: list[int]) -> None:
    one, two = picture(), picture()
    want = clip.model.encode([one, two])
    forwards.clear()
    for image, index in ((one, 0), (two, 1), (one, 0)):
        assert np.allclose(clip.get_cls_feature(image), want.cls[index], atol=1e-5)
        assert np.allclose(clip.get_features(image), want.patches[index], atol=1e-5)
    clip.get_features(np.asarray(one), np.ones(49, bool))
    assert len(forwards) == 2


def test_a_changed_picture_is_another_one(clip: CLIPMixin, forwards: list[int]) -> None:
    array = np.asarray(picture()).copy()
    image = Image.fromarray(array)
    before = clip.get_cls_feature(array)
    array[10:40] = 7
    image.paste((7, 7, 7), (0, 10, image.width, 40))
    after = clip.get_cls_feature(array)
    assert not torch.equal(before, after)
    assert torch.equal(clip.get_cls_feature(image), after)
    assert len(forwards) == 2


def test_a_result_changed_in_place_does_not_come_back(clip: CLIPMixin) -> None:
    image = picture()
    want = clip.get_features(image).clone()
    clip.get_features(image).mul_(0)
    clip.get_cls_feature(image).mul_(0)
    assert torch.equal(clip.get_features(image), want)


def test_the_cache_can_be_turned_off_and_is_bounded(
    clip: CLIPMixin, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture()
    monkeypatch.setenv("VISTOWER_FEATURE_CACHE", "0")
    for _ in range(3):
        clip.get_features(image)
    assert len(forwards) == 3
    monkeypatch.setenv("VISTOWER_FEATURE_CACHE", "2")
    for other in (image, picture(), picture(), image):
        clip.get_features(other)
    assert len(forwards) == 7
    monkeypatch.setenv("VISTOWER_FEATURE_CACHE", "many")
    with pytest.raises(OptionError, match="0 turns"):
        clip.get_features(image)


def test_a_mixin_is_shared_by_threads(clip: CLIPMixin) -> None:
    images = [picture() for _ in range(6)]
    want = [clip.get_cls_feature(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        have = list(pool.map(clip.get_cls_feature, images * 10))
    assert all(torch.equal(a, b) for a, b in zip(have, want * 10, strict=True))


def test_a_mixin_can_be_pickled(clip: CLIPMixin) -> None:
    want = clip.get_features(SAMPLES[0])
    assert torch.equal(pickle.loads(pickle.dumps(clip)).get_features(SAMPLES[0]), want)


def test_failures_reach_the_caller_with_their_cause(clip: CLIPMixin, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(SAMPLES[1].read_bytes()[:500])
    with pytest.raises(ImageDecodeError) as caught:
        clip.get_features(broken)
    assert caught.value.__cause__ is not None
    with pytest.raises(ImageFormatError, match="complex128"):
        clip.get_features(np.zeros((5, 5, 3), complex))
    with pytest.raises(BundleNotFoundError):
        CLIPMixin(model_path=str(tmp_path / "nowhere"))
