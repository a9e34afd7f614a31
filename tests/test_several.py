"""One picture or several: whatever holds pictures gives the same in encode, streams and mixins."""

from __future__ import annotations

import asyncio
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections import UserDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from vistower import CLIPMixin, DynamicBatcher, VisionEncoder
from vistower.errors import EmptyInputError, ImageDecodeError, ImageFormatError, OptionError

SIZES = [(50, 40), (40, 50), (64, 64)]


@pytest.fixture(scope="module")
def encoder(clip_bundle: Path) -> VisionEncoder:
    return VisionEncoder.open(clip_bundle, device="cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """PNGs of noise, each another one."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(3)
    names = []
    for number, (width, height) in enumerate(SIZES):
        levels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        names.append(str(folder / f"{number} é.png"))
        Image.fromarray(levels).save(names[-1])
    return names


def opened(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def contents(paths: list[str]) -> list[bytes]:
    return [Path(path).read_bytes() for path in paths]


class OnlyItems:
    """A map-style data set: neither iterable nor, beyond its length, an error."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index % len(self.items)]


class OnlyItemsToAnEnd:
    """One without a length, which Python iterates over until an IndexError."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def webp(path: str) -> bytes:
    """A picture whose last byte is zero, which NumPy's fixed-width bytes lose."""
    for quality in range(100):
        file = io.BytesIO()
        opened(path).save(file, "WEBP", lossless=True, quality=quality, method=0)
        if file.getvalue().endswith(b"\0"):
            break
    return file.getvalue()


def objects(items: list[Any]) -> np.ndarray:
    array = np.empty(len(items), object)
    array[:] = items
    return array


def pandas_series(items: list[Any], **options: Any) -> Any:
    return pytest.importorskip("pandas").Series(items, **options)


def arrow(items: list[Any], kind: str) -> Any:
    pa = pytest.importorskip("pyarrow")
    return pa.array(items, getattr(pa, kind)())


HOLDERS: dict[str, Callable[[list[str]], Any]] = {
    "tuple": tuple,
    "deque": deque,
    "generator": lambda paths: (path for path in paths),
    "map": lambda paths: map(Path, paths),
    "values of a dict": lambda paths: dict(enumerate(paths)).values(),
    "keys of a dict": lambda paths: dict.fromkeys(paths).keys(),
    "indexed": OnlyItems,
    "indexed to an end": OnlyItemsToAnEnd,
    "array of strings": np.array,
    "array of objects": lambda paths: objects([Path(path) for path in paths]),
    "array of bytes": lambda paths: np.array(contents(paths)),
    "array of bytes, objects": lambda paths: objects(contents(paths)),
    "array of PIL images": lambda paths: objects([opened(path) for path in paths]),
    "array of arrays": lambda paths: objects([np.asarray(opened(path)) for path in paths]),
    "mixed array": lambda paths: objects([paths[0], Path(paths[1]), opened(paths[2])]),
    "column of an array": lambda paths: np.array(paths)[:, None],
    "row of an array": lambda paths: np.array([paths]),
    "array with steps": lambda paths: np.array(paths[::-1])[::-1],
    "chararray": np.char.array,
    "scalars": lambda paths: list(np.array(paths)),
    "arrays without axes": lambda paths: [np.array(path) for path in paths],
    "bytes without axes": lambda paths: [np.array(data) for data in contents(paths)],
    "Series": pandas_series,
    "Series of paths": lambda paths: pandas_series([Path(path) for path in paths]),
    "Series of bytes": lambda paths: pandas_series(contents(paths)),
    "Series of PIL images": lambda paths: pandas_series([opened(path) for path in paths]),
    "Series of arrays": lambda paths: pandas_series([np.asarray(opened(p)) for p in paths]),
    "Series with odd labels": lambda paths: pandas_series(paths, index=["read", "columns", "ndim"]),
    "Series of Arrow strings": lambda paths: pandas_series(arrow(paths, "string")),
    "categories": lambda paths: pandas_series(paths, dtype="category"),
    "Index": lambda paths: pytest.importorskip("pandas").Index(paths),
    "column of a DataFrame": lambda paths: pytest.importorskip("pandas").DataFrame({"path": paths})[
        "path"
    ],
    "numpy of a DataFrame": lambda paths: (
        pytest.importorskip("pandas").DataFrame({"path": paths})[["path"]].to_numpy()
    ),
    "Arrow strings": lambda paths: arrow(paths, "string"),
    "Arrow large strings": lambda paths: arrow(paths, "large_string"),
    "Arrow string views": lambda paths: arrow(paths, "string_view"),
    "Arrow bytes": lambda paths: arrow(contents(paths), "binary"),
    "Arrow large bytes": lambda paths: arrow(contents(paths), "large_binary"),
    "Arrow dictionary": lambda paths: arrow(paths, "string").dictionary_encode(),
    "Arrow chunks": lambda paths: pytest.importorskip("pyarrow").chunked_array(
        [paths[:1], paths[1:]]
    ),
    "Arrow scalars": lambda paths: list(arrow(paths, "string")),
    "column of a table": lambda paths: pytest.importorskip("pyarrow").table({"a": paths})["a"],
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_whatever_holds_pictures_gives_them_in_order(
    kind: str, encoder: VisionEncoder, paths: list[str]
) -> None:
    want = encoder.preprocess([opened(path) for path in paths])
    tokens = encoder.forward(want)[:, 0]
    hold = HOLDERS[kind]
    assert np.array_equal(encoder.preprocess(hold(paths)), want)
    for batch_size in (2, 32):
        have = encoder.encode(hold(paths), batch_size=batch_size).cls
        assert np.abs(have - tokens).max() <= 1e-4
        streamed = list(encoder.encode_stream(hold(paths), batch_size=batch_size))
        assert np.abs(np.stack([result.cls for result in streamed]) - tokens).max() <= 1e-4

    async def alone() -> list[Any]:
        return [result.cls async for result in encoder.aencode_stream(hold(paths))]

    assert np.abs(np.stack(asyncio.run(alone())) - tokens).max() <= 1e-4


@pytest.mark.parametrize("kind", HOLDERS)
def test_a_mixin_takes_them_too(kind: str, clip_bundle: Path, paths: list[str]) -> None:
    mixin = CLIPMixin(model_path=clip_bundle, device="cpu")
    want = mixin.get_features([opened(path) for path in paths])
    assert np.array_equal(mixin.get_features(HOLDERS[kind](paths)), want)
    processed = mixin.processor(images=HOLDERS[kind](paths), return_tensors="np")
    assert len(processed["pixel_values"]) == 3


@pytest.mark.parametrize(
    "make",
    [
        np.str_,
        lambda path: np.bytes_(Path(path).read_bytes()),
        np.array,
        lambda path: np.array(Path(path), object),
        lambda path: np.array(Path(path).read_bytes()),
        lambda path: arrow([path], "string")[0],
        lambda path: arrow([Path(path).read_bytes()], "binary")[0],
    ],
)
def test_one_scalar_is_one_picture(make: Any, encoder: VisionEncoder, paths: list[str]) -> None:
    want = encoder.preprocess(paths[0])
    assert np.array_equal(encoder.preprocess(make(paths[0])), want)
    with DynamicBatcher(encoder) as batcher:
        for answer in (batcher.encode(make(paths[0])), batcher.submit(make(paths[0])).result()):
            assert np.abs(answer.cls - encoder.forward(want)[:, 0]).max() <= 1e-4
    with pytest.raises(ImageFormatError, match="iterable of pictures"):
        encoder.encode_stream(make(paths[0]))


def test_zero_bytes_at_the_end_of_a_picture_are_kept(
    encoder: VisionEncoder, paths: list[str]
) -> None:
    data = [webp(path) for path in paths]
    want = encoder.preprocess(data)
    assert any(one.endswith(b"\0") for one in data)
    assert np.array_equal(encoder.preprocess(np.array(data)), want)
    for array, one in zip(data, want, strict=True):
        assert np.array_equal(encoder.preprocess(np.array(array))[0], one)


def test_a_missing_value_is_its_own_error(encoder: VisionEncoder, paths: list[str]) -> None:
    pd = pytest.importorskip("pandas")
    given = [paths[0], None, paths[1]]
    invalid = pytest.importorskip("pyarrow").array([b"a", b"\xff", b"c"]).view("string")
    for holder in (
        np.array(given, object),
        pd.Series(given),
        pd.Series(given, dtype="string"),
        pd.Series([paths[0], float("nan"), paths[1]], dtype=object),
        arrow(given, "string"),
    ):
        with pytest.raises(ImageFormatError, match="is no picture"):
            encoder.encode(holder)
        results = list(encoder.encode_stream(holder, on_error="record"))
        assert [result.error is None for result in results] == [True, False, True]
        assert isinstance(results[1].error, ImageFormatError)
    results = list(encoder.encode_stream(invalid, on_error="record"))
    assert isinstance(results[1].error, ImageDecodeError)
    assert isinstance(results[1].error.__cause__, UnicodeDecodeError)


# What is refused


class Table:
    """What data frames and Arrow tables have in common."""

    columns = ("path", "label")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


def archive(paths: list[str]) -> Any:
    file = io.BytesIO()
    np.savez(file, one=np.asarray(opened(paths[0])))
    file.seek(0)
    loaded = np.load(file)
    # Closes the file.
    return UserDict(loaded) if hasattr(loaded, "read") else loaded


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (dict.fromkeys, r"dict is no picture, and its keys \('.*0 é"),
        (lambda paths: {"image": paths}, r"keys \('image'\) .*pass its values"),
        (lambda paths: UserDict({"a": 1}), "UserDict is no picture, and its keys"),
        (archive, "keys"),
        (set, "set is no picture.*no order"),
        (frozenset, "frozenset is no picture"),
        (lambda paths: Table(), "Table is a table.*'path', 'label'"),
        (lambda paths: pytest.importorskip("pandas").DataFrame({"p": paths}), "has 'p'"),
        (lambda paths: pytest.importorskip("pyarrow").table({"p": paths}), "has 'p'"),
        (lambda paths: pytest.importorskip("pyarrow").record_batch({"p": paths}), "has 'p'"),
    ],
)
def test_what_iterates_over_something_else_is_refused_by_name(
    make: Any, says: str, encoder: VisionEncoder, clip_bundle: Path, paths: list[str]
) -> None:
    mixin = CLIPMixin(model_path=clip_bundle, device="cpu")
    for use in (
        encoder.encode,
        encoder.preprocess,
        encoder.encode_stream,
        encoder.aencode_stream,
        mixin.get_features,
        mixin.get_cls_feature,
        lambda images: mixin.processor(images=images),
        # In a list too, and of a batcher.
        lambda images: encoder.encode([images]),
        lambda images: list(encoder.encode_stream([images])),
        encoder.processor,
    ):
        with pytest.raises(ImageFormatError, match=says):
            use(make(paths))
    with DynamicBatcher(encoder) as batcher:
        for answer in (batcher.encode, lambda image: batcher.submit(image).result()):
            with pytest.raises(ImageFormatError, match=says):
                answer(make(paths))
    recorded = list(encoder.encode_stream([paths[0], make(paths)], on_error="record"))
    assert [result.error is None for result in recorded] == [True, False]


@pytest.mark.parametrize(
    "make", [np.array, pandas_series, lambda paths: arrow(paths, "string"), tuple, OnlyItems]
)
def test_empty_holders_are_refused(make: Any, encoder: VisionEncoder) -> None:
    for use in (encoder.encode, encoder.preprocess):
        for empty in (make([]), np.empty(0, object)):
            # An array of no numbers is no picture either.
            with pytest.raises((EmptyInputError, ImageFormatError)):
                use(empty)
    assert list(encoder.encode_stream(np.empty(0, object))) == []
    with pytest.raises(EmptyInputError):
        encoder.encode(iter(()))


def test_an_asynchronous_source_is_for_aencode_stream(encoder: VisionEncoder) -> None:
    async def source() -> Any:
        yield 1

    with pytest.raises(ImageFormatError, match="aencode_stream"):
        encoder.encode_stream(source())
    with pytest.raises(ImageFormatError, match="async_generator is no picture"):
        encoder.encode(source())


@pytest.mark.parametrize("size", [0, -1, 2.5, "8", None, True, np.float32(4)])
def test_a_batch_size_is_a_whole_number(size: Any, encoder: VisionEncoder) -> None:
    with pytest.raises(OptionError, match="batch_size="):
        encoder.encode([], batch_size=size)


def test_a_batch_size_of_any_integer_type(encoder: VisionEncoder, paths: list[str]) -> None:
    assert len(encoder.encode(paths, batch_size=np.int8(2))) == 3


# Frames


def animation(kind: str) -> Image.Image:
    rng = np.random.default_rng(5)
    frames = [
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).quantize(64)
        for _ in range(3)
    ]
    frames = frames if kind == "GIF" else [frame.convert("RGB") for frame in frames]
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    return Image.open(io.BytesIO(file.getvalue()))


def seeking(image: Image.Image) -> Iterator[Image.Image]:
    for frame in range(3):
        image.seek(frame)
        yield image


FRAMES: dict[str, Callable[[Image.Image], Any]] = {
    "iterator": ImageSequence.Iterator,
    "generator": lambda image: (frame for frame in ImageSequence.Iterator(image)),
    "seeking": seeking,
    "copies": ImageSequence.all_frames,
}


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("way", FRAMES)
def test_every_frame_of_an_animation_is_its_own_picture(
    kind: str, way: str, encoder: VisionEncoder
) -> None:
    image = animation(kind)
    expected = []
    for index in range(3):
        image.seek(index)
        expected.append(image.copy())
    want = encoder.preprocess(expected)
    assert all(np.abs(want[index] - want[index + 1]).max() > 0.1 for index in range(2))
    tokens = encoder.forward(want)[:, 0]
    hold = FRAMES[way]
    assert np.array_equal(encoder.preprocess(hold(animation(kind))), want)
    have = encoder.encode(hold(animation(kind)), batch_size=2).cls
    assert np.abs(have - tokens).max() <= 1e-4
    streamed = list(encoder.encode_stream(hold(animation(kind)), batch_size=2, workers=3))
    assert np.abs(np.stack([result.cls for result in streamed]) - tokens).max() <= 1e-4
    with DynamicBatcher(encoder) as batcher:
        futures = [batcher.submit(frame) for frame in hold(animation(kind))]
        merged = np.concatenate([future.result().cls for future in futures])
    assert np.abs(merged - tokens).max() <= 1e-4


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF"])
def test_a_list_of_one_animation_is_refused(
    kind: str, encoder: VisionEncoder, clip_bundle: Path
) -> None:
    mixin = CLIPMixin(model_path=clip_bundle, device="cpu")
    frames = list(ImageSequence.Iterator(animation(kind)))
    for use in (encoder.encode, encoder.preprocess, mixin.get_features, mixin.get_cls_feature):
        for images in (frames, tuple(frames), iter(frames), objects(frames)):
            with pytest.raises(ImageFormatError, match="twice in a row, at frame 2"):
                use(images)
    recorded = list(encoder.encode_stream(frames, on_error="record"))
    assert [result.error is None for result in recorded] == [True, False, False]
    # Its copies are pictures, and so is an image of one frame, as often as it comes.
    assert len(encoder.encode([frames[0].copy() for _ in range(3)])) == 3
    still = Image.new("P", (9, 9))
    file = io.BytesIO()
    still.save(file, "GIF")
    assert len(encoder.encode([Image.open(file)] * 3)) == 3


def test_an_array_that_its_source_fills_again_is_taken_before(encoder: VisionEncoder) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)

    def camera() -> Iterator[np.ndarray]:
        buffer = np.empty(levels.shape[1:], np.uint8)
        for frame in levels:
            buffer[:] = frame
            yield buffer

    want = encoder.preprocess(levels)
    assert np.array_equal(encoder.preprocess(camera()), want)
    have = encoder.encode(camera(), batch_size=2).cls
    assert np.abs(have - encoder.forward(want)[:, 0]).max() <= 1e-4


def test_a_source_is_not_kept_in_memory(encoder: VisionEncoder) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Picture(np.ndarray):
        def __hash__(self) -> int:
            return id(self)

    def source() -> Iterator[np.ndarray]:
        nonlocal most
        for _ in range(9):
            picture = np.zeros((30, 30, 3), np.uint8).view(Picture)
            alive.add(picture)
            yield picture
            del picture
            gc.collect()
            most = max(most, len(alive))

    assert len(encoder.encode(source(), batch_size=2)) == 9
    assert most <= 1


def test_neither_library_is_imported() -> None:
    code = (
        "import sys, vistower, vistower.encoder, vistower.cli\n"
        "print({'pandas', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_a_source_s_own_error_reaches_the_caller(encoder: VisionEncoder, paths: list[str]) -> None:
    def source() -> Iterator[str]:
        yield paths[0]
        raise pickle.UnpicklingError("the source broke")

    for use in (encoder.encode, encoder.preprocess, lambda s: list(encoder.encode_stream(s))):
        with pytest.raises(pickle.UnpicklingError, match="the source broke"):
            use(source())
