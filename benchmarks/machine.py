"""What the numbers were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8")
"""Instruction sets that decide the speed of matrix products, as Linux names them."""

LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "openvino",
    "fastembed",
    "optimum-onnx",
    "numpy",
    "pillow",
    "vistower",
)


def describe(threads: int, device: str) -> dict[str, Any]:
    """CPU, instruction sets, cores used, kernel, GPU, versions, date and commit."""
    cpu = _cpuinfo()
    flags = set(cpu.get("flags", "").split())
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_family": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "flags": [flag for flag in FLAGS if flag in flags],
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        if device == "cuda"
        else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
    }


def versions() -> dict[str, str]:
    """Of the libraries that matter, those installed here."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class CpuClock:
    """What the machine's CPUs did since it was made, and for whom."""

    def __init__(self) -> None:
        """Start now."""
        self._start, self._busy, self._ours = time.monotonic(), _busy(), _children()

    def seconds(self) -> float:
        """Wall-clock seconds."""
        return time.monotonic() - self._start

    def foreign(self) -> float:
        """Share of all CPUs' time taken by others than this process's finished children, 0 to 1.

        Time a hypervisor gave to other guests (steal) counts as taken.
        """
        total = self.seconds() * (os.cpu_count() or 1)
        others = (_busy() - self._busy) - (_children() - self._ours)
        return min(1.0, max(0.0, others / total))


def _busy() -> float:
    """CPU seconds in use since boot, over all CPUs: user, nice, system, irq, softirq, steal."""
    line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    user, nice, system, _, _, irq, softirq, steal = map(int, line.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peak_rss() -> int:
    """The largest resident memory of this process so far, in bytes (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; the benchmark runs on Linux.")


def gpu_memory() -> int | None:
    """Memory in use on the GPU, in bytes; the benchmark wants it to itself."""
    used = _output("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    return int(used.splitlines()[0]) * 2**20 if used else None


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n", maxsplit=1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
