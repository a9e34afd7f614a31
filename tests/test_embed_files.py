"""Which pictures ``vistower embed`` takes, and what becomes of its output."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from command_line import run
from vistower import VisionEncoder, embedding_files
from vistower.errors import EmptyInputError, ImageDecodeError, OutputError, OutputExistsError
from vistower.picture_files import find_pictures, picture_suffixes
from vistower_export.pictures import SAMPLES

PICTURE = Image.new("RGB", (24, 20), (200, 30, 60))


def found(*sources: object) -> list[str]:
    return [str(path) for path in find_pictures([str(source) for source in sources]).paths]


def save(path: Path) -> Path:
    PICTURE.save(path, format=Image.registered_extensions()[path.suffix.lower()])
    return path


# Pillow says of some formats that it will leave them one day.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_ending_that_pillow_writes_and_reads_here_is_taken(tmp_path: Path) -> None:
    """Pillow is asked to open each; no list of ours says which endings those are."""
    Image.init()
    opened = []
    for suffix, name in Image.registered_extensions().items():
        path = tmp_path / f"picture{suffix}"
        if name in {"PDF", "EPS"} or name not in Image.SAVE:
            continue
        for mode in ("RGB", "P", "1"):
            try:
                PICTURE.convert(mode).save(path, format=name)
                break
            except (OSError, ValueError, KeyError, AttributeError):
                path.unlink(missing_ok=True)
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError):
            path.unlink(missing_ok=True)
            continue
        opened.append(str(path))
    assert len(opened) > 30
    assert found(tmp_path) == sorted(opened)
    assert {".jfif", ".jpe", ".jp2", ".mpo", ".apng", ".tga"} <= picture_suffixes()
    assert (".avif" in picture_suffixes()) == bool(features.check("avif"))
    # Stubs, films, and programs are no pictures; nor is what Pillow only writes.
    assert not {".h5", ".grib", ".wmf", ".mpg", ".eps", ".ps", ".pdf"} & picture_suffixes()


def test_twenty_two_readable_pictures_give_twenty_two_vectors(
    clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    (elsewhere / "deep").mkdir(parents=True)
    names = [
        "a.jpg", "b.JPEG", "c.png", "d.bmp", "e.gif", "f.tiff", "g.jfif", "h.jpe", "i.jp2",
        "j.mpo", "k.apng", "l.tga", "m.ppm", "n.pgm", "o.Webp", ".hidden.png", "q.ico", "r.pcx",
    ]  # fmt: skip
    for name in names:
        save(folder / name)
    save(elsewhere / "s.png")
    save(elsewhere / "deep" / "t.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "u.png").symlink_to(elsewhere / "s.png")
    (folder / "folder.png").mkdir()
    save(folder / "folder.png" / "v.png")
    (folder / "notes.txt").write_text("x")
    (folder / "README").write_text("x")
    (folder / "._a.jpg").write_bytes(b"\0\5\26\7")
    for index in range(5):
        (folder / f"film{index}.mp4").write_bytes(b"x")
    output = tmp_path / "o.npz"
    code, text, errors = run(capsys, "embed", clip_bundle, folder, "--output", output)
    assert code == 0
    assert "22 pictures" in text
    assert errors == (
        f"left out, not read as pictures: 5 .mp4 ({folder}/film0.mp4, {folder}/film1.mp4, "
        f"{folder}/film2.mp4, …); 1 .txt ({folder}/notes.txt); 1 resource forks "
        f"({folder}/._a.jpg); 1 without an ending ({folder}/README)\n"
    )
    expected = sorted(
        [*names, "linked/s.png", "linked/deep/t.png", "u.png", "folder.png/v.png"],
        key=lambda name: name.split("/"),
    )
    with np.load(output) as arrays:
        assert arrays["names"].tolist() == [str(folder / name) for name in expected]
        assert arrays["cls"].shape == (22, 64)


def test_links_in_circles_end_and_each_folder_is_searched_once(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "b" / "c").mkdir(parents=True)
    save(folder / "b" / "c" / "x.png")
    (folder / "b" / "c" / "up").symlink_to("../..")
    (folder / "b" / "c" / "self").symlink_to(".")
    (folder / "loop").symlink_to("loop")
    # Twenty folders with two links each to the next: a million paths.
    for index in range(20):
        (folder / f"z{index:02}").mkdir()
        for name in "ab":
            (folder / f"z{index:02}" / name).symlink_to(f"../z{(index + 1) % 20:02}")
    pictures = find_pictures([str(folder)])
    assert [str(path) for path in pictures.paths] == [str(folder / "b" / "c" / "x.png")]
    assert pictures.left_out[0].kind == "folders searched before"
    assert "without an ending" in pictures.notice
    assert found(f"{folder}/**/*.png") == [str(folder / "b" / "c" / "x.png")]
    assert found(f"{folder}/**") == [str(folder / "b" / "c" / "x.png")]


def test_deep_folders(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    try:
        PICTURE.save(tmp_path / Path(*["d"] * 1100) / "x.png")
        assert len(found(tmp_path)) == 1
    finally:
        # Too deep for shutil, and so for pytest.
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)


def test_patterns_are_those_of_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import glob

    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b[1].png", "deep/c.png", "deep/er/d.png", ".h/e.png", "deep/.f.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        save(Path(name))
    for pattern in (
        "*.png", "**/*.png", "deep/**/*.png", "*/*.png", "?.png", "[ab].png", ".h/*", "deep/.*",
        "**/d.png", f"{tmp_path}/**/[cd].png", "**/er/*", "./*.png", "d*/er/d.png",
    ):  # fmt: skip
        # With the same names: "./a.png" is "a.png" as a path.
        expected = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207
        assert [Path(name) for name in found(pattern)] == expected, pattern
    # A name is itself first, whatever is in it.
    assert found("b[1].png") == ["b[1].png"]
    # As a shell's, a pattern may match folders.
    assert found("d*") == ["deep/.f.png", "deep/c.png", "deep/er/d.png"]
    assert found("a.png", "a.png", ".") == [
        "a.png", "a.png", ".h/e.png", "a.png", "b[1].png", "deep/.f.png", "deep/c.png",
        "deep/er/d.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("", ImageDecodeError, "empty name"),
        ("nothing.png", ImageDecodeError, "does not exist"),
        ("x" * 5000, ImageDecodeError, "does not exist"),
        ("~nobody-of-this-name/x.png", ImageDecodeError, "does not exist"),
        ("no*", EmptyInputError, "matches no file"),
        ("empty", EmptyInputError, "no picture"),
        ("texts", EmptyInputError, r"Left out, not read as pictures: 1 .txt \(texts/a.txt\)"),
        ("te*", EmptyInputError, "matches no file"),
    ],
)
def test_nothing_to_embed_is_said(
    source: str,
    error: type[Exception],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("x")
    with pytest.raises(error, match=says):
        find_pictures([source])


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    """As another user than root, who may read anything."""
    folder = tmp_path / "in"
    (folder / "closed").mkdir(parents=True)
    save(folder / "a.png")
    (folder / "closed").chmod(0)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    program = (
        "import os, sys\n"
        "from vistower.picture_files import find_pictures, picture_suffixes\n"
        "picture_suffixes()\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "for source in sys.argv[1:]:\n"
        "    try: print(find_pictures([source]))\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder, f"{folder}/closed/*.png", f"{folder}/**/*.png"],
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / "closed").chmod(0o755)
    assert done.stdout.count("ImageDecodeError The folder") == 3
    assert done.stdout.count("(Permission denied)") == 3


NAMES = ["plain.png", "new\nline.png", "ta\tb.png", "qu\"ote'.png", "ü–日本.png", " space .png"]


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_names_survive(
    suffix: str, clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each name stays with its vector, also those with line breaks or bytes that are no UTF-8."""
    folder = tmp_path / "in"
    folder.mkdir()
    names = [*NAMES, os.fsdecode(b"latin-\xe9.png"), "\r.png", "\x1b[31mred.png", "\u2028.png"]
    for index, name in enumerate(names):
        Image.new("RGB", (9, 9), (20 * index, 255 - 9 * index, 40)).save(folder / name)
    output = tmp_path / f"o{suffix}"
    code, _, _ = run(capsys, "embed", clip_bundle, folder, "--output", output, "--batch-size", 3)
    assert code == 0
    if suffix == ".npz":
        with np.load(output) as arrays:
            loaded, cls = arrays["names"].tolist(), arrays["cls"]
            assert sorted(arrays) == ["cls", "names"]
    else:
        loaded = json.loads((tmp_path / "o.names.json").read_text())
        cls = np.load(output)
    assert loaded == [str(folder / name) for name in sorted(names)]
    encoder = VisionEncoder.open(clip_bundle, device="cpu")
    for name, row in zip(loaded, cls, strict=True):
        assert np.abs(encoder.encode(Path(name)).cls[0] - row).max() <= 1e-5


def test_odd_names_in_messages_end_nothing(clip_bundle: Path, tmp_path: Path) -> None:
    """With a terminal's encoding that lacks them, too."""
    folder = tmp_path / os.fsdecode(b"caf\xe9-\xff")
    folder.mkdir()
    save(folder / "a.png")
    (folder / "ü.txt").write_text("x")
    command = [sys.executable, "-m", "vistower", "embed", clip_bundle, folder]
    for encoding in ("ascii", "utf-8"):
        done = subprocess.run(
            [*command, "--output", folder / "o.npz"],
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )
        assert done.returncode == 0, done.stderr
        assert b"left out" in done.stderr
        assert b"1 pictures" in done.stdout


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_embeddings_are_replaced_and_nothing_else_is(
    suffix: str, clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"o{suffix}"

    def embed(picture: Path) -> tuple[int, str]:
        code, _, errors = run(capsys, "embed", clip_bundle, picture, "--output", output)
        return code, errors

    assert embed(SAMPLES[0]) == (0, "")
    first = outputs(tmp_path)
    output.chmod(0o600)
    assert embed(SAMPLES[1]) == (0, "")
    second = outputs(tmp_path)
    assert second.keys() == first.keys()
    assert all(second[name] != first[name] for name in first)
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    foreign = {
        "a picture": SAMPLES[0].read_bytes(),
        "text": b"my results",
        "nothing": b"",
        "half of it": second[output.name][:-40] if suffix == ".npz" else second[output.name][:60],
    }
    for kind, content in foreign.items():
        output.write_bytes(content)
        before = outputs(tmp_path)
        code, errors = embed(output if kind == "a picture" else SAMPLES[1])
        assert code == 2, kind
        assert "no embeddings that vistower wrote" in errors
        assert outputs(tmp_path) == before
    output.unlink()
    np.savez(tmp_path / "o.npz", names=np.array(["mine"]), cls=np.zeros((1, 64)))
    np.save(tmp_path / "o.npy", np.zeros((2, 64), np.float32))
    (tmp_path / "o.names.json").write_text('["of one"]')
    before = outputs(tmp_path)
    assert embed(SAMPLES[1])[0] == 2
    assert outputs(tmp_path) == before
    for path in tmp_path.iterdir():
        path.unlink()
    output.mkdir()
    assert "is a folder" in embed(SAMPLES[1])[1]
    output.rmdir()
    os.mkfifo(output)
    assert "no embeddings" in embed(SAMPLES[1])[1]


def test_a_foreign_file_of_names_is_kept(
    clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "o.names.json"
    for content in ('{"first": "Ada"}', "[1, 2]", "", "[" * 100_000):
        names.write_text(content)
        code, _, errors = run(
            capsys, "embed", clip_bundle, SAMPLES[0], "--output", tmp_path / "o.npy"
        )
        assert code == 2
        assert "o.names.json is there, and no embeddings" in errors
        assert outputs(tmp_path) == {"o.names.json": content.encode()}


def test_a_link_stays_and_its_file_is_written(
    clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "o.npz"
    link.symlink_to("disk/real.npz")
    code, _, errors = run(capsys, "embed", clip_bundle, SAMPLES[0], "--output", link)
    assert code == 2
    assert "is a link to disk/real.npz, which is not there" in errors
    run(capsys, "embed", clip_bundle, SAMPLES[0], "--output", tmp_path / "disk" / "real.npz")
    code, _, errors = run(capsys, "embed", clip_bundle, *SAMPLES[:2], "--output", link)
    assert (code, errors) == (0, "")
    assert link.is_symlink()
    assert len(np.load(tmp_path / "disk" / "real.npz")["names"]) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "o.npz", "real.npz"]
    hard = tmp_path / "hard.npz"
    os.link(tmp_path / "disk" / "real.npz", hard)
    run(capsys, "embed", clip_bundle, SAMPLES[0], "--output", link)
    assert len(np.load(hard)["names"]) == 2


@pytest.mark.parametrize("output", ["/proc/o.npz", "/sys/o.npy", "{file}/o.npz", "{long}.npz"])
def test_an_unwritable_output_is_said_before_the_work(
    output: str,
    clip_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VisionEncoder, "compute", pytest.fail)
    (tmp_path / "file").write_text("x")
    place = output.format(file=tmp_path / "file", long=tmp_path / ("n" * 300))
    code, _, errors = run(capsys, "embed", clip_bundle, SAMPLES[0], "--output", place)
    assert code == 2
    assert "cannot be written" in errors
    assert "bug" not in errors
    with (
        pytest.raises(OutputError, match=r"takes at least .* left"),
        embedding_files.embedding_file(tmp_path / "o.npz", 1 << 60),
    ):
        pass
    assert outputs(tmp_path) == {"file": b"x"}


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    output = tmp_path / "o.npy"
    with embedding_files.embedding_file(output, 0) as first:
        with (
            pytest.raises(OutputError, match=f"by another process .* {os.getpid()}"),
            embedding_files.embedding_file(output, 0),
        ):
            pass
        # Of another output in the same folder.
        with embedding_files.embedding_file(tmp_path / "p.npy", 0) as other:
            other.write(["b"], {"cls": np.ones((1, 4), np.float32)})
        first.write(["a"], {"cls": np.zeros((1, 4), np.float32)})
    assert sorted(outputs(tmp_path)) == ["o.names.json", "o.npy", "p.names.json", "p.npy"]
    with embedding_files.embedding_file(output, 0) as again:
        (tmp_path / "o.npy").write_bytes(b"written by something else meanwhile")
        with pytest.raises(OutputExistsError, match=r"changed while"):
            again.write(["c"], {"cls": np.zeros((1, 4), np.float32)})
    assert (tmp_path / "o.npy").read_bytes() == b"written by something else meanwhile"
