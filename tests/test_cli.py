"""The command line, run as its users run it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import run
from vistower import VisionEncoder
from vistower.cli import app
from vistower_export.pictures import SAMPLES

COMMANDS = ("export", "checkpoint", "embed", "verify", "models", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, command, "--help")
    assert code == 0
    assert "Example: " in text
    assert f"vistower {command}" in text
    assert {name or "" for name in COMMANDS} == {
        info.callback.__name__ for info in app.registered_commands if info.callback
    }


def test_embed_files_folders_and_globs(
    clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for path in SAMPLES[:3]:
        shutil.copy(path, folder / "deep")
    (folder / "notes.txt").write_text("no picture")
    output = tmp_path / "out.npz"
    glob = SAMPLES[3].parent / "*ock*.jpg"
    code, text, errors = run(
        capsys, "embed", clip_bundle, folder, SAMPLES[3], glob, "--output", output,
        "--batch-size", 2, "--patches", "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    assert errors == f"left out, not read as pictures: 1 .txt ({folder}/notes.txt)\n"
    assert "5 pictures, cls of 64 numbers each, by tiny-clip (random-weight) on cpu" in text
    with np.load(output) as arrays:
        names = [Path(name).name for name in arrays["names"]]
        assert names == ["astronaut.jpg", "cat.png", "coffee.jpg", "galaxies.jpg", "rocket.jpg"]
        expected = VisionEncoder.open(clip_bundle, device="cpu").encode(SAMPLES)
        assert np.abs(arrays["cls"] - expected.cls).max() <= 1e-5
        assert np.abs(arrays["patches"] - expected.patches).max() <= 1e-5


def test_embed_npy_has_its_names_beside_it(
    clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, _ = run(capsys, "embed", clip_bundle, *SAMPLES[:2], "--output", tmp_path / "e.npy")
    assert code == 0
    assert np.load(tmp_path / "e.npy").shape == (2, 64)
    names = json.loads((tmp_path / "e.names.json").read_text())
    assert names == [str(path) for path in SAMPLES[:2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.names.json", "e.npy"]


def make_bad(kind: str, folder: Path) -> Path:
    folder.mkdir()
    if kind == "text file":
        (folder / "a.png").write_text("hello")
    elif kind == "empty file":
        (folder / "a.png").touch()
    elif kind == "truncated picture":
        (folder / "a.jpg").write_bytes(SAMPLES[0].read_bytes()[:20_000])
    elif kind == "missing file":
        return folder / "nothing.png"
    elif kind == "glob without match":
        return folder / "*.png"
    return folder


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("text file", "cannot be read as a picture"),
        ("empty file", "is empty (0 bytes)"),
        ("truncated picture", "damaged, cut off"),
        ("missing file", "does not exist"),
        ("empty folder", "has no picture"),
        ("glob without match", "matches no file"),
    ],
)
def test_bad_pictures(
    kind: str, says: str, clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_bad(kind, tmp_path / "in")
    output = tmp_path / "out.npz"
    code, text, errors = run(capsys, "embed", clip_bundle, source, "--output", output)
    assert (code, text) == (2, "")
    assert errors.startswith("error: ")
    assert says in errors
    assert "Traceback" not in errors
    assert not output.exists()


def test_skip_errors_lists_what_it_skips(
    clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = make_bad("text file", tmp_path / "in")
    output = tmp_path / "out.npz"
    code, _, errors = run(
        capsys, "embed", clip_bundle, bad, SAMPLES[0], "--output", output, "--skip-errors"
    )
    assert code == 0
    assert "skipped:" in errors
    assert "a.png" in errors
    assert np.load(output)["names"].tolist() == [str(SAMPLES[0])]
    code, _, errors = run(
        capsys, "embed", clip_bundle, bad, "--output", tmp_path / "none.npz", "--skip-errors"
    )
    assert code == 2
    assert "None of the pictures" in errors


def exporting(says: str, *arguments: str) -> Any:
    return pytest.param(arguments, says, marks=pytest.mark.export)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("embed", "{bundle}", "{sample}", "--output", "out.csv"), ".npz nor .npy"),
        (("embed", "nowhere/model", "{sample}", "--output", "{tmp}/o.npz"), "vistower export"),
        (("embed", "{tmp}", "{sample}", "--output", "{tmp}/o.npz"), "holds no bundle"),
        (("embed", "{bundle}", "{sample}", "--output", "{tmp}/o.npz", "--device", "tpu"), "'auto'"),
        (("embed", "{bundle}", "{sample}", "--output", "{tmp}/o.npz", "--device", "cuda"), "CUDA"),
        (("verify", "./missing"), "no directory"),
        exporting("missing", "export", "{tmp}/missing", "--output", "{tmp}/o"),
        exporting("--overwrite", "export", "{checkpoint}", "--output", "{bundle}"),
        exporting("clip-vit-base-patch32", "checkpoint", "clip-vit-base-patch23", "{tmp}/c"),
    ],
)
def test_mistakes_end_with_code_2_and_a_remedy(
    arguments: tuple[str, ...],
    says: str,
    clip_bundle: Path,
    clip_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VISTOWER_CACHE", str(tmp_path / "cache"))
    names = {"bundle": clip_bundle, "checkpoint": clip_checkpoint, "sample": SAMPLES[0]}
    filled = [argument.format(tmp=tmp_path, **names) for argument in arguments]
    code, _, errors = run(capsys, *filled)
    assert code == 2
    assert says in errors
    assert "Traceback" not in errors


@pytest.mark.export
def test_export_from_a_directory_and_verify(
    dinov3_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VISTOWER_CACHE", str(tmp_path / "cache"))
    code, text, errors = run(capsys, "models")
    assert "has no bundle" in text
    code, text, errors = run(capsys, "export", dinov3_checkpoint)
    assert code == 0
    assert "random-weight" in text
    assert "compare the graphs with torch" in errors
    code, text, _ = run(capsys, "models")
    assert "tiny-dinov3" in text
    assert "random-weight" in text
    code, text, _ = run(capsys, "verify", dinov3_checkpoint)
    assert code == 0
    assert "15 comparisons hold" in text


@pytest.mark.export
def test_export_with_precisions_says_how_each_was_judged(
    clip_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(
        capsys, "export", clip_checkpoint, "--output", tmp_path / "bundle",
        "--precision", "int8", "--precision", "fp16", "--uint8", "--calibrate", SAMPLES[0],
    )  # fmt: skip
    assert code == 0
    assert "int8: calibrated on 1 pictures given at export, quarters" in text
    assert "fp16: emulated in float32 on the CPU" in text
    assert "random weights say little about int8" in text
    code, _, errors = run(
        capsys, "export", clip_checkpoint, "--output", tmp_path / "x", "--precision", "fp8"
    )
    assert code == 2
    assert "use fp16, bf16, int8" in errors
    code, _, errors = run(
        capsys, "export", clip_checkpoint, "--output", tmp_path / "x", "--resolution", "2x3x4"
    )
    assert code == 2
    assert "HEIGHTxWIDTH" in errors


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("graph", "onnx/model_ort.onnx"),
        ("weights", "SHA-256 differs"),
        ("golden", "first difference is at"),
        ("missing", "lacks"),
        ("manifest", "JSON"),
    ],
)
def test_verify_names_the_first_difference(
    damage: str, says: str, clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(clip_bundle, bundle)
    graph = bundle / "onnx/model_ort.onnx"
    manifest = json.loads((bundle / "vistower.json").read_text())
    if damage == "graph":
        graph.write_bytes(graph.read_bytes() + b"x")
    elif damage == "weights":
        weights = bundle / "onnx/model.onnx_data"
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif damage == "missing":
        graph.unlink()
    elif damage == "manifest":
        text = (bundle / "vistower.json").read_text()
        (bundle / "vistower.json").write_text(text[: len(text) // 2])
    else:
        golden = bundle / "golden/golden.npz"
        with np.load(golden) as loaded:
            arrays = dict(loaded)
        arrays["eye-137x91@224x224/last_hidden_state"][0, 3, 5] += 1
        np.savez(golden, **arrays)
        from vistower.bundle import sha256

        record = {"size": golden.stat().st_size, "sha256": sha256(golden)}
        manifest["files"]["golden/golden.npz"] = record
        (bundle / "vistower.json").write_text(json.dumps(manifest))
    code, _, errors = run(capsys, "verify", bundle)
    assert code == 1
    assert says in errors


def test_doctor_says_what_auto_picks_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "doctor", "--json")
    diagnosis = json.loads(text)
    assert code == 0
    assert diagnosis["cpus"] == len(os.sched_getaffinity(0))
    assert "CPUExecutionProvider" in diagnosis["providers"]
    if "CUDAExecutionProvider" not in diagnosis["providers"]:
        assert diagnosis["device"] == "cpu"
        assert "built without CUDA" in diagnosis["device_reason"]
        assert "vistower[gpu]" in diagnosis["device_reason"]
    code, text, _ = run(capsys, "doctor")
    assert diagnosis["device_reason"] in text


def test_debug_shows_the_traceback_and_light_commands_load_no_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vistower.cli", "--debug", "verify", str(tmp_path / "no")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
    program = (
        "import sys; from vistower.cli import main\n"
        "try: main(['doctor'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_quiet_in_a_pipe(clip_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (5, 5)).save(tmp_path / "a.png")
    command = [sys.executable, "-m", "vistower.cli", "embed", clip_bundle, tmp_path / "a.png"]
    done = subprocess.run(
        [*command, "--output", tmp_path / "o.npz"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
