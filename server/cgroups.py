"""The control groups that limit this process."""

from collections.abc import Iterator
from pathlib import Path

__all__ = ["CGROUPS", "MEMBERSHIP", "groups"]

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux mounts control groups, of either version."""

MEMBERSHIP = Path("/proc/self/cgroup")
"""The file that names this process's groups (cgroups(7))."""


def groups(controller: str, cgroups: Path, membership: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of the groups that may limit the process, and whether each is of version 2.

    Args:
        controller: what is limited, such as `cpu`.
        cgroups: `CGROUPS`.
        membership: `MEMBERSHIP`.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        is_v2 = not controllers
        if not is_v2 and controller not in controllers.split(","):
            continue
        hierarchy = cgroups if is_v2 else cgroups / controller
        group = hierarchy / path.lstrip("/")
        # The groups around it limit it too. In a container the path can be the host's, which does
        # not exist there; the hierarchy's root is then the container's own group.
        for folder in (group, *group.parents):
            if folder.is_relative_to(hierarchy):
                yield folder, is_v2
