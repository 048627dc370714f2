"""Builds the wheel: meson-python, with the machine's C compiler or, where none works, ziglang's.

A hook of PEP 517 of its own, as which compiler there is can only be found out on the machine.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mesonpy
from mesonbuild.mesonlib import join_args
from mesonpy import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

_ZIGLANG = "ziglang==0.17.1"


def get_requires_for_build_wheel(config_settings: dict[Any, Any] | None = None) -> list[str]:
    """What has to be installed to build the wheel here."""
    needed: list[str] = mesonpy.get_requires_for_build_wheel(config_settings)
    return needed if _compiler() else [*needed, _ZIGLANG]


def build_wheel(
    wheel_directory: str,
    config_settings: dict[Any, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build the wheel for this machine; gives its name."""
    if (compiler := _compiler()) is None:
        zig = [sys.executable, "-m", "ziglang"]
        # For any processor of this kind, as other compilers do: the wheel may be used elsewhere.
        # Without -O zig compiles the runtime of each try of meson's for debugging: half a minute.
        compiler = join_args([*zig, "cc", "-mcpu=baseline", "-O3"])
        os.environ["AR"] = join_args([*zig, "ar"])
    os.environ["CC"] = compiler
    name: str = mesonpy.build_wheel(wheel_directory, config_settings, metadata_directory)
    return name


def _compiler() -> str | None:
    """The machine's own, or the one that is asked for."""
    if "CC" in os.environ:
        return os.environ["CC"]
    return next((name for name in ("cc", "gcc", "clang") if _works(name)), None)


def _works(compiler: str) -> bool:
    """Whether it links a library; one without the C library's headers does not."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "try.c", Path(folder) / "try.so"
        source.write_text("#include <string.h>\nvoid *f(void *at) { return memchr(at, 0, 1); }\n")
        command = [compiler, "-shared", "-fPIC", "-o", str(library), str(source)]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False
