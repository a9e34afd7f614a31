"""The committed corpus of the fuzz targets; scripts/fuzz looks for inputs that are not in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vistower.errors import VistowerError

FUZZ = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FUZZ))
import targets  # noqa: E402

CORPUS = sorted(path for path in (FUZZ / "corpus").glob("*/*"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_corpus_raises_nothing_but_our_errors(path: Path) -> None:
    targets.TARGETS[path.parent.name](path.read_bytes())


def test_every_target_has_a_corpus_that_is_understood() -> None:
    assert {path.parent.name for path in CORPUS} == set(targets.TARGETS)
    for path in CORPUS:
        if path.parent.name == "manifest":
            assert targets.Manifest.read(path).graphs
        if path.parent.name == "golden":
            with targets.GoldenFile(path, targets.GOLDEN_SHAPES) as golden:
                assert len(golden.pictures) >= 2


@pytest.mark.parametrize(
    ("name", "data"), [("picture", b"\x89PNG"), ("manifest", b"[1]"), ("golden", b"PK")]
)
def test_a_target_lets_every_other_exception_out(
    name: str, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets.TARGETS[name](data)
    monkeypatch.setattr(targets, "VistowerError", KeyError)
    with pytest.raises(VistowerError):
        targets.TARGETS[name](data)
