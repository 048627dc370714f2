"""The comparison of the CPU's backends, on few photos."""

import re
from pathlib import Path

import psutil
import pytest

from benchmarks.cpu_engine import STOCK, OtherWork, disturbance, main, taken
from tests.support.lesions import write_pairs
from tests.support.offline import CPU_BACKEND
from tests.support.waiting import until


@pytest.mark.thorough
def test_speed_and_masks_are_told_beside_stock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path, 3, 200, 150)
    flags = ["--rounds", "2", "--batches", "1", "3", "--threads", "2", "--data", str(tmp_path)]
    assert main([*flags, "--masks", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 threads, 3 photos" in said
    for size in (1, 3):
        row = rf"^\| {STOCK} \| {size} \| [\d.]+ \| [\d.]+ \| 1\.00 \| \*\*1\.00\*\* \| [\d.]+ \|$"
        assert re.search(row, said, re.M)
        assert re.search(rf"^\| {CPU_BACKEND} \(fp32\) \| {size} \|.*\|$", said, re.M)
    assert re.search(r"Other work took [\d.]+ cores", said)
    assert said.count("passed") == 1


def test_a_folder_without_photos_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path)])
    assert "holds no photo" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell")
def test_cpu_taken_by_other_processes_is_counted_but_not_the_burners() -> None:
    """One and the same busy process, once a stranger and once the measurement's own."""
    with taken(1) as burners:
        all_of_it, without = OtherWork([]), OtherWork(burners)
        # The system counts in hundredths of a second.
        until(lambda: sum(psutil.Process(pid).cpu_times().user for pid in burners) > 0.5)
        seen, unseen = all_of_it.cores(), without.cores()
    assert seen is not None and unseen is not None
    assert seen > unseen


def test_figures_of_a_disturbed_machine_do_not_count() -> None:
    assert "do not count" in disturbance([0.0, 0.6, 0.7])
    assert "do not count" not in disturbance([0.0, 0.01, 0.7])
