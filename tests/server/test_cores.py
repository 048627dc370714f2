"""How many cores a container's limits leave to the server."""

import os
from pathlib import Path

import pytest

from server.cores import available_cores
from server.settings import Settings

NO_LIMIT = len(os.sched_getaffinity(0))


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))


def lay_out(folder: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Control groups as Linux shows them, and the process's own."""
    for name, text in files.items():
        file = folder / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "self").write_text(membership)
    return folder / "cgroup", folder / "self"


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),
        # A pod's limit holds for each of its containers.
        ("0::/pod/box\n", {"pod/cpu.max": "300000 100000", "pod/box/cpu.max": "max 100000"}, 3),
        # The host's path, seen from within the container.
        ("0::/docker/3e01\n", {"cpu.max": "400000 100000"}, 4),
        (
            "4:memory:/\n3:cpu,cpuacct:/\n",
            {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        (
            "3:cpu,cpuacct:/docker/3e01\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "50000\n"},
            1,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("0::/\n", {"cpu.max": "what is this\n"}, 8),
        ("0::/\n", {}, 8),
    ],
)
def test_a_limit_of_cpu_time_counts(
    tmp_path: Path, membership: str, files: dict[str, str], cores: int
) -> None:
    assert available_cores(*lay_out(tmp_path, membership, files)) == cores


def test_affinity_counts_where_there_are_no_control_groups(tmp_path: Path) -> None:
    assert available_cores(tmp_path / "none", tmp_path / "none") == NO_LIMIT


@pytest.mark.parametrize(("workers", "each"), [(1, 8), (3, 2), (16, 1)])
def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch, workers: int, each: int) -> None:
    monkeypatch.setattr("server.settings.available_cores", lambda: 8)
    assert Settings(workers=workers).cores == each
