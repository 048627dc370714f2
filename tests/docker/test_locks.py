"""The images install what the requirement files pin, each file of it known by its hash."""

import re

import pytest

from tests.support import ROOT


def _locked(name: str) -> dict[str, list[str]]:
    """Hashes of each `package==version`."""
    locked: dict[str, list[str]] = {}
    for line in (ROOT / "docker" / name).read_text().splitlines():
        if match := re.match(r"([a-z0-9._-]+==[^ ]+) ", line):
            hashes = locked.setdefault(match[1], [])
        elif match := re.match(r"    --hash=sha256:([0-9a-f]{64})", line):
            hashes.append(match[1])
        else:
            assert line.startswith("#"), line
    return locked


@pytest.mark.parametrize(
    ("source", "lock"),
    [
        ("requirements.txt", "requirements.lock"),
        ("requirements-gpu.txt", "requirements-gpu.lock"),
        ("requirements-lean.txt", "requirements-lean.lock"),
        *(
            (f"requirements{of}.txt", "requirements-full.lock")
            for of in ("", "-dicom", "-grpc", "-heif")
        ),
        *((f"requirements{of}.txt", "requirements-openvino.lock") for of in ("", "-openvino")),
        ("docker/requirements-build.in", "requirements-build.lock"),
        ("requirements-bench.txt", "requirements-load.lock"),
    ],
)
def test_locks_follow_the_requirements(source: str, lock: str) -> None:
    lines = [line for line in (ROOT / source).read_text().splitlines() if line[:1].isalpha()]
    pins = [re.sub(r"\[.*\]", "", line.split()[0]) for line in lines]
    locked = _locked(lock)
    missing = set(pins) - locked.keys()
    assert not missing, "run docker/lock.sh"
    assert all(locked.values())
    assert len({package.split("==")[0] for package in locked}) == len(locked)


def test_a_lean_image_is_the_cpus_with_tensorrt_beside_it() -> None:
    cpu, lean = (
        {package.split("==")[0] for package in _locked(lock)}
        for lock in ("requirements.lock", "requirements-lean.lock")
    )
    assert lean - cpu == {
        "cuda-bindings",
        "cuda-pathfinder",
        "tensorrt-lean-cu13-bindings",
        "tensorrt-lean-cu13-libs",
    }


def test_no_torch_in_an_image() -> None:
    for image in ("", "-gpu", "-lean", "-full", "-openvino"):
        packages = _locked(f"requirements{image}.lock")
        assert not any(package.startswith("torch") for package in packages)
