"""The wheel and what importing it costs: no torch, no onnx, ONNX Runtime on first use."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import vistower
from vistower.errors import MissingExtraError
from vistower_export.needs import require_exporter
from vistower_export.pictures import SAMPLES

ROOT = Path(__file__).parent.parent
HEAVY = (
    *("torch", "torchvision", "transformers", "huggingface_hub"),
    *("onnx", "onnx_ir", "onnxruntime", "typer", "scipy"),
)


def loaded_by(program: str, python: Path | str = sys.executable) -> set[str]:
    program += f"\nimport sys; print(*({set(HEAVY)!r} & set(sys.modules)))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", program], check=True, capture_output=True, text=True, env=environment
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("program", ["import vistower", "from vistower import *"])
def test_importing_vistower_loads_nothing_heavy(program: str) -> None:
    assert loaded_by(program) == set()


def test_every_public_name_is_there_and_no_other() -> None:
    for name in vistower.__all__:
        assert getattr(vistower, name) is getattr(vistower, name)
    assert set(vistower.__all__) <= set(dir(vistower))
    with pytest.raises(AttributeError, match="no attribute 'VisionDecoder'"):
        vistower.VisionDecoder  # noqa: B018


def test_that_check_can_fail() -> None:
    assert "onnx" in loaded_by("import vistower, onnx")


def test_the_lowest_releases_tested_are_the_lowest_admitted() -> None:
    admitted = {}
    for line in importlib.metadata.requires("vistower") or ():
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": "cpu"}):
            lowest = next(one.version for one in needed.specifier if one.operator == ">=")
            admitted[needed.name] = [int(part) for part in lowest.split(".")]
    lines = (ROOT / "scripts" / "constraints-lowest.txt").read_text(encoding="utf-8")
    tested = {
        name: [int(part) for part in release.split(".")]
        for name, release in re.findall(r"^([\w-]+)==(.+)$", lines, re.MULTILINE)
    }
    for release in tested.values():
        while release and release[-1] == 0:
            release.pop()
    assert tested == admitted


@pytest.mark.parametrize(
    ("package", "release", "says"),
    [
        ("transformers", "4.56.1", "transformers 4.56.1 is installed, and it needs <6,>=4.57"),
        ("torch", None, "torch is not installed"),
    ],
)
def test_the_exporter_says_what_it_needs(
    package: str, release: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_exporter()
    version = importlib.metadata.version

    def changed(name: str) -> str:
        if name != package:
            return version(name)
        if release is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return release

    monkeypatch.setattr(importlib.metadata, "version", changed)
    with pytest.raises(MissingExtraError, match=re.escape(says)) as caught:
        require_exporter()
    assert "pip install 'vistower[export]'" in str(caught.value)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", output, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return next(output.glob("*.whl"))


def test_the_wheel_has_both_packages_and_the_pictures(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in ((ROOT / "runtime", "vistower"), (ROOT / "export", "vistower_export")):
        for path in (folder / package).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".jpg", ".png", ".typed"):
                assert path.relative_to(folder).as_posix() in names
    assert not [name for name in names if name.startswith(("tests", "scripts", "artifacts"))]


@pytest.mark.slow
def test_the_cpu_extra_alone_embeds_in_a_small_environment(
    wheel: Path, clip_bundle: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    if shutil.which("uv"):
        subprocess.run(["uv", "venv", "--quiet", environment], check=True)
        install = ["uv", "pip", "install", "--quiet", "--python", environment / "bin/python"]
    else:
        venv.create(environment, with_pip=True)
        install = [environment / "bin/python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, f"{wheel}[cpu]"], check=True)
    size = sum(p.lstat().st_size for p in environment.rglob("*") if p.is_file())
    assert size < 300e6
    assert loaded_by("import vistower", environment / "bin/python") == set()
    output = tmp_path / "e.npz"
    vistower = environment / "bin/vistower"
    subprocess.run([vistower, "embed", clip_bundle, *SAMPLES, "--output", output], check=True)
    assert output.is_file()
    done = subprocess.run(
        [vistower, "export", "some/model"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'vistower[export]'" in done.stderr


@pytest.mark.slow
def test_a_release_builds_from_its_sdist_and_states_what_it_brings(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts" / "release", tmp_path], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    left_out = {name for name in tracked if name not in shipped}
    assert left_out == {".ci/run"}
    assert "vistower/doctor.onnx" in zipfile.ZipFile(wheel).namelist()
    bill: dict[str, Any] = json.loads((tmp_path / "vistower-cpu.cdx.json").read_text())
    named = {component["name"] for component in bill["components"]}
    assert {"numpy", "pillow", "onnxruntime", "typer", "cykooz-resizer"} <= named
    assert not named & {"torch", "transformers", "onnx"}
