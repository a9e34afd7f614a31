"""How many CPU threads this process may really use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1 = Path("/sys/fs/cgroup/cpu")


def available_cpus() -> int:
    """CPUs of the affinity mask, capped by the cgroup's quota; at least 1.

    ``os.cpu_count()`` reports the machine, which in a container is not what may be used.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else (os.cpu_count() or 1)
    quota = _cgroup_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def preparing_workers(*, on_cpu: bool) -> int:
    """Threads that decode and preprocess beside a tower.

    A tower on the CPU takes every core itself and needs several times longer for a picture than
    its decoding: one worker for each eight cores keeps it fed, and more only interrupt its
    threads (measured in benchmarks/stream.py). A tower on a GPU leaves all cores to them.
    """
    cpus = available_cpus()
    return math.ceil(cpus / 8) if on_cpu else cpus


def _cgroup_quota() -> float | None:
    """CPU quota in cores, or None where there is none (cgroup v2 ``cpu.max``, v1 ``cfs_quota``)."""
    try:
        quota, period = _CGROUP_V2.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota = (_CGROUP_V1 / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (_CGROUP_V1 / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return int(quota) / int(period)
