"""The benchmark of training runs and compares what it says."""

import re

import pytest

from benchmarks.training import main


def test_it_prints_rates_and_their_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--batch-size", "2", "--size", "32", "--rounds", "1"])
    printed = capsys.readouterr().out
    asleep, awake, pooled, twice, plain, schedule = (
        float(rate) for rate in re.findall(r"\| \**([0-9.]+)\** \|$", printed, re.MULTILINE)
    )
    assert schedule == pytest.approx(1 / (0.75 / asleep + 0.25 / awake), rel=0.05)
    ratio = re.search(r"recipe / plain eager: ([0-9.]+)", printed)
    assert ratio is not None and float(ratio[1]) == pytest.approx(schedule / plain, rel=0.1)
    ratios = re.findall(r"^pooled.* / exact, all awake: ([0-9.]+)", printed, re.MULTILINE)
    assert [float(ratio) for ratio in ratios] == pytest.approx(
        [pooled / awake, twice / awake], rel=0.1
    )
