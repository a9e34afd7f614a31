"""The CPU's instruction sets that decide the speed, and one the correctness, of ONNX Runtime."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
"""Instruction sets that decide the speed of ONNX Runtime on x86."""

_EXACT_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8"}

_X86 = {"x86_64", "amd64", "i386", "i686"}


@lru_cache(maxsize=1)
def cpu_flags() -> tuple[str, ...]:
    """Those of `CPU_FLAGS` this machine has; empty where it does not say."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return ()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    present = set(line.partition(":")[2].split())
    return tuple(flag for flag in CPU_FLAGS if flag in present)


def int8_saturates() -> bool:
    """Whether ONNX Runtime's product of uint8 and int8 may saturate here.

    x86 without VNNI adds two products of 8 bits in 16 (``vpmaddubsw``), and 2 · 255 · 127 does not
    fit. An x86 that does not say what it has counts as one without.
    """
    return platform.machine().lower() in _X86 and _EXACT_INT8.isdisjoint(cpu_flags())
