"""What ``--overwrite`` may replace and what not, and how a folder takes another's place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import run
from vistower import VisionEncoder, places, staging
from vistower.bundle import Bundle
from vistower.errors import OutputError, OutputExistsError
from vistower_export import steps
from vistower_export.checkpoint import write_random_checkpoint
from vistower_export.pictures import SAMPLES
from vistower_export.source import resolve_checkpoint
from vistower_export.steps import export_bundle


def tree(directory: Path) -> dict[str, bytes | str]:
    """Everything in a folder: files by content, links by target, folders."""
    found: dict[str, bytes | str] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


@pytest.fixture
def bundle(clip_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a bundle, alone in its folder."""
    (tmp_path / "here").mkdir()
    return Path(shutil.copytree(clip_bundle, tmp_path / "here" / "bundle"))


@pytest.fixture
def checkpoint(clip_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, alone in its folder."""
    return Path(shutil.copytree(clip_checkpoint, tmp_path / "there" / "checkpoint"))


def export(checkpoint: Path, output: Path, **options: object) -> Bundle:
    return export_bundle(resolve_checkpoint(str(checkpoint)), output, **options)  # type: ignore[arg-type]


def add_file(bundle: Path) -> str:
    (bundle / "notes.txt").write_text("mine")
    return "notes.txt"


def add_deep_file(bundle: Path) -> str:
    (bundle / "onnx" / "mine.onnx").write_bytes(b"quantized by hand")
    return "onnx/mine.onnx"


def add_repository(bundle: Path) -> str:
    (bundle / ".git").mkdir()
    (bundle / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    return ".git/HEAD"


def add_empty_folder(bundle: Path) -> str:
    (bundle / "results").mkdir()
    return "results/"


def add_link(bundle: Path) -> str:
    (bundle.parent / "photos").mkdir()
    (bundle.parent / "photos" / "a.jpg").write_bytes(b"photo")
    (bundle / "pictures").symlink_to("../photos")
    return "pictures"


def edit_config(bundle: Path) -> str:
    (bundle / "config.json").write_text("{}")
    return "config.json (changed since)"


def edit_weights_to_the_same_size(bundle: Path) -> str:
    path = bundle / "onnx" / "model.onnx_data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "onnx/model.onnx_data (changed since)"


def file_for_a_folder(bundle: Path) -> str:
    shutil.rmtree(bundle / "golden")
    (bundle / "golden").write_text("a golden day")
    return "golden"


def pipe_for_a_file(bundle: Path) -> str:
    (bundle / "config.json").unlink()
    os.mkfifo(bundle / "config.json")
    return "config.json (changed since)"


def no_manifest(bundle: Path) -> str:
    (bundle / "vistower.json").unlink()
    return "config.json"


def broken_manifest(bundle: Path) -> str:
    (bundle / "vistower.json").write_text('{"format_version": 1, "files": ')
    return "vistower.json, which is no record of a bundle"


def manifest_of_another_program(bundle: Path) -> str:
    (bundle / "vistower.json").write_text("[1, 2, 3]")
    return "vistower.json, which is no record of a bundle"


def pipe_for_the_manifest(bundle: Path) -> str:
    (bundle / "vistower.json").unlink()
    os.mkfifo(bundle / "vistower.json")
    return "vistower.json, which is no record of a bundle"


def manifest_without_hashes(bundle: Path) -> str:
    (bundle / "photo.jpg").write_bytes(b"photo")
    manifest = json.loads((bundle / "vistower.json").read_text())
    manifest["files"]["photo.jpg"] = None
    (bundle / "vistower.json").write_text(json.dumps(manifest))
    return "vistower.json, which is no record of a bundle"


FOREIGN = (
    add_file, add_deep_file, add_repository, add_empty_folder, add_link, edit_config,
    edit_weights_to_the_same_size, file_for_a_folder, pipe_for_a_file, no_manifest,
    broken_manifest, manifest_of_another_program, pipe_for_the_manifest, manifest_without_hashes,
)  # fmt: skip


@pytest.mark.parametrize("change", FOREIGN)
def test_a_folder_with_anything_not_ours_is_refused_by_name(
    change: Callable[[Path], str],
    bundle: Path,
    clip_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = change(bundle)
    pipes = {path for path in bundle.rglob("*") if path.is_fifo()}
    before = {} if pipes else tree(bundle.parent)
    code, _, errors = run(capsys, "export", clip_checkpoint, "--output", bundle, "--overwrite")
    assert code == 2
    assert named in errors
    assert "holds what vistower did not write" in errors
    assert pipes or tree(bundle.parent) == before
    assert [path.name for path in bundle.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", ["photos", "text", "git", "many", "file"])
def test_a_folder_of_something_else_is_refused_with_overwrite_too(
    kind: str, clip_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "here" / "mine"
    output.mkdir(parents=True)
    if kind == "photos":
        shutil.copy(SAMPLES[0], output)
    elif kind == "text":
        (output / "thesis.txt").write_text("all of it")
    elif kind == "git":
        subprocess.run(["git", "init", "-q", output], check=True)
    elif kind == "many":
        for index in range(20):
            (output / f"{index:02}.txt").write_text("x")
    else:
        output = output / "thesis.txt"
        output.write_text("all of it")
    before = tree(tmp_path)
    says = {"file": "is a file", "many": "07.txt and 12 more"}.get(kind, "did not write")
    for overwrite in (True, False):
        with pytest.raises(OutputExistsError, match=says):
            export(clip_checkpoint, output, overwrite=overwrite)
        with pytest.raises(OutputExistsError, match="is a file" if kind == "file" else says):
            write_random_checkpoint("dinov3-vits16", output, overwrite=overwrite)
    assert tree(tmp_path) == before


def spelled(output: Path, how: str, tmp_path: Path) -> str:
    if how == "link":
        (tmp_path / "link").symlink_to(output)
        return str(tmp_path / "link")
    if how == "link in the middle":
        (tmp_path / "parent").symlink_to(output.parent)
        return str(tmp_path / "parent" / output.name)
    spellings = {
        "as it is": str(output),
        "slash": f"{output}/",
        "dots": f"{output}/../{output.name}/.",
        "relative": os.path.relpath(output),
    }
    return spellings[how]


SPELLINGS = ("as it is", "slash", "dots", "relative", "link", "link in the middle")


@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize("where", ["the source", "its parent", "inside it"])
def test_the_source_is_never_written_to(
    where: str,
    how: str,
    checkpoint: Path,
    clip_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = {"the source": checkpoint, "its parent": checkpoint.parent}.get(
        where, checkpoint / "bundle"
    )
    if where == "inside it":
        shutil.copytree(clip_bundle, output)
    text = spelled(output, how, tmp_path)
    before = tree(tmp_path)
    code, _, errors = run(capsys, "export", checkpoint, "--output", text, "--overwrite")
    assert code == 2
    assert "which is read to make it" in errors
    with pytest.raises(OutputExistsError, match="which is read to make it"):
        export(checkpoint, checkpoint / "new" / "bundle")
    assert tree(tmp_path) == before


def test_the_source_behind_links_is_known_too(
    checkpoint: Path, clip_bundle: Path, tmp_path: Path
) -> None:
    """As in the hub's cache: a folder of links to files elsewhere."""
    bundle = Path(shutil.copytree(clip_bundle, tmp_path / "bundle"))
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in checkpoint.iterdir():
        (linked / path.name).symlink_to(path)
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError, match=r"holds .* which is read"):
        export(linked, checkpoint, overwrite=True)
    # A bundle that has become part of a source.
    (linked / "extra.json").symlink_to(bundle / "config.json")
    with pytest.raises(OutputExistsError, match=r"holds .* which is read"):
        export(linked, bundle, overwrite=True)
    (linked / "extra.json").unlink()
    assert tree(tmp_path) == before


def test_the_current_directory_and_mount_points_stay(
    clip_checkpoint: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = tree(tmp_path)
    for here, output in (
        (bundle, "."),
        (bundle / "onnx", ".."),
        (bundle, "../bundle"),
        (bundle, ""),
    ):
        monkeypatch.chdir(here)
        code, _, errors = run(capsys, "export", clip_checkpoint, "--output", output, "--overwrite")
        assert code == 2
        assert "the current directory" in errors
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(OutputExistsError, match="the current directory"):
        export(clip_checkpoint, Path())
    (tmp_path / "empty").rmdir()
    with pytest.raises(OutputError, match="cannot be written"):
        export(clip_checkpoint, Path())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputExistsError, match="is a mount point"):
        export(clip_checkpoint, Path("/proc"), overwrite=True)
    monkeypatch.setattr(places, "_mount_points", lambda: frozenset({str(bundle)}))
    with pytest.raises(OutputExistsError, match="is a mount point"):
        export(clip_checkpoint, bundle, overwrite=True)
    assert tree(tmp_path) == before


def test_an_own_bundle_is_replaced_and_nothing_else_is_left(
    clip_checkpoint: Path, bundle: Path
) -> None:
    # An older export of the same folder, and one that lost a file.
    (bundle / "golden" / "golden.npz").unlink()
    with pytest.raises(OutputExistsError, match="replace it with --overwrite"):
        export(clip_checkpoint, bundle)
    inode = bundle.stat().st_ino
    replaced = export(clip_checkpoint, bundle, overwrite=True)
    assert bundle.stat().st_ino != inode
    assert (bundle / "golden" / "golden.npz").is_file()
    replaced.check()
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_bundle_of_another_format_version_is_ours(clip_checkpoint: Path, bundle: Path) -> None:
    manifest = json.loads((bundle / "vistower.json").read_text())
    manifest |= {"format_version": 99, "something": "new"}
    (bundle / "vistower.json").write_text(json.dumps(manifest))
    assert export(clip_checkpoint, bundle, overwrite=True).manifest is not None


def test_a_link_stays_and_what_it_points_to_is_replaced(
    clip_checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    link = tmp_path / "current"
    link.symlink_to("here/bundle")
    inode = bundle.stat().st_ino
    export(clip_checkpoint, link, overwrite=True)
    assert link.is_symlink()
    assert bundle.stat().st_ino != inode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "here"]
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("target", ["nowhere", "itself", "a parent"])
def test_dangling_links_are_refused_before_the_work(
    target: str, clip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to("link" if target == "itself" else "nowhere")
    output = link / "bundle" if target == "a parent" else link
    monkeypatch.setattr(steps, "load", pytest.fail)
    with pytest.raises(OutputError, match="is a link to"):
        export(clip_checkpoint, output, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_hard_links_of_the_old_bundle_live_on(
    clip_checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(bundle, kept, copy_function=os.link)
    before = tree(kept)
    export(clip_checkpoint, bundle, overwrite=True)
    assert tree(kept) == before


def test_what_changes_during_the_export_is_not_deleted(
    clip_checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = steps.write_golden

    def add(*arguments: object) -> None:
        (bundle / "precious.txt").write_text("added meanwhile")
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(steps, "write_golden", add)
    with pytest.raises(OutputExistsError, match=r"changed while .*precious.txt"):
        export(clip_checkpoint, bundle, overwrite=True)
    assert (bundle / "precious.txt").read_text() == "added meanwhile"
    assert (bundle / "vistower.json").is_file()
    (bundle / "precious.txt").unlink()
    Bundle.load(bundle).check()

    def make(*arguments: object) -> None:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "precious.txt").write_text("made meanwhile")
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(steps, "write_golden", make)
    with pytest.raises(OutputExistsError, match=r"precious\.txt"):
        export(clip_checkpoint, tmp_path / "new", overwrite=True)
    assert tree(tmp_path / "new") == {"precious.txt": b"made meanwhile"}


def write(output: Path, content: str) -> None:
    """Publish a small folder, replacing what is there."""
    replaced = places.snapshot(output)
    with staging.staged(output) as stage:
        new = stage.path(output)
        (new / "deep").mkdir(parents=True)
        (new / "file").write_text(content)
        (new / "deep" / "file").write_text("deep")
        stage.publish({output: replaced})


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_while_publishing_restores_the_old_one(
    error: BaseException, exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step, on file systems that exchange folders in one step and on others."""
    output = tmp_path / "output"
    write(output, "old")
    old, new = tree(output), tree(output) | {"file": b"new"}
    rename, replace, exchange = Path.rename, Path.replace, staging.exchange
    steps_left = 0

    def failing(change: Callable[..., object]) -> Callable[..., object]:
        def maybe(path: Path, target: Path) -> object:
            nonlocal steps_left
            steps_left -= 1
            if steps_left == -1:
                raise error
            return change(path, target)

        return maybe

    def cannot(first: Path, second: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(Path, "rename", failing(rename))
    monkeypatch.setattr(Path, "replace", failing(replace))
    monkeypatch.setattr(staging, "exchange", failing(exchange) if exchanges else cannot)
    outcomes = []
    for step in range(10):
        steps_left = step
        with contextlib.suppress(OutputError, KeyboardInterrupt):
            write(output, "new")
        if steps_left >= 0:
            break
        steps_left = 100
        outcomes.append("old" if tree(output) == old else "new")
        assert tree(output) in (old, new)
        staging.clean(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["output"]
        write(output, "old")
    # Two steps or three, then the note that the old one may be deleted.
    assert outcomes == (["old", "new", "new"] if exchanges else ["old", "old", "new"])


def test_a_random_checkpoint_is_replaced_only_where_its_readme_proves_it(tmp_path: Path) -> None:
    directory = tmp_path / "tower"
    write_random_checkpoint("dinov3-vits16", directory, seed=1)
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (directory / "README.md").read_text()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_random_checkpoint("dinov3-vits16", directory, seed=2)
    for change, named in (
        (lambda: (directory / "trainer_state.json").write_text("{}"), "trainer_state.json"),
        (lambda: (directory / "model.safetensors").write_bytes(b"fine-tuned"), "model.safetensors"),
        (lambda: (directory / "README.md").write_text("My model\n"), "README.md"),
        ((directory / "README.md").unlink, "model.safetensors"),
    ):
        kept = tmp_path / "kept"
        shutil.copytree(directory, kept, copy_function=shutil.copy2)
        change()
        before = tree(directory)
        with pytest.raises(OutputExistsError, match=named):
            write_random_checkpoint("dinov3-vits16", directory, seed=2, overwrite=True)
        assert tree(directory) == before
        shutil.rmtree(directory)
        kept.rename(directory)
    write_random_checkpoint("clip-vit-base-patch32", directory, overwrite=True)
    assert "clip" in (directory / "config.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]


def test_an_unwritable_place_is_refused_before_the_work(
    clip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "load", pytest.fail)
    (tmp_path / "file").write_text("x")
    for output, why in (
        (tmp_path / "file" / "bundle", "Not a directory|File exists"),
        (tmp_path / ("n" * 300), "File name too long"),
        (tmp_path / "a" / ("n" * 300) / "b", "File name too long"),
        (Path("/proc/bundle"), "cannot be written"),
        (Path("/sys/bundle"), "cannot be written"),
    ):
        with pytest.raises(OutputError, match=why):
            export(clip_checkpoint, output)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 999, 1))
    with pytest.raises(OutputError, match=r"takes at least \d+ MB, and .* has 0 MB left"):
        export(clip_checkpoint, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["file", "a"] or {
        path.name for path in tmp_path.iterdir()
    } == {"file", "a"}


def test_without_permission_nothing_is_tried(clip_checkpoint: Path, tmp_path: Path) -> None:
    """As another user than root, who may write anywhere."""
    place = tmp_path / "readonly"
    place.mkdir()
    place.chmod(0o555)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    program = (
        "import os, sys, pathlib\n"
        "from vistower import staging\n"
        "from vistower.errors import OutputError\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try:\n"
        "    with staging.staged(pathlib.Path(sys.argv[1]) / 'bundle'): print('staged')\n"
        "except OutputError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(place)], capture_output=True, text=True, check=True
    )
    assert "Permission denied" in done.stdout
    assert "Choose a place that can be written" in done.stdout


@pytest.mark.parametrize("name", ["b" * 250, "ü" * 120, "new\nline", ".hidden", "a*[b]?", "\udcff"])
def test_odd_names_of_outputs(name: str, tmp_path: Path) -> None:
    output = tmp_path / name
    for content in ("old", "new"):
        write(output, content)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert tree(output) == {"file": content.encode(), "deep": "folder", "deep/file": b"deep"}


def test_the_replaced_bundle_serves_the_open_encoder(
    clip_checkpoint: Path, dinov3_checkpoint: Path, bundle: Path
) -> None:
    encoder = VisionEncoder.open(bundle, device="cpu")
    before = encoder.encode(SAMPLES[:1]).cls
    export(dinov3_checkpoint, bundle, overwrite=True)
    assert (encoder.encode(SAMPLES[:1]).cls == before).all()
    after = VisionEncoder.open(bundle, device="cpu")
    assert after.layout.num_register_tokens == 4
    assert (after.encode(SAMPLES[:1]).cls != before).any()
