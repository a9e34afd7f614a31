"""A cached bundle and the checkpoint it was made from: what is a change, and what is none."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vistower import CLIPMixin, VisionEncoder
from vistower.bundle import Bundle, cache_directory, cache_path, find_bundle, source_files
from vistower.errors import BundleCorruptError, BundleError, CheckpointError, OptionError
from vistower.execution.session import Session
from vistower_export import steps
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle


@pytest.fixture
def cached(clip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose bundle is in the cache."""
    monkeypatch.setenv("VISTOWER_CACHE", str(tmp_path / "cache"))
    checkpoint = Path(shutil.copytree(clip_checkpoint, tmp_path / "checkpoint"))
    export_bundle(resolve_checkpoint(str(checkpoint)), cache_path(str(checkpoint)))
    return checkpoint


def test_the_record_is_of_every_file_that_was_read(cached: Path) -> None:
    manifest = find_bundle(cached).manifest
    assert manifest is not None
    assert set(manifest.source.files) == {
        "config.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip


def through_tar(checkpoint: Path) -> None:
    """As an image layer or an archive: times are cut to whole seconds."""
    archive = checkpoint.parent / "archive.tar"
    with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as file:
        file.add(checkpoint, checkpoint.name)
    shutil.rmtree(checkpoint)
    with tarfile.open(archive) as file:
        if hasattr(tarfile, "data_filter"):
            file.extractall(checkpoint.parent, filter="data")
        else:
            file.extractall(checkpoint.parent)


def touch(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        os.utime(path, (0, 0))


def copy(checkpoint: Path) -> None:
    shutil.copytree(checkpoint, checkpoint.parent / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(checkpoint)
    (checkpoint.parent / "copy").rename(checkpoint)


def link(checkpoint: Path) -> None:
    """As the hub's cache, git-annex and DVC keep files."""
    store = checkpoint.parent / "store"
    store.mkdir()
    for path in list(checkpoint.iterdir()):
        path.rename(store / path.name)
        path.symlink_to(store / path.name)


def add_others(checkpoint: Path) -> None:
    """What transformers does not read does not matter."""
    for name in ("README.md", "training_args.bin", "optimizer.bin", "pytorch_model.bin"):
        (checkpoint / name).write_bytes(b"x")


@pytest.mark.parametrize("change", [through_tar, touch, copy, link, add_others])
def test_equal_bytes_are_no_change(change: Callable[[Path], None], cached: Path) -> None:
    change(cached)
    assert find_bundle(cached).name == "checkpoint"
    assert VisionEncoder.open(cached, device="cpu").encode(SAMPLES[:1]).cls.shape == (1, 64)


def edit_config(checkpoint: Path) -> str:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    return "config.json changed"


def edit_processor(checkpoint: Path) -> str:
    """To the same size and time, as an editor that keeps both."""
    path = checkpoint / "preprocessor_config.json"
    state = path.stat()
    text = path.read_text()
    path.write_text(text.replace("0.26862954", "0.26862955"))
    assert path.read_text() != text
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    return "preprocessor_config.json changed"


def edit_weights(checkpoint: Path) -> str:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return "model.safetensors changed"


def edit_weights_of_an_archive(checkpoint: Path) -> str:
    """The time is that of the record, in whole seconds, as in a reproducible image."""
    edit_weights(checkpoint)
    os.utime(checkpoint / "model.safetensors", ns=(0, 10**18))
    manifest = cache_path(str(checkpoint)) / "vistower.json"
    said = json.loads(manifest.read_text())
    said["source"]["files"]["model.safetensors"]["mtime_ns"] = 10**18
    manifest.write_text(json.dumps(said))
    return "model.safetensors changed"


def add_processor(checkpoint: Path) -> str:
    shutil.copy(checkpoint / "preprocessor_config.json", checkpoint / "processor_config.json")
    return "processor_config.json is new"


def add_adapter(checkpoint: Path) -> str:
    (checkpoint / "adapter_config.json").write_text("{}")
    return "adapter_config.json is new"


def other_weights(checkpoint: Path) -> str:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    return "model.safetensors is gone"


def index(checkpoint: Path) -> str:
    (checkpoint / "model.safetensors").rename(checkpoint / "part.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "part.safetensors"}})
    )
    return "part.safetensors is new"


def break_link(checkpoint: Path) -> str:
    link(checkpoint)
    (checkpoint.parent / "store" / "model.safetensors").unlink()
    return "model.safetensors cannot be read"


@pytest.mark.parametrize(
    "change",
    [
        edit_config, edit_processor, edit_weights, edit_weights_of_an_archive, add_processor,
        add_adapter, other_weights, index, break_link,
    ],
)  # fmt: skip
def test_a_change_is_named(change: Callable[[Path], str], cached: Path) -> None:
    named = change(cached)
    for _ in range(2):
        with pytest.raises(BundleCorruptError, match=named) as caught:
            find_bundle(cached)
        assert "export" in str(caught.value)
        assert "--overwrite" in str(caught.value)


def test_weights_are_hashed_once(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at all where size and time are the record's; else once, and never after that."""
    monkeypatch.setattr(source_files, "HASHED_ALWAYS", 100)
    hashed = []
    original = source_files.sha256_once

    def count(path: Path) -> str:
        hashed.append(path.name)
        return original(path)

    monkeypatch.setattr(source_files, "sha256_once", count)
    find_bundle(cached)
    assert "model.safetensors" not in hashed
    # Long ago, so that it is settled.
    through_tar(cached)
    os.utime(cached / "model.safetensors", (10**9, 10**9))
    find_bundle(cached)
    assert hashed.count("model.safetensors") == 1


def test_a_read_only_or_missing_cache_is_no_hindrance(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = find_bundle(cached).directory
    touch(cached)
    for place in ("/proc/nothing", "/dev/null", str(tmp_path / "dangling")):
        if place.startswith(str(tmp_path)):
            (tmp_path / "dangling").symlink_to("nowhere")
        for variable in ("VISTOWER_CACHE", "HF_HOME"):
            monkeypatch.delenv("VISTOWER_CACHE", raising=False)
            monkeypatch.setenv(variable, place)
            assert VisionEncoder.open(bundle, device="cpu").layout.hidden_size == 64
            with pytest.raises(BundleError, match="vistower export"):
                VisionEncoder.open(cached, device="cpu")


def test_a_user_without_a_home(
    cached: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Containers run under numbers that no user has."""
    bundle = find_bundle(cached).directory
    program = (
        "import os, sys\n"
        "import vistower, vistower.backbones, vistower.encoder, onnxruntime\n"
        "from vistower.errors import OptionError\n"
        # Once before: that user may not read this Python's own modules.
        "vistower.VisionEncoder.open(sys.argv[1], device='cpu')\n"
        "os.setuid(54321)\n"
        "for name in ('HOME', 'XDG_CACHE_HOME', 'HF_HOME', 'VISTOWER_CACHE'):\n"
        "    os.environ.pop(name, None)\n"
        "print(vistower.VisionEncoder.open(sys.argv[1], device='cpu').device)\n"
        "try: vistower.VisionEncoder.open('openai/clip-vit-base-patch32')\n"
        "except OptionError as error: print(error)\n"
    )
    if os.getuid() != 0:
        monkeypatch.setattr(Path, "expanduser", lambda path: path.home())
        monkeypatch.setattr(Path, "home", _no_home)
        monkeypatch.delenv("VISTOWER_CACHE")
        with pytest.raises(OptionError, match="Set VISTOWER_CACHE"):
            cache_directory()
        return
    for parent in (bundle, *bundle.parents):
        if parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    command = [sys.executable, "-c", program, bundle]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "cpu"
    assert "Set VISTOWER_CACHE to a directory" in done.stdout


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("name", ["new\nline", "\x1b[31mred", "n" * 240])
def test_a_checkpoint_of_an_odd_name_has_its_place_in_the_cache(
    name: str, clip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISTOWER_CACHE", str(tmp_path / "cache"))
    checkpoint = Path(shutil.copytree(clip_checkpoint, tmp_path / name))
    place = cache_path(str(checkpoint))
    assert place.name.isprintable()
    export_bundle(resolve_checkpoint(str(checkpoint)), place)
    assert find_bundle(checkpoint).directory == place


def test_a_checkpoint_whose_path_is_no_text_is_refused_in_words(
    clip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISTOWER_CACHE", str(tmp_path / "cache"))
    checkpoint = Path(shutil.copytree(clip_checkpoint, tmp_path / os.fsdecode(b"caf\xe9")))
    place = cache_path(str(checkpoint))
    assert place.name.isprintable()
    # safetensors opens no such path.
    with pytest.raises(CheckpointError, match="not valid UTF-8"):
        export_bundle(resolve_checkpoint(str(checkpoint)), place)
    assert not place.exists()


def test_a_checkpoint_that_changes_while_it_is_exported_is_refused(
    clip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Path(shutil.copytree(clip_checkpoint, tmp_path / "checkpoint"))
    original = steps.write_golden

    def edit(*arguments: object) -> None:
        edit_weights(checkpoint)
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(steps, "write_golden", edit)
    with pytest.raises(CheckpointError, match=r"changed while .*model.safetensors changed"):
        export_bundle(resolve_checkpoint(str(checkpoint)), tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_what_was_opened_by_a_relative_path_opens_elsewhere(
    clip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray, Dask, Spark and joblib do: pickled here, unpickled in another directory."""
    shutil.copytree(clip_bundle, tmp_path / "here" / "bundle")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("VISTOWER_CACHE", "cache")
    pickled = {
        "encoder": VisionEncoder.open("bundle", device="cpu"),
        "dotted": VisionEncoder.open("./../here/bundle/", device="cpu"),
        "session": Session(Path("bundle/onnx/model.onnx"), "cpu"),
        "mixin": CLIPMixin(model_path="bundle", device="cpu"),
        "bundle": Bundle.load("bundle"),
    }
    assert pickled["bundle"].directory == tmp_path / "here" / "bundle"
    (tmp_path / "pickled").write_bytes(pickle.dumps(pickled))
    program = (
        "import pickle, sys, numpy\n"
        "loaded = pickle.load(open(sys.argv[1], 'rb'))\n"
        "cls = [loaded[name].encode(sys.argv[2]).cls[0] for name in ('encoder', 'dotted')]\n"
        "pixels = loaded['encoder'].preprocess(sys.argv[2])\n"
        "cls.append(loaded['session'].run(pixels)[0, 0])\n"
        "cls.append(numpy.asarray(loaded['mixin'].get_cls_feature(sys.argv[2])).reshape(-1))\n"
        "numpy.save(sys.argv[3], numpy.stack(cls))\n"
        "loaded['bundle'].check()\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, tmp_path / "pickled", SAMPLES[0], tmp_path / "cls.npy"],
        cwd=tmp_path / "elsewhere",
        check=True,
    )
    expected = pickled["encoder"].encode(SAMPLES[0]).cls[0]  # type: ignore[attr-defined]
    for cls in np.load(tmp_path / "cls.npy"):
        assert np.abs(cls - expected).max() <= 1e-5
    # Without its bundle it says so.
    shutil.rmtree(tmp_path / "here" / "bundle")
    with pytest.raises(BundleError, match="here/bundle"):
        pickle.loads(pickle.dumps(pickled["encoder"]))


def test_a_pickled_encoder_does_not_open_another_bundle(
    clip_bundle: Path, dinov3_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(clip_bundle, tmp_path / "bundle"))
    pickled = pickle.dumps(VisionEncoder.open(bundle, device="cpu"))
    shutil.rmtree(bundle)
    shutil.copytree(dinov3_bundle, bundle)
    with pytest.raises(BundleCorruptError):
        pickle.loads(pickled)
