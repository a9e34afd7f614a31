"""Bundles whose files are links: a model hub's cache, git-annex, DVC."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import forged
from command_line import run
from vistower import VisionEncoder
from vistower.errors import BundleCorruptError, BundleError
from vistower_export.pictures import SAMPLES


def hub(digest: str) -> str:
    """All in one folder, named by hash."""
    return f"blobs/{digest}"


def annex(digest: str) -> str:
    """Each in a folder of its own."""
    return f".git/annex/objects/{digest[:2]}/{digest}/SHA256E-{digest}"


def dvc(digest: str) -> str:
    """In folders by the hash's beginning."""
    return f".dvc/cache/files/{digest[:2]}/{digest[2:]}"


def linked(bundle: Path, root: Path, place: Callable[[str], str]) -> Path:
    """A tree of links to a bundle's files in a store."""
    for path in bundle.rglob("*"):
        if not path.is_file():
            continue
        blob = root / place(hashlib.sha256(path.read_bytes()).hexdigest())
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link = root / "snapshots/main" / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return root / "snapshots/main"


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "foreign"])
@pytest.mark.parametrize("store", [hub, annex, dvc])
def test_every_file_a_link(
    store: Callable[[str], str], foreign: bool, clip_bundle: Path, tmp_path: Path
) -> None:
    bundle = linked(clip_bundle, tmp_path, store)
    if foreign:
        forged.foreign(bundle)
    want = VisionEncoder.open(clip_bundle, device="cpu", graph="portable").encode(SAMPLES[0])
    have = VisionEncoder.open(bundle, device="cpu", graph="portable").encode(SAMPLES[0])
    assert np.array_equal(have.patches, want.patches)


@pytest.mark.parametrize("name", ["onnx/model.onnx_data", "onnx/model_ort.onnx"])
def test_one_file_a_link(name: str, clip_bundle: Path, tmp_path: Path) -> None:
    bundle = forged.copied(clip_bundle, tmp_path / "bundle")
    (bundle / name).rename(tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    want = VisionEncoder.open(clip_bundle, device="cpu").encode(SAMPLES[0])
    have = VisionEncoder.open(bundle, device="cpu").encode(SAMPLES[0])
    assert np.array_equal(have.patches, want.patches)


def test_the_whole_bundle_a_link(clip_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(clip_bundle)
    (tmp_path / "parts").mkdir()
    for path in clip_bundle.iterdir():
        (tmp_path / "parts" / path.name).symlink_to(path)
    want = VisionEncoder.open(clip_bundle, device="cpu").encode(SAMPLES[0])
    for bundle in (tmp_path / "link", tmp_path / "parts"):
        have = VisionEncoder.open(bundle, device="cpu").encode(SAMPLES[0])
        assert np.array_equal(have.patches, want.patches)


def test_what_a_link_points_to_is_hashed(clip_bundle: Path, tmp_path: Path) -> None:
    bundle = linked(clip_bundle, tmp_path, annex)
    weights = (bundle / "onnx/model.onnx_data").resolve()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleCorruptError, match=r"onnx/model\.onnx_data .*SHA-256 differs"):
        VisionEncoder.open(bundle, device="cpu")


@pytest.mark.parametrize(
    "name",
    [
        *("vistower.json", "config.json", "preprocessor_config.json", "golden/golden.npz"),
        *("onnx/model.onnx", "onnx/model_ort.onnx", "onnx/model.onnx_data"),
    ],
)
def test_a_link_to_nowhere_is_named(
    name: str, clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = forged.copied(clip_bundle, tmp_path / "bundle")
    (bundle / name).unlink()
    (bundle / name).symlink_to(tmp_path / "gone")
    with pytest.raises(BundleCorruptError, match="is a link to nowhere") as caught:
        VisionEncoder.open(bundle, device="cpu")
    assert str(bundle / name) in str(caught.value)
    assert str(tmp_path / "gone") in str(caught.value)
    code, _, errors = run(capsys, "verify", bundle)
    assert code == 1
    assert "is a link to nowhere" in errors


@pytest.mark.parametrize("name", ["config.json", "onnx/model.onnx", "onnx/model.onnx_data"])
def test_a_link_to_nowhere_in_a_foreign_bundle(
    name: str, clip_bundle: Path, tmp_path: Path
) -> None:
    bundle = forged.foreign(forged.copied(clip_bundle, tmp_path / "bundle"))
    (bundle / name).unlink()
    (bundle / name).symlink_to(tmp_path / "gone")
    with pytest.raises(BundleCorruptError, match="is a link to nowhere"):
        VisionEncoder.open(bundle, device="cpu")


def test_a_loop_of_links(clip_bundle: Path, tmp_path: Path) -> None:
    bundle = forged.copied(clip_bundle, tmp_path / "bundle")
    (bundle / "config.json").unlink()
    (bundle / "config.json").symlink_to("config.json")
    with pytest.raises(BundleCorruptError, match=r"config\.json cannot be read"):
        VisionEncoder.open(bundle, device="cpu")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(BundleError, match="no directory"):
        VisionEncoder.open(tmp_path / "loop", device="cpu")
