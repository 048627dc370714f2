"""Builds the libraries that are in the tree from their sources: the same bytes on any machine.

    python -m server.backends.native.build           # writes slsnet- and pixels-x86_64.so
    python -m server.backends.native.build --check   # exits 1 where that is not what it would write

The compiler is the ziglang package (clang), in the version that requirements-dev.txt pins. Serving
needs neither.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from model import pixels
from server.backends import native

__all__ = ["build"]

LIBRARIES = {
    native.LIBRARY: (native.LIBRARY.with_name("slsnet.c"), "x86_64_v4+avx512bf16"),
    # All that numpy itself needs.
    pixels.LIBRARY: (pixels.LIBRARY.with_name("pixels.c"), "x86_64_v2"),
}
"""Each with its source, and the processors that it is for."""

FLAGS = (
    *("-target", "x86_64-linux-gnu.2.17"),
    *("-std=gnu17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-s"),
    *("-Wall", "-Wextra", "-Werror"),
)


def build(source: Path, processor: str, output: Path) -> None:
    """Compile `source` to `output`.

    Raises:
        subprocess.CalledProcessError: the compiler is not installed, or found an error.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
        command = [sys.executable, "-m", "ziglang", "cc", *FLAGS, f"-mcpu={processor}"]
        subprocess.run(
            [*command, "-o", str(output.resolve()), source.name],
            cwd=source.parent,
            env=environment,
            check=True,
        )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m server.backends.native.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    all_same = True
    with tempfile.TemporaryDirectory() as folder:
        for library, (source, processor) in LIBRARIES.items():
            if not check:
                build(source, processor, library)
                continue
            built = Path(folder) / library.name
            build(source, processor, built)
            same = built.read_bytes() == library.read_bytes()
            print(f"{library.name} is {'' if same else 'not '}what {source.name} gives")
            all_same &= same
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(main())
