"""Cores and free memory of this machine, as the standard library and the system tell."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def core_count() -> int:
    """Cores that this process may use: those it may run on, and no more than a container's quota of their time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    # Two and a half cores are two: a third worker would be stopped for half of every period, and the others with it.
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the control groups of this process grant, None where none of them limits it."""
    grants = [quota / period for quota, period in _quotas(root) if quota > 0 and period > 0]
    return min(grants, default=None)


def _quotas(root: Path) -> Iterator[tuple[float, float]]:
    """Quota and period in microseconds of each group that the process is in, and of those above it; cgroups(7)."""
    for folder, version in _groups(root, "cpu"):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        try:
            words = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            quota, period = (float(word) for word in words)  # "max 100000" is no number, and no limit
        except (OSError, ValueError):
            continue
        yield quota, period


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Folders of the control groups of this process, and of those above them, each with its version."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # not Linux
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2; beside version 1 it is mounted one folder deeper
            bases, version = (mounts, mounts / "unified"), 2
        elif controller in controllers.split(","):
            bases, version = (mounts / controllers, mounts / controller), 1
        else:
            continue
        # In a container the path may be the host's, of which only the upper end is there.
        inner = Path(path.lstrip("/"))
        yield from ((base / part, version) for base in bases for part in (inner, *inner.parents))


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of memory that can be had without swapping, of the machine and within a container's limit; None where the system does not say.

    Args:
        root: of the file system.
    """
    known = [size for size in (_memory("MemAvailable", root), *_rooms(root)) if size is not None]
    return min(known, default=None)


def _rooms(root: Path) -> Iterator[int]:
    """What the limit of each control group of this process leaves. Pages of files count as used there, but the system takes them back."""
    for folder, version in _groups(root, "memory"):
        limit, used, files = (
            ("memory.max", "memory.current", ("inactive_file", "active_file"))
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
        )
        try:
            # A limit of "max" is no number, and none.
            most, now = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            stats = dict(line.split()[:2] for line in lines)
            yield max(0, most - now + sum(int(stats.get(name, 0)) for name in files))
        except (OSError, ValueError):
            continue


def swap_bytes() -> int:
    """Bytes to which memory can be swapped out, 0 where the system does not say."""
    return _memory("SwapFree") or 0


def _memory(name: str, root: Path = Path("/")) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return None
