"""What the latency benchmark refuses, what it takes for torch, and what it says of a start."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.latency import has_torch, start_table
from tests.support import ROOT
from tests.support.samples import Sample


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_without_photos_is_refused(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path if exists else tmp_path / "nothing"
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.latency", "--images", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 2
    assert f"{folder} holds no .jpg" in result.stderr
    assert not result.stdout


def test_installed_torch_is_found_by_its_libraries() -> None:
    line = "7f00-7f01 r-xp 00000000 08:01 42    {}"
    numpy = line.format("/home/a/torch-serving/.venv/numpy/core.so")
    torch = line.format("/usr/lib/python3/torch/lib/libtorch_cpu.so")
    assert not has_torch(numpy)
    assert has_torch(f"{numpy}\n{torch}\n")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_a_start_is_told_with_the_memory_that_eight_photos_take(photos: list[Sample]) -> None:
    row = start_table((), photos[0].data, 1).splitlines()[-1]
    told = re.fullmatch(r"\| \*\*[\d.]+\*\* \| [\d.]+ \| no \| (\d+) \|", row)
    assert told and int(told[1]) > 64, row
