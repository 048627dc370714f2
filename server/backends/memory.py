"""Memory that is left for one more network, by the machine and by the container's limit.

It is hand-written because psutil, which is no dependency, tells of the machine alone.
"""

from pathlib import Path

from server.backends import BackendError
from server.cgroups import CGROUPS, MEMBERSHIP, groups

__all__ = ["check_memory", "memory_left", "memory_needed"]

# Memory that a network takes while ONNX Runtime loads it, in sizes of its file: the bytes that are
# read, and for each of two sessions a copy of the weights and what they are packed into. Networks
# of 178 and 353 MiB took 5.6 and 5.9 sizes, shipped ones up to 60 MiB more. OpenVINO took 4.2 sizes
# for networks of 184 and 208 MiB, and up to 149 MiB for SLSNet's 9.
_TIMES, _BESIDE = 6, 112 * 2**20

# `common.half` puts casts of the weights with these names before all other nodes. In float32 the
# weights take twice the bytes.
_HALF, _HEAD = b"_half", 4096

_MIB = 2**20


def check_memory(model: Path) -> None:
    """Check that there is memory for a network, by the size of its file.

    Without it the system would end the whole process, and with it the networks that serve.

    Raises:
        BackendError: there is too little.
    """
    try:
        # Whoever reads the file says what is wrong. A pipe would keep this here waiting.
        needed = memory_needed(model) if model.is_file() else 0
    except OSError:
        return
    left = memory_left()
    if left is not None and needed > left:
        raise BackendError(
            f"{model} is too large: it takes about {needed // _MIB} MiB of memory to load, and"
            f" {left // _MIB} MiB are left. Retire another network first, or give the server more"
            " memory."
        )


def memory_needed(model: Path) -> int:
    """Bytes that it takes to load a network, by the size of its file; most of it is not read.

    Raises:
        OSError: the file cannot be read.
    """
    with model.open("rb") as file:
        is_half = _HALF in file.read(_HEAD)
    return (2 if is_half else 1) * _TIMES * model.stat().st_size + _BESIDE


def memory_left(
    meminfo: Path = Path("/proc/meminfo"), cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP
) -> int | None:
    """Bytes that the process may still take; None if the system does not say.

    Args:
        meminfo: where Linux tells of the machine's memory (proc(5)).
        cgroups, membership: as for `groups`.
    """
    left = [_left_in(*group) for group in groups("memory", cgroups, membership)]
    try:
        kib = _figures(meminfo)["MemAvailable:"]
    except (OSError, ValueError, KeyError):
        kib = None
    known = [size for size in (*left, kib and kib * 1024) if size is not None]
    return max(0, min(known)) if known else None


def _left_in(folder: Path, is_v2: bool) -> int | None:
    """What one group's limit leaves; None if it has none. Files' pages make way for a network."""
    names = (
        ("memory.max", "memory.current", "inactive_file")
        if is_v2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    try:
        limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names[:2])
        return limit - used + _figures(folder / "memory.stat").get(names[2], 0)
    except (OSError, ValueError):
        # `max` is no limit.
        return None


def _figures(file: Path) -> dict[str, int]:
    """A file of lines with a name and a number."""
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {name: int(number) for name, number, *_ in lines}
