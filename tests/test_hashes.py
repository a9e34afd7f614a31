"""Weights are hashed once and remembered; where that is in doubt, hashed again."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import forged
from vistower import VisionEncoder
from vistower.bundle import Bundle, hashes
from vistower.errors import BundleCorruptError
from vistower.golden import replay

WEIGHTS = "onnx/model.onnx_data"


@pytest.fixture
def bundle(clip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, and a cache of its own; files just written are remembered too."""
    monkeypatch.setenv("VISTOWER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)
    return forged.copied(clip_bundle, tmp_path / "bundle")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of each large file that is hashed."""
    sizes: list[int] = []
    honest = hashes._digest

    def counting(file):  # type: ignore[no-untyped-def]
        size = os.fstat(file.fileno()).st_size
        if size > 1 << 20:
            sizes.append(size)
        return honest(file)

    monkeypatch.setattr(hashes, "_digest", counting)
    return sizes


def opened(bundle: Path) -> VisionEncoder:
    return VisionEncoder.open(bundle, device="cpu")


def records(bundle: Path) -> list[Path]:
    return sorted((bundle.parent / "cache/.verified").glob("*.json"))


def damage(bundle: Path, start: int, filling: bytes) -> None:
    """Overwrite a piece of the weights, and give them their time of modification back."""
    path = bundle / WEIGHTS
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(start)
        file.write(filling)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("known", [False, True], ids=["first", "remembered"])
@pytest.mark.parametrize(
    ("start", "filling"),
    [(1_200_000, b"\x55"), (0, bytes(65536)), (4096, b"\x00\x00\xc0\x7f" * 1000)],
    ids=["a byte", "64 KiB of zeros", "NaN"],
)
def test_damaged_weights_are_not_opened(
    start: int, filling: bytes, known: bool, bundle: Path
) -> None:
    if known:
        opened(bundle)
        assert len(records(bundle)) == 1
    damage(bundle, start, filling)
    with pytest.raises(BundleCorruptError, match=r"model\.onnx_data .*SHA-256 differs"):
        opened(bundle)


def test_a_second_open_reads_no_weights(bundle: Path, read: list[int]) -> None:
    size = (bundle / WEIGHTS).stat().st_size
    for _ in range(3):
        opened(bundle)
    assert read == [size]
    other = forged.copied(bundle, bundle.parent / "other")
    opened(other)
    assert read == [size, size]


def test_what_was_changed_a_moment_ago_is_not_remembered(
    bundle: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED_NS", 10**12)
    opened(bundle)
    opened(bundle)
    assert len(read) == 2
    assert records(bundle) == []


def test_verify_hashes_whatever_is_remembered(bundle: Path, read: list[int]) -> None:
    """A record that lies about a changed file: only who writes to the cache can make one."""
    opened(bundle)
    (record,) = records(bundle)
    digest = json.loads(record.read_text())["sha256"]
    damage(bundle, 1_200_000, b"\x55")
    found = (bundle / WEIGHTS).stat()
    state = {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}
    lie = {"path": str(bundle / WEIGHTS), **state, "inode": found.st_ino, "sha256": digest}
    record.write_text(json.dumps(lie))
    opened(bundle)
    with pytest.raises(BundleCorruptError, match="SHA-256 differs"):
        list(replay(Bundle.load(bundle)))
    # It is true again from then on.
    with pytest.raises(BundleCorruptError, match="SHA-256 differs"):
        opened(bundle)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 10_000, b"x" * 100_000, b'{"sha256": 1}'],
)
def test_a_record_that_is_none_is_left_out_of_account(
    content: bytes, bundle: Path, read: list[int]
) -> None:
    opened(bundle)
    (record,) = records(bundle)
    good = record.read_bytes()
    record.write_bytes(content)
    opened(bundle)
    assert len(read) == 2
    assert record.read_bytes() == good
    record.unlink()
    os.mkfifo(record)
    opened(bundle)
    assert len(read) == 3


@pytest.mark.parametrize("cache", ["file", "link to nowhere", "device"])
def test_a_cache_that_cannot_be_written_means_hashing_each_time(
    cache: str, bundle: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = bundle.parent / "cache"
    if cache == "file":
        place.write_text("in the way")
    elif cache == "link to nowhere":
        place.symlink_to(place / "nowhere" / "at all")
    else:
        monkeypatch.setenv("VISTOWER_CACHE", "/dev/null")
    opened(bundle)
    opened(bundle)
    assert len(read) == 2


def test_many_at_once(bundle: Path) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                opened(bundle)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(records(bundle)) == 1
    assert [path.name for path in records(bundle)[0].parent.iterdir()] == [records(bundle)[0].name]


def test_a_bundle_is_listed_without_hashing_its_weights(bundle: Path, read: list[int]) -> None:
    Bundle.load(bundle)
    assert read == []
