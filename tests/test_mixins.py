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
from torch_mixins import TorchCLIP, TorchDINOv3
from vistower import EMBED_MODEL_RESOLUTION, CLIPMixin, DINOv3Mixin
from vistower.bundle import cache_path
from vistower.errors import (
    BundleCorruptError,
    BundleNotFoundError,
    BundleUnsupportedError,
    DeviceError,
    EmptyInputError,
    ImageDecodeError,
    ImageFormatError,
    MaskError,
    MissingModelPathError,
    OptionError,
    OutputTypeError,
)
from vistower.families.dinov3 import FAMILY as DINOV3
from vistower.mixins.results import FeatureArray
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle

TOLERANCE = 1e-5
RNG = np.random.default_rng(7)


class BasePipe:
    """A pipeline's root: takes what is left of the keywords."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.root_kwargs = kwargs


class Threshold:
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


@pytest.fixture(scope="session")
def torch_clip(clip_checkpoint: Path) -> TorchCLIP:
    return TorchCLIP(model_path=str(clip_checkpoint), device="cpu")


@pytest.fixture(scope="session")
def torch_dinov3(dinov3_checkpoint: Path) -> TorchDINOv3:
    return TorchDINOv3(model_path=str(dinov3_checkpoint), device="cpu")


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
    """The same shape and dtype, and each token within the tolerance of its norm."""
    assert tuple(ours.shape) == tuple(theirs.shape)
    assert ours.dtype == theirs.dtype
    difference = (ours.cpu() - theirs.cpu()).norm(dim=-1)
    assert bool((difference <= TOLERANCE * theirs.cpu().norm(dim=-1)).all())


# Construction


def test_it_stands_first_in_an_mro_and_passes_every_keyword_on(clip_bundle: Path) -> None:
    class ClipPipe(CLIPMixin, Threshold, BasePipe):
        pass

    keywords = {"model_path": str(clip_bundle), "device": "cpu", "threshold": 0.7, "other": 1}
    pipe = ClipPipe(**keywords)
    assert pipe.root_kwargs == keywords
    assert pipe.threshold == 0.7
    assert pipe.get_features(SAMPLES[0]).shape == (49, 64)


def test_it_stands_last_in_an_mro(dinov3_bundle: Path) -> None:
    class BodyPipe(Threshold, DINOv3Mixin):
        pass

    pipe = BodyPipe(model_path=str(dinov3_bundle), device="cpu", threshold=0.1)
    assert pipe.threshold == 0.1
    assert pipe.get_cls_feature(SAMPLES[0]).shape == (64,)


def test_super_init_comes_first() -> None:
    class Complains:
        def __init__(self, **kwargs: Any) -> None:
            raise RuntimeError("reached first")

    class Pipe(DINOv3Mixin, Complains):
        pass

    with pytest.raises(RuntimeError, match="reached first"):
        Pipe()


def test_a_next_class_without_keywords_gets_none(clip_bundle: Path) -> None:
    class Root:
        def __init__(self) -> None:
            self.reached = True

    class Pipe(CLIPMixin, Root):
        pass

    assert Pipe(model_path=str(clip_bundle), device="cpu").reached


@pytest.mark.parametrize("family", ["clip", "dinov3"])
def test_both_mixins_in_one_class_cannot_share_a_model(
    family: str, request: pytest.FixtureRequest
) -> None:
    class Both(CLIPMixin, DINOv3Mixin):
        pass

    bundle = request.getfixturevalue(f"{family}_bundle")
    refusing, other = ("DINOv3Mixin", "CLIPMixin") if family == "clip" else ("CLIPMixin", "DINOv3M")
    with pytest.raises(BundleUnsupportedError, match=f"{refusing} was given.*Use {other}"):
        Both(model_path=str(bundle), device="cpu")


@pytest.mark.parametrize(
    ("mixin", "family", "message"),
    [
        (CLIPMixin, "dinov3", "CLIPMixin was given .* of model type dinov3_vit.*Use DINOv3Mixin"),
        (DINOv3Mixin, "clip", "DINOv3Mixin was given .* of model type clip_vis.*Use CLIPMixin"),
    ],
)
def test_the_other_familys_bundle_is_refused_by_name(
    mixin: Any, family: str, message: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle = request.getfixturevalue(f"{family}_bundle")
    with pytest.raises(BundleUnsupportedError, match=message):
        mixin(model_path=str(bundle), device="cpu")
    # Nor one that vistower did not write.
    shutil.copytree(bundle, tmp_path / "plain", ignore=shutil.ignore_patterns("vistower.json"))
    with pytest.raises(BundleUnsupportedError, match=message):
        mixin(model_path=str(tmp_path / "plain"), device="cpu")


def test_clip_has_a_default_model(cache: Path, clip_bundle: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="vistower export openai/clip-vit-base-patch32"):
        CLIPMixin()
    shutil.copytree(clip_bundle, cache / "openai--clip-vit-base-patch32")
    assert CLIPMixin().img_input_size == 224


@pytest.mark.parametrize("keywords", [{}, {"model_path": None}])
def test_dinov3_has_none(keywords: dict[str, Any]) -> None:
    with pytest.raises(AttributeError, match="NoneType"):
        TorchDINOv3(device="cpu", **keywords)
    with pytest.raises(MissingModelPathError, match="model_path") as caught:
        DINOv3Mixin(device="cpu", **keywords)
    assert isinstance(caught.value, TypeError)


def test_none_is_not_clips_default(cache: Path, clip_bundle: Path) -> None:
    shutil.copytree(clip_bundle, cache / "openai--clip-vit-base-patch32")
    with pytest.raises(MissingModelPathError, match="CLIPMixin needs the keyword model_path"):
        CLIPMixin(model_path=None)


@pytest.mark.parametrize("mixin", [CLIPMixin, DINOv3Mixin])
@pytest.mark.parametrize(
    "model_path",
    [
        *("", " ", "\n", "a b", "openai/clip-vit-base-patch32 ", "a/b/c", "/nowhere", "./nowhere"),
        *("~/nowhere/at/all", "~no-such-user/bundle", "a\0b", "a" * 5000, "a/" + "b" * 254),
        *("?", "http://a/b", Path("nowhere"), Path("/nowhere")),
    ],
)
def test_a_model_path_of_nothing_is_a_bundle_not_found(
    mixin: Any, model_path: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, clip_bundle: Path
) -> None:
    # An empty path must not mean the working directory.
    monkeypatch.chdir(clip_bundle)
    with pytest.raises(BundleNotFoundError):
        mixin(model_path=model_path, device="cpu")


@pytest.mark.parametrize("model_path", [0, False, 3.5, b"clip", ["clip"], object()])
def test_a_model_path_that_is_no_path_is_refused(model_path: Any) -> None:
    with pytest.raises(OptionError, match="names no model"):
        CLIPMixin(model_path=model_path)


def test_a_tilde_is_the_home_directory(clip_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(clip_bundle.parent))
    assert CLIPMixin(model_path=f"~/{clip_bundle.name}/", device="cpu").patch_size == 32


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
    data = weights.read_bytes()
    weights.write_bytes(data)
    assert DINOv3Mixin(model_path=str(checkpoint)).patch_size == 16
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
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
    assert mixin.model.encoder.encode(SAMPLES[0]).cls.shape == (1, 64)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_the_device_is_kept_as_it_was_given(device: Any, clip_bundle: Path) -> None:
    mixin = CLIPMixin(model_path=str(clip_bundle), device=device)
    assert mixin.device is device
    assert torch.zeros(1).to(mixin.device).device == mixin.model.device


@pytest.mark.parametrize("keywords", [{}, {"device": None}, {"device": "auto"}])
def test_an_automatic_device_is_one_that_torch_knows(
    keywords: dict[str, Any], clip_bundle: Path
) -> None:
    mixin = CLIPMixin(model_path=str(clip_bundle), **keywords)
    assert torch.device(mixin.device) == mixin.model.device


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
    reference = TorchCLIP(model_path=str(clip_checkpoint))
    image = Image.open(path)
    assert_same(clip.get_features(image), reference.get_features(image))
    assert_same(clip.get_cls_feature(image), reference.get_cls_feature(image))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_dinov3_gives_what_torch_gives(
    path: Path, dinov3: DINOv3Mixin, dinov3_checkpoint: Path
) -> None:
    reference = TorchDINOv3(model_path=str(dinov3_checkpoint))
    image = Image.open(path)
    assert_same(dinov3.get_features(image), reference.get_features(image))
    assert_same(dinov3.get_cls_feature(image), reference.get_cls_feature(image))


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_clip_takes_every_mode(mode: str, clip: CLIPMixin, clip_checkpoint: Path) -> None:
    reference = TorchCLIP(model_path=str(clip_checkpoint))
    image = picture("L").convert("I;16") if mode == "I;16" else picture(mode)
    assert_same(clip.get_features(image), reference.get_features(image))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_dinov3_takes_what_its_processor_takes(
    mode: str, dinov3: DINOv3Mixin, dinov3_checkpoint: Path
) -> None:
    reference = TorchDINOv3(model_path=str(dinov3_checkpoint))
    image = picture(mode)
    assert_same(dinov3.get_features(image), reference.get_features(image))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "CMYK"])
def test_dinov3_refuses_what_its_processor_refuses(
    mode: str, dinov3: DINOv3Mixin, dinov3_checkpoint: Path
) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        TorchDINOv3(model_path=str(dinov3_checkpoint)).get_features(picture(mode))
    with pytest.raises(ImageFormatError, match=r"convert\('RGB'\)"):
        dinov3.get_features(picture(mode))


@pytest.mark.parametrize("size", [(1, 1), (900, 3), (3, 900), (1500, 1100)])
def test_odd_sizes_and_arrays(
    size: tuple[int, int], clip: CLIPMixin, clip_checkpoint: Path
) -> None:
    reference = TorchCLIP(model_path=str(clip_checkpoint))
    image = picture(size=size)
    for given in (image, np.array(image)):
        # An array 1 or 3 pixels high is taken for one with its channels first, as there.
        assert_same(clip.get_features(given), reference.get_features(given))


@pytest.mark.parametrize("registers", [0, 1, 5])
def test_registers_come_from_the_checkpoint(registers: int, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "c", DINOV3, num_register_tokens=registers)
    export_bundle(resolve_checkpoint(str(checkpoint)), tmp_path / "bundle")
    mixin = DINOv3Mixin(model_path=str(tmp_path / "bundle"))
    reference = TorchDINOv3(model_path=str(checkpoint))
    assert mixin.get_features(SAMPLES[0]).shape == (196, 64)
    assert_same(mixin.get_features(SAMPLES[1]), reference.get_features(Image.open(SAMPLES[1])))


def test_clip_features_are_raw(clip: CLIPMixin, clip_checkpoint: Path) -> None:
    reference = TorchCLIP(model_path=str(clip_checkpoint))
    inputs = reference.processor(images=Image.open(SAMPLES[0]), return_tensors="pt")
    with torch.no_grad():
        pooled = reference.model(**inputs).pooler_output[0]
    assert float((clip.get_cls_feature(SAMPLES[0]) - pooled).abs().max()) > 0.01


# Shapes


@pytest.mark.parametrize("family", ["clip", "dinov3"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_list_has_the_shape_and_values_it_has_with_torch(
    family: str, count: int, request: pytest.FixtureRequest
) -> None:
    ours, theirs = (request.getfixturevalue(name) for name in (family, f"torch_{family}"))
    images = [picture(size=(50 + 9 * index, 64)) for index in range(count)]
    assert_same(ours.get_features(images), theirs.get_features(images))
    assert_same(ours.get_cls_feature(images), theirs.get_cls_feature(images))
    mask = [index % 2 == 0 for index in range(count)]
    if count > 1:
        assert_same(ours.get_features(images, mask), theirs.get_features(images, mask))


def test_one_picture_has_no_batch_dimension(clip: CLIPMixin, dinov3: DINOv3Mixin) -> None:
    assert clip.get_features(SAMPLES[0]).shape == (49, 64)
    assert clip.get_cls_feature(SAMPLES[0]).shape == (64,)
    assert dinov3.get_features(SAMPLES[0]).shape == (196, 64)
    assert dinov3.get_cls_feature(SAMPLES[0]).shape == (64,)


@pytest.mark.parametrize("images", [[], (), np.zeros((0, 8, 8, 3), np.uint8)], ids=repr)
def test_an_empty_list_is_refused(images: Any, clip: CLIPMixin, torch_clip: TorchCLIP) -> None:
    with pytest.raises((IndexError, TypeError)):
        torch_clip.get_features(images)
    for method in (clip.get_features, clip.get_cls_feature):
        with pytest.raises(EmptyInputError):
            method(images)


def test_a_tower_of_one_patch_keeps_its_dimension(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(
        tmp_path / "c", DINOV3, patch_size=224, num_hidden_layers=1, hidden_size=16
    )
    export_bundle(resolve_checkpoint(str(checkpoint)), tmp_path / "bundle")
    mixin = DINOv3Mixin(model_path=str(tmp_path / "bundle"), device="cpu")
    reference = TorchDINOv3(model_path=str(checkpoint))
    for images in (SAMPLES[0], [SAMPLES[0], SAMPLES[1]]):
        opened = [Image.open(p) for p in images] if isinstance(images, list) else Image.open(images)
        assert_same(mixin.get_features(images), reference.get_features(opened))


# Masks

ODD = [index % 2 == 1 for index in range(49)]
MASKS: dict[str, Any] = {
    "boolean": np.array(ODD),
    "boolean tensor": torch.tensor(ODD),
    "boolean list": ODD,
    "boolean tuple": tuple(ODD),
    "all false": np.zeros(49, bool),
    "all false tensor": torch.zeros(49, dtype=torch.bool),
    "all true": np.ones(49, bool),
    "one": np.arange(49) == 7,
    "short": np.ones(48, bool),
    "long": torch.ones(50, dtype=torch.bool),
    "short list": [True],
    "square": np.ones((7, 7), bool),
    "square tensor": torch.ones(7, 7, dtype=torch.bool),
    "column": np.ones((49, 1), bool),
    "of three": [True, False, True],
    "of three pictures and their patches": np.array([ODD, ODD, ODD[::-1]]),
    "uint8": np.array(ODD, np.uint8),
    "uint8 tensor": torch.tensor(ODD, dtype=torch.uint8),
    "short uint8": np.ones(48, np.uint8),
    "indexes": np.array([3, 0, 48]),
    "int32 indexes": np.array([3, 0, 48], np.int32),
    "int8 indexes": np.array([1, 0, 1], np.int8),
    "uint16 indexes": np.array([1, 0, 1], np.uint16),
    "index tensor": torch.tensor([3, 0, 48]),
    "int32 tensor": torch.tensor([3, 0, 48], dtype=torch.int32),
    "int16 tensor": torch.tensor([3, 0, 48], dtype=torch.int16),
    "negative indexes": np.array([-1, -49, 5]),
    "index list": [4, -2, 4, 4],
    "index tuple": (4, -2),
    "index range": range(2, 9),
    "list of NumPy integers": [np.int64(3), np.int64(1)],
    "table of indexes": [[0, 1, 2], [3, 4, 5]],
    "too high": np.array([49]),
    "too low": [-50],
    "no indexes": [],
    "no indexes, array": np.array([], np.int64),
    "no indexes, floats": np.array([]),
    "float indexes": np.array([2.0, 1.9]),
    "float list": [2.0, 1.0],
    "float tensor": torch.tensor([1.0, 0.0]),
    "float": 1.0,
    "list of texts": ["a"],
    "one index": 5,
    "one negative index": -1,
    "one NumPy index": np.int64(5),
    "one index, array": np.array(5),
    "one index, tensor": torch.tensor(5),
    "one index too high": 49,
    "True": True,
    "False": False,
    "True, array": np.array(True),
    "ellipsis": ...,
    "slice": slice(3, 20),
    "slice from the end": slice(-4, None),
    "slice with a step": slice(1, 40, 5),
    "slice past the end": slice(40, 100),
    "slice backwards": slice(None, None, -1),
    "text": "mask",
    "bytes": b"mask",
    "set": {1, 2},
    "dictionary": {1: 2},
    "objects": np.array([0, 1], object),
    "list of None": [None],
    "ragged": [[0], [1, 2]],
}


def result_or_error(compute: Any, *arguments: Any) -> Any:
    try:
        return compute(*arguments)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        return error


@pytest.fixture(scope="module")
def mask_clip(clip_bundle: Path) -> CLIPMixin:
    return CLIPMixin(model_path=str(clip_bundle), device="cpu")


@pytest.fixture(scope="module")
def mask_images() -> list[Image.Image]:
    return [picture(size=(32, 32)) for _ in range(3)]


@pytest.fixture(scope="module")
def embeddings(mask_images: list[Image.Image], torch_clip: TorchCLIP) -> dict[int, torch.Tensor]:
    """By the number of pictures: what the original indexes with ``embeddings[mask, :]``."""
    return {count: torch_clip.get_features(mask_images[:count]) for count in (1, 3)}


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_indexes_as_torch_indexes(
    kind: str,
    count: int,
    mask_clip: CLIPMixin,
    mask_images: list[Image.Image],
    embeddings: dict[int, torch.Tensor],
) -> None:
    mask, images = MASKS[kind], mask_images[:count]
    expected = result_or_error(lambda: embeddings[count][mask, :])
    if isinstance(expected, Exception):
        with pytest.raises(MaskError) as caught:
            mask_clip.get_features(images, mask)
        assert isinstance(caught.value, IndexError)
        assert type(caught.value.__cause__) is type(expected)
        assert "boolean" in str(caught.value)
        return
    assert_same(mask_clip.get_features(images, mask), expected)


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "kind", [kind for kind, mask in MASKS.items() if not isinstance(mask, torch.Tensor)]
)
def test_without_torch_a_mask_indexes_the_same(
    kind: str,
    count: int,
    mask_clip: CLIPMixin,
    mask_images: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask, images = MASKS[kind], mask_images[:count]
    expected = result_or_error(mask_clip.get_features, images, mask)
    monkeypatch.delitem(sys.modules, "torch")
    actual = result_or_error(mask_clip.get_features, images, mask)
    assert type(actual) is (MaskError if isinstance(expected, Exception) else FeatureArray)
    if isinstance(actual, FeatureArray):
        assert actual.dtype == np.float32
        assert np.array_equal(actual, expected.numpy())


def test_a_mask_of_a_graph_or_with_gradients_is_taken(clip: CLIPMixin) -> None:
    scores = torch.linspace(0, 1, 49, requires_grad=True)
    mask = scores > 0.5
    assert clip.get_features(SAMPLES[0], mask).shape == (int(mask.sum()), 64)
    assert not clip.get_features(SAMPLES[0], mask).requires_grad


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
    run = clip.model.encoder.session.compute

    def counted(pixel_values: np.ndarray, wanted: Any) -> Any:
        calls.append(len(pixel_values))
        return run(pixel_values, wanted)

    monkeypatch.setattr(clip.model.encoder.session, "compute", counted)
    return calls


def test_both_features_of_a_picture_cost_one_forward(clip: CLIPMixin, forwards: list[int]) -> None:
    one, two = picture(), picture()
    want = clip.model.encoder.encode([one, two])
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
