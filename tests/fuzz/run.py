"""Fuzz one target with atheris: ``python tests/fuzz/run.py TARGET [libFuzzer option...]``.

New inputs go to ``artifacts/fuzz/TARGET``, what fails to ``artifacts/fuzz/TARGET-KIND-SHA1``. With
that file as the only option its input is run again. Half of the JSON inputs stay JSON. Pictures
over 2^18 pixels are refused here, as tests/test_bombs.py is for those.
"""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path

import atheris
from PIL import Image

HERE = Path(__file__).parent
FOUND = HERE.parents[1] / "artifacts" / "fuzz"

sys.path[:0] = [str(HERE), str(HERE.parent)]
with atheris.instrument_imports(include=["vistower"]):
    import targets

    import strange_json

JSON = ("manifest", "config")


def mutated_json(data: bytes, max_size: int, seed: int) -> bytes:
    """Libfuzzer's own mutation, or one of the values in it."""
    chance = random.Random(seed)
    if chance.random() < 0.5:
        try:
            forged = strange_json.forged(data, chance)
        except (ValueError, RecursionError):
            forged = b""
        if 0 < len(forged) <= max_size:
            return forged
    mutated: bytes = atheris.Mutate(data, max_size)
    return mutated


def main() -> None:
    name, *options = sys.argv[1:]
    new = FOUND / name
    new.mkdir(parents=True, exist_ok=True)
    arguments = [
        sys.argv[0],
        "-max_len=65536",
        "-timeout=60",
        "-rss_limit_mb=4096",
        "-print_final_stats=1",
        f"-artifact_prefix={FOUND / name}-",
        *options,
    ]
    if not any(Path(option).is_file() for option in options):
        arguments += [str(new), str(HERE / "corpus" / name)]
    # Pillow refuses twice as many, and warns of those between.
    Image.MAX_IMAGE_PIXELS = 1 << 17
    warnings.simplefilter("ignore")
    custom = {"custom_mutator": mutated_json} if name in JSON else {}
    atheris.Setup(arguments, targets.TARGETS[name], **custom)
    try:
        atheris.Fuzz()
    finally:
        targets.remove_folder()


if __name__ == "__main__":
    main()
