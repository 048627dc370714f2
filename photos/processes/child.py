"""The side of the process that reads one file; `photos.processes.parent` is the other one."""

import contextlib
import json
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

__all__ = ["NO_MEMORY", "limit", "main_of", "taken", "told"]

NO_MEMORY = 3
"""The exit code if memory did not suffice."""


@cache
def main_of(file: str) -> Callable[[], int]:
    """Load a Python file; return its `main`, which returns the exit code."""
    spec = spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[], int] = module.main
    return main


def taken() -> bytes:
    """The next piece of the input, which has its length before it (8 bytes, little-endian)."""
    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    return sys.stdin.buffer.read(size)


def told(what: dict[str, Any]) -> None:
    """Write a line of JSON."""
    sys.stdout.buffer.write(json.dumps(what).encode("ascii") + b"\n")
    sys.stdout.buffer.flush()


def limit(memory: int, cpu_s: int) -> None:
    """Let the system bound this process's memory and time, where it can.

    Args:
        memory: bytes beyond those that the process has taken.
        cpu_s: seconds of CPU since the process began.
    """
    # Windows has no such limits. There the parent's clock bounds the time.
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + memory
        # The hard limit stays, so that a process can ask for more once it knows its photo.
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
