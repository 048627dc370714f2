"""The comparison of the CPU's backends, on few photos."""

import re
from pathlib import Path

import pytest

from benchmarks.cpu_engine import STOCK, main
from tests.conftest import CPU_BACKEND
from tests.lesions import write_pairs


def test_speed_and_masks_are_told_beside_stock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path, 3, 200, 150)
    flags = ["--rounds", "1", "--batches", "1", "3", "--threads", "1", "--data", str(tmp_path)]
    assert main([*flags, "--masks", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1 threads, 3 photos" in said
    assert re.search(
        rf"^\| {STOCK} \| [\d.]+ \| \*\*1\.00\*\* \| [\d.]+ \| \*\*1\.00\*\* \|$", said, re.M
    )
    assert len(re.findall(rf"^\| {CPU_BACKEND} \(.*\|$", said, re.M)) == 2
    assert said.count("passed") == 1


def test_a_folder_without_photos_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path)])
    assert "holds no photo" in capsys.readouterr().err
