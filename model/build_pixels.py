"""Builds the library that is in the tree from its source: the same bytes on any machine.

    python -m model.build_pixels           # writes pixels-x86_64.so
    python -m model.build_pixels --check   # exits 1 where that is not what it would write

The compiler is the ziglang package (clang), in the version that requirements-dev.txt pins. Serving
needs neither.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common.program import Help
from photos.pixels import LIBRARY

SOURCE = LIBRARY.with_name("pixels.c")

FLAGS = (
    *("-target", "x86_64-linux-gnu.2.17"),
    "-mcpu=x86_64_v2",  # all that numpy itself needs
    *("-std=gnu17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-s"),
    *("-Wall", "-Wextra", "-Werror"),
)


def build(output: Path) -> None:
    """Compile the source to `output`.

    Raises:
        subprocess.CalledProcessError: the compiler is not installed, or found an error.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
        command = [sys.executable, "-m", "ziglang", "cc", *FLAGS]
        subprocess.run(
            [*command, "-o", str(output.resolve()), SOURCE.name],
            cwd=SOURCE.parent,
            env=environment,
            check=True,
        )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m model.build_pixels",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        build(LIBRARY)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / LIBRARY.name
        build(built)
        same = built.read_bytes() == LIBRARY.read_bytes()
    print(f"{LIBRARY.name} is {'' if same else 'not '}what {SOURCE.name} gives")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
