"""Cores that this process may use, by CPU affinity and its container's limit of CPU time.

It is hand-written because Python counts only the cores of the affinity.
"""

import math
import os
from pathlib import Path

from server.cgroups import CGROUPS, MEMBERSHIP, groups

__all__ = ["available_cores"]


def available_cores(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Cores by CPU affinity and by limit of CPU time (`docker run --cpus`, Kubernetes' limits).

    A limit that is not a whole number is rounded up, so that all of it is used.

    Args:
        cgroups, membership: as for `groups`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([cores or 1, *(math.ceil(limit) for limit in _limits(cgroups, membership))]))


def _limits(cgroups: Path, membership: Path) -> list[float]:
    """The CPU time that each group allows, in cores."""
    limits = (_limit(*group) for group in groups("cpu", cgroups, membership))
    return [limit for limit in limits if limit is not None and limit > 0]


def _limit(folder: Path, is_v2: bool) -> float | None:
    """One group's limit; None or negative if it has none."""
    try:
        if is_v2:
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
