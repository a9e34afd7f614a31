"""Stops, races and starves exports and embeds, and prints what came of it; see docs/reliability.md.

usage: scripts/faults [--count 50] [--seed 0] [steps|exports|embeds|races|readers|disks...]
Needs the right to mount a tmpfs for the part with full disks; says so where it lacks it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import campaign
import readers
from conftest import tiny_checkpoint
from nursery import Nursery
from vistower.families.clip import FAMILY as CLIP
from vistower.families.dinov3 import FAMILY as DINOV3
from vistower_export.pictures import SAMPLES

PARTS = ("steps", "exports", "embeds", "races", "readers", "disks")


def tallies(folder: Path, count: int, seed: int, parts: Sequence[str]) -> Iterator[object]:
    if "steps" in parts:
        with Nursery("vistower.embedding_files") as light:
            yield from campaign.kill_everything_at_every_step(light, folder)
    first = tiny_checkpoint(folder / "tiny-clip", CLIP)
    second = tiny_checkpoint(folder / "tiny-dinov3", DINOV3)
    output = folder / "exports" / "bundle"
    bundle = folder / "bundles" / "bundle"
    embeds = folder / "embeds" / "o.npz"
    with Nursery() as nursery:
        done = nursery.run("export", first, "--output", bundle)
        if done.code:
            raise SystemExit(done.errors)
        for number in campaign.SIGNALS if "exports" in parts else ():
            yield campaign.stop_exports(nursery, first, second, output, number, count, seed)
        for number in campaign.SIGNALS if "embeds" in parts else ():
            for forked in (nursery, None):
                yield campaign.stop_embeds(
                    forked, bundle, SAMPLES * 10, embeds, number, count, seed
                )
        if "races" in parts:
            yield campaign.race_exports(nursery, first, second, output, max(3, count // 2), seed)
        if "readers" in parts:
            other = folder / "bundles" / "other"
            nursery.run("export", second, "--output", other)
            found = readers.race(
                bundle, other, folder / "read" / "bundle", SAMPLES[0],
                times=20 * count, readers=3, seed=seed,
            )  # fmt: skip
            yield f"replaced {20 * count} times under three readers, who got {dict(found)}"
        if "disks" in parts:
            yield from full_disks(nursery, folder, bundle, second)


def full_disks(
    nursery: Nursery, folder: Path, bundle: Path, second: Path
) -> Iterator[campaign.Tally]:
    disk = folder / "disk"
    if not campaign.can_mount(disk):
        sys.stderr.write("no tmpfs may be mounted here: full disks were left out\n")
        return
    files = [path for path in bundle.rglob("*") if path.is_file()]
    whole = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
    arguments = (
        "export", second, "--overwrite", "--precision", "int8", "--precision", "bf16",
        "--resolution", "224", "--resolution", "96x160",
    )  # fmt: skip
    sizes = [whole + 4096 * pages for pages in (*range(0, 100, 10), *range(100, 4000, 100))]
    yield campaign.fill_disk(
        nursery, disk, bundle, arguments, "bundle", sizes, campaign.bundle_state
    )
    first = folder / "first.npz"
    nursery.run("embed", bundle, SAMPLES[0], "--output", first)
    wholes = {"first": first.read_bytes()}
    # A .npy's names would have to be copied along; tests/test_faults.py limits its size instead.
    yield campaign.fill_disk(
        nursery,
        disk,
        first,
        ("embed", bundle, *SAMPLES * 60, "--device", "cpu"),
        "o.npz",
        [4096 * count for count in range(1, 40)],
        lambda output: campaign.embeddings_state(output, wholes),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=50, help="Faults of each kind.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"Of {', '.join(PARTS)}.")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - {*PARTS}:
        parser.error(f"no such part: {', '.join(unknown)}")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for tally in tallies(
            Path(folder), arguments.count, arguments.seed, arguments.parts or PARTS
        ):
            print(tally, flush=True)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
