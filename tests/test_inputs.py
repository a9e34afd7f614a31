"""Pictures from anywhere: odd paths, file objects, data URIs, and the warnings they give."""

from __future__ import annotations

import base64
import errno
import io
import mmap
import os
import tarfile
import threading
import urllib.parse
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_utils import load_image

from vistower import VisionEncoder
from vistower.errors import ImageDecodeError
from vistower.preprocess.encoded import open_image
from vistower_export.pictures import SAMPLES

DATA = SAMPLES[0].read_bytes()


@pytest.fixture(scope="module")
def encoder(dinov3_bundle: Path) -> VisionEncoder:
    return VisionEncoder.open(dinov3_bundle, device="cpu")


def pixels(source: Any) -> np.ndarray:
    return np.asarray(open_image(source))


def same(source: Any) -> bool:
    return np.array_equal(pixels(source), np.asarray(load_image(str(SAMPLES[0]))))


def refused_alone(encoder: VisionEncoder, source: Any, says: str) -> ImageDecodeError:
    """The error of one picture that cannot be had, which its neighbours in a stream survive."""
    for use in (encoder.encode, encoder.preprocess):
        with pytest.raises(ImageDecodeError, match=says):
            use([SAMPLES[0], source])
    stream = encoder.encode_stream([SAMPLES[0], source, SAMPLES[1]], on_error="record")
    first, bad, last = stream
    assert first.error is last.error is None
    assert isinstance(bad.error, ImageDecodeError)
    assert bad.source is source
    skipped = encoder.encode_stream([SAMPLES[0], source, SAMPLES[1]], on_error="skip")
    assert [result.index for result in skipped] == [0, 2]
    return bad.error


# The file system


class Nowhere:
    """A path object that fails."""

    def __fspath__(self) -> str:
        raise KeyError("no such picture")


class Wrong:
    def __fspath__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("make", "says", "cause"),
    [
        (lambda folder: folder / "no.png", "is missing", FileNotFoundError),
        (lambda folder: "x" * 5000, "File name too long", OSError),
        (lambda folder: "x/" * 4000, r"xx?/.*…", OSError),
        (lambda folder: "a\0b.png", "null", ValueError),
        (lambda folder: SAMPLES[0] / "inside", "Not a directory", NotADirectoryError),
        (lambda folder: folder, "is a directory", None),
        (lambda folder: "", "is missing", FileNotFoundError),
        (lambda folder: link(folder / "loop", folder / "loop"), "symbolic links", OSError),
        (lambda folder: link(folder / "gone", folder / "to"), "is missing", FileNotFoundError),
        (lambda folder: fifo(folder / "pipe"), "is a pipe", None),
        (lambda folder: "/dev/zero", "a device", None),
        (lambda folder: Nowhere(), "no such picture", KeyError),
        (lambda folder: Wrong(), "cannot be opened", TypeError),
        (lambda folder: "\udcff.png", "is missing", FileNotFoundError),
        (lambda folder: "\ud800.png", "cannot be opened", UnicodeEncodeError),
        (lambda folder: "https://example.org/a.png", "is a URL", OSError),
        (lambda folder: "s3://bucket/a.png", "is a URL", OSError),
        (lambda folder: SAMPLES[0].as_uri(), "is a URL", OSError),
    ],
)
def test_a_path_that_cannot_be_had_is_its_own_error(
    make: Callable[[Path], Any],
    says: str,
    cause: type[Exception] | None,
    encoder: VisionEncoder,
    tmp_path: Path,
) -> None:
    error = refused_alone(encoder, make(tmp_path), says)
    assert len(str(error)) < 500
    assert error.__cause__ is None if cause is None else isinstance(error.__cause__, cause)


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.EIO, errno.EMFILE, errno.ELOOP])
@pytest.mark.parametrize("call", ["stat", "open", "read"])
def test_whatever_the_system_says_of_a_picture_is_its_own_error(
    call: str, code: int, encoder: VisionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(DATA)
    real = {"stat": os.stat, "open": open}

    class Failing(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(code, os.strerror(code))

    def fails(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path) != str(bad):
            return real[call if call == "stat" else "open"](path, *arguments, **options)
        if call == "read":
            return io.BufferedReader(Failing(path))
        raise OSError(code, os.strerror(code), str(path))

    if call == "stat":
        monkeypatch.setattr(os, "stat", fails)
    else:
        monkeypatch.setattr("builtins.open", fails)
    error = refused_alone(encoder, bad, os.strerror(code))
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == code


# File objects


class Upload:
    """A file that can go back but does not say so: SpooledTemporaryFile on Python 3.10."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.read = self._file.read
        self.seek = self._file.seek


class Pipe:
    """One that cannot go back, and has nothing else."""

    def __init__(self, data: bytes) -> None:
        self.read = io.BytesIO(data).read


class Short(Pipe):
    """One that stops early."""

    def __init__(self, data: bytes) -> None:
        whole = io.BytesIO(data)
        self.read = lambda size=-1: whole.read(1000)


class Answers:
    """A stub that always gives the same."""

    def __init__(self, data: bytes) -> None:
        self.read = lambda: data


class Views(Pipe):
    def __init__(self, data: bytes) -> None:
        whole = io.BytesIO(data)
        self.read = lambda size=-1: memoryview(whole.read())


@pytest.mark.parametrize("kind", [Upload, Pipe, Short, Answers, Views, io.BytesIO])
def test_file_objects(kind: Callable[[bytes], Any], encoder: VisionEncoder) -> None:
    assert same(kind(DATA))
    want = encoder.preprocess(DATA)
    assert np.array_equal(encoder.preprocess(kind(DATA)), want)
    (result,) = encoder.encode_stream([kind(DATA)])
    assert np.abs(result.cls - encoder.encode(DATA).cls[0]).max() <= 1e-5


def test_a_file_is_read_from_its_start() -> None:
    for file in (Upload(DATA), io.BytesIO(DATA)):
        file.read(10)
        assert same(file)


def test_maps_and_members_of_archives(tmp_path: Path) -> None:
    with SAMPLES[0].open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as one:
        one.read(5)
        assert same(one)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(SAMPLES[0], "a.jpg")
    for mode in ("r:", "r|"):
        with tarfile.open(tmp_path / "a.tar", mode) as tar:
            member = tar.extractfile(next(iter(tar)))
            assert member is not None
            assert same(member)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(SAMPLES[0], "a.jpg")
        with archive.open("a.jpg") as file:
            assert same(file)


class Silent:
    def read(self) -> None:
        return None


class Asynchronous:
    async def read(self) -> bytes:
        return DATA


class Broken:
    @property
    def name(self) -> str:
        raise RuntimeError("no name")

    def read(self) -> bytes:
        raise EOFError("cut off")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: io.StringIO("text"), "gives str"),
        (Silent, "gives NoneType"),
        (Asynchronous, "asynchronous"),
        (Broken, "cannot be read"),
        (lambda: io.BytesIO(b""), "is empty"),
    ],
)
def test_file_objects_that_give_no_picture(
    make: Callable[[], Any], says: str, encoder: VisionEncoder
) -> None:
    refused_alone(encoder, make(), says)


# Data URIs

B64 = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/jpeg;base64,{B64}",
        f"DATA:image/jpeg;charset=utf-8;BASE64,{B64}",
        f"data:;base64,{B64}",
        f"data:image/jpeg;base64,{B64.rstrip('=')}",
        f"data:image/jpeg;base64,{urllib.parse.quote(B64)}",
        "data:image/jpeg;base64," + "\r\n".join(B64[at : at + 76] for at in range(0, len(B64), 76)),
        f"data:image/jpeg,{urllib.parse.quote(DATA)}",
        f"data:,{urllib.parse.quote(DATA)}",
    ],
    ids=["plain", "parameters", "bare", "unpadded", "escaped", "wrapped", "percent", "shortest"],
)
def test_data_uris(uri: str, encoder: VisionEncoder) -> None:
    assert same(uri)
    assert np.array_equal(encoder.preprocess([uri]), encoder.preprocess(DATA))


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("data:", "no data"),
        ("data:image/png;base64", "no data"),
        ("data:image/png;base64,", "no data"),
        (f"data:image/jpeg;base64,{B64[:-3]}!!!", "cannot be decoded"),
        ("data:image/png;base64,AAAAA", "cannot be decoded"),
        ("data:image/png;base64,AAAA", "cannot be read as a picture"),
        (f"data:image/jpeg;base64,{B64[: len(B64) // 8 * 4]}", "damaged"),
        ("data:image/png;base64,ÄÖÜß", "cannot be decoded"),
    ],
)
def test_data_uris_that_hold_no_picture(uri: str, says: str, encoder: VisionEncoder) -> None:
    assert len(str(refused_alone(encoder, uri, says))) < 500


# Warnings


def corrupt_exif() -> bytes:
    file = io.BytesIO()
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"
    Image.new("RGB", (20, 30), "red").save(file, "JPEG", exif=exif)
    return file.getvalue()


def palette() -> bytes:
    file = io.BytesIO()
    image = Image.open(SAMPLES[0]).quantize(16)
    image.save(file, "PNG", transparency=bytes(range(0, 256, 16)))
    return file.getvalue()


@pytest.mark.parametrize("make", [corrupt_exif, palette])
def test_a_picture_that_pillow_only_warns_of_is_read(make: Callable[[], bytes]) -> None:
    data = make()
    with pytest.warns(UserWarning, match="EXIF|Transparency"):
        want = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    # Warnings are errors in these tests.
    for _ in range(2):
        assert np.array_equal(pixels(data), np.asarray(want))


def test_a_warning_reaches_the_filters_of_the_process() -> None:
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        open_image(corrupt_exif())


def test_pillows_warning_of_very_many_pixels_is_an_error_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    want = pixels(DATA)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2 * len(want) ** 2 // 3)
    # Warnings are errors in these tests, this one no more than others.
    assert np.array_equal(pixels(SAMPLES[0]), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(ImageDecodeError, match="decompression bomb") as caught:
            open_image(SAMPLES[0])
    assert isinstance(caught.value.__cause__, Image.DecompressionBombWarning)
    with pytest.warns(Image.DecompressionBombWarning):
        open_image(SAMPLES[0])


def test_threads_leave_the_filters_as_they_are(encoder: VisionEncoder) -> None:
    before, filters = list(warnings.filters), warnings.filters
    pictures = [corrupt_exif(), palette(), DATA, io.BytesIO(DATA)]
    failed: list[Exception] = []

    def read() -> None:
        try:
            for _ in range(20):
                encoder.preprocess(pictures)
                for picture in pictures:
                    open_image(picture)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert warnings.filters is filters
    assert list(warnings.filters) == before
