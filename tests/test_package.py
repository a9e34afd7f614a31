"""The wheel and what importing it costs: no torch, no onnx, ONNX Runtime on first use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import vistower
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
