"""Golden vectors are untrusted: what they claim is bounded, and nothing is no pass."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forged
from command_line import run
from forged import reseal
from vistower.bundle import Bundle
from vistower.errors import BundleCorruptError, GoldenMismatchError, PrecisionError, VistowerError
from vistower.golden import replay

GOLDEN = "golden/golden.npz"
Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def bundle(clip_bundle: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return forged.copied(clip_bundle, tmp_path / "bundle")


@pytest.fixture
def arrays(clip_bundle: Path) -> Arrays:
    with np.load(clip_bundle / GOLDEN) as loaded:
        return dict(loaded)


def verify(bundle: Path) -> int:
    reseal(bundle, GOLDEN)
    return len(list(replay(Bundle.load(bundle))))


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def rezip(bundle: Path, change: dict[str, bytes], **options: Any) -> None:
    """Write the zip again with other members."""
    with zipfile.ZipFile(bundle / GOLDEN) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(bundle / GOLDEN, "w", **options) as archive:
        for name, data in (members | change).items():
            archive.writestr(name, data)


def test_nothing_to_compare_is_no_pass(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(bundle / GOLDEN)
    with pytest.raises(BundleCorruptError, match="there are none for 224x224 pixels"):
        verify(bundle)
    code, text, _ = run(capsys, "verify", bundle)
    assert code == 1
    assert "comparisons hold" not in text


def test_every_resolution_of_the_graphs_has_some(bundle: Path) -> None:
    forged.put(bundle, "graphs.portable.image_size", [448, 448])
    with pytest.raises(BundleCorruptError, match=r"there are none for 448x448|layout says"):
        verify(bundle)


def test_graphs_that_the_device_does_not_run_are_no_pass(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vistower.golden.can_run", lambda *_: False)
    with pytest.raises(PrecisionError, match="runs none of the graphs"):
        verify(bundle)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("eye-137x91@224x224/last_hidden_state", lambda a: a[:, :-1]),
        ("eye-137x91@224x224/last_hidden_state", lambda a: a[0]),
        ("eye-137x91@224x224/last_hidden_state", lambda a: a.astype(np.float64)),
        ("eye-137x91@224x224/last_hidden_state", lambda a: a.astype(np.float16)),
        ("eye-137x91@224x224/last_hidden_state", np.asfortranarray),
        ("eye-137x91@224x224/pixel_values", lambda a: np.zeros((1, 1, 224, 224), np.float32)),
        ("eye-137x91@224x224/other", lambda a: a),
        ("eye-137x91@96x96/pixel_values", lambda a: np.zeros((1, 3, 96, 96), np.float32)),
        ("eye@x@224x224/pixel_values", lambda a: a),
        ("../eye@224x224/pixel_values", lambda a: a),
        ("other@224x224/pixel_values", lambda a: np.zeros((1, 3, 224, 224), np.float32)),
        ("a\x1b[2J@224x224/pixel_values", lambda a: np.zeros((1, 3, 224, 224), np.float32)),
    ],
)
def test_arrays_are_those_of_the_layout(
    name: str, change: Any, bundle: Path, arrays: Arrays
) -> None:
    arrays[name] = change(arrays.get(name, np.zeros(3, np.float32)))
    np.savez(bundle / GOLDEN, **arrays)
    with pytest.raises(BundleCorruptError, match=r"golden\.npz") as caught:
        verify(bundle)
    assert str(caught.value).isprintable()


def test_a_golden_picture_is_listed(bundle: Path, arrays: Arrays) -> None:
    for kind in ("pixel_values", "last_hidden_state", "pooler_output"):
        arrays[f"other@224x224/{kind}"] = arrays[f"eye-137x91@224x224/{kind}"]
    np.savez(bundle / GOLDEN, **arrays)
    (bundle / "golden/other.png").write_bytes((bundle / "golden/eye-137x91.png").read_bytes())
    with pytest.raises(BundleCorruptError, match=r"golden/other\.png, which is not among"):
        verify(bundle)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 50, 9999999999), }\n",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 50, 64), }\n",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (1, 50, 64), }\n",
        "[" * 5000 + "\n",
        "(" * 60_000 + "\n",
        "__import__('os').abort()\n",
        "",
    ],
    ids=lambda header: header[:24],
)
def test_a_header_is_no_program(header: str, bundle: Path) -> None:
    name = "eye-137x91@224x224/last_hidden_state.npy"
    rezip(bundle, {name: npy(header, bytes(4 * 50 * 64))})
    with pytest.raises(BundleCorruptError, match="last_hidden_state"):
        verify(bundle)


def test_a_compressed_file_is_refused_unpacked(bundle: Path, arrays: Arrays) -> None:
    np.savez_compressed(bundle / GOLDEN, **arrays)
    with pytest.raises(BundleCorruptError, match="compressed"):
        verify(bundle)


@pytest.mark.parametrize("kind", ["deflated", "claimed", "many", "zip64"])
def test_a_bomb_takes_no_memory(kind: str, bundle: Path) -> None:
    name = "eye-137x91@224x224/last_hidden_state.npy"
    if kind == "deflated":
        # 2 GB of zeros in 2 MB.
        with (
            zipfile.ZipFile(bundle / GOLDEN, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open(name, "w", force_zip64=True) as member,
        ):
            for _ in range(2000):
                member.write(bytes(1_000_000))
    elif kind == "claimed":
        data = bytearray((bundle / GOLDEN).read_bytes())
        at = data.rindex(name.encode())
        data[at - 46 + 20 : at - 46 + 28] = b"\xf0\xff\xff\xff" * 2
        (bundle / GOLDEN).write_bytes(data)
    elif kind == "many":
        rezip(bundle, {f"{n}@224x224/pixel_values.npy": b"" for n in range(40_000)})
    else:
        data = bytearray((bundle / GOLDEN).read_bytes())
        locator = b"PK\x06\x07" + bytes(4) + (100).to_bytes(8, "little") + bytes(4)
        (bundle / GOLDEN).write_bytes(bytes(data[:-22]) + locator + bytes(data[-22:]))
    reseal(bundle, GOLDEN)
    script = (
        "import sys; from vistower.bundle import Bundle; from vistower.golden import *\n"
        "from vistower.errors import BundleCorruptError\n"
        "try: list(replay(Bundle.load(sys.argv[1])))\n"
        "except BundleCorruptError as error: print(error)\n"
        "status = open('/proc/self/status').read()\n"
        "print(status.partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, bundle], capture_output=True, text=True, check=True
    )
    message, peak = done.stdout.splitlines()
    assert "golden.npz" in message
    assert int(peak) < 500_000, "kB"


def test_nan_agrees_with_nothing(bundle: Path, arrays: Arrays) -> None:
    arrays["eye-137x91@224x224/last_hidden_state"][0, 0, 0] = np.nan
    np.savez(bundle / GOLDEN, **arrays)
    with pytest.raises(GoldenMismatchError, match="instead of nan"):
        verify(bundle)


@pytest.mark.parametrize("seed", range(40))
def test_no_bytes_raise_anything_else(seed: int, bundle: Path) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray((bundle / GOLDEN).read_bytes())
    # The directory at the end, headers, and anywhere.
    for start, end in ((len(data) - 700, len(data)), (0, 200), (0, len(data))):
        for place in rng.integers(start, end, seed % 4):
            data[place] = int(rng.integers(256))
    (bundle / GOLDEN).write_bytes(data[: len(data) - (seed % 3) * 7])
    try:
        count = verify(bundle)
    except VistowerError:
        count = 15
    assert count == 15


def test_it_is_written_as_numpy_writes(arrays: Arrays, bundle: Path) -> None:
    """The reader knows numpy's own files, whatever its version."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    (bundle / GOLDEN).write_bytes(stream.getvalue())
    assert verify(bundle) == 15
