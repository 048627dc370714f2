"""Cores that this process may use: those it may run on, and what its container's limit comes to."""

import math
import os
from pathlib import Path

__all__ = ["available_cores"]


def available_cores(
    cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Cores by CPU affinity and by limit of CPU time (`docker run --cpus`, Kubernetes' limits).

    A limit that is not a whole number is rounded up: what it has over is there for use.

    Args:
        cgroups: where Linux shows control groups, of either version.
        membership: in which of them this process is (cgroups(7)).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([cores or 1, *(math.ceil(limit) for limit in _limits(cgroups, membership))]))


def _limits(cgroups: Path, membership: Path) -> list[float]:
    """Cores' worth of CPU time, by each group that limits it."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        is_v2 = not controllers
        if not is_v2 and "cpu" not in controllers.split(","):
            continue
        hierarchy = cgroups if is_v2 else cgroups / "cpu"
        group = hierarchy / path.lstrip("/")
        # Those around it limit it, too. In a container the path can be the host's, which is not
        # there, and the hierarchy's root is the container's own group.
        within = (f for f in (group, *group.parents) if f.is_relative_to(hierarchy))
        limits += [_limit(folder, is_v2) for folder in within]
    return [limit for limit in limits if limit is not None and limit > 0]


def _limit(folder: Path, is_v2: bool) -> float | None:
    """Of one group; None or negative where it has none."""
    try:
        if is_v2:
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
