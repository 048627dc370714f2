"""The comparison of streams and HTTP: both ways run, and the table says so."""

from pathlib import Path

from benchmarks.stream import WAYS, Figures, frames_of, measure, table
from tests.support.launch import ServerProcess


def test_both_ways_are_measured(server: ServerProcess) -> None:
    frames = frames_of(None, (160, 120))
    assert len(frames) == 12
    found = measure(server, frames, 2, rounds=1, seconds=0.3)
    assert set(found) == set(WAYS)
    for figures in found.values():
        assert figures.seconds
        assert not figures.failed
        assert figures.cpu_ms[0] > 0
    lines = table(2, found)
    assert len(lines) == 3
    assert " 1.00 |" in lines[0]


def test_ratios_are_of_rounds() -> None:
    base = Figures([10.0, 20.0, 40.0], [4.0, 4.0, 4.0], [0.1])
    other = Figures([20.0, 20.0, 20.0], [2.0, 2.0, 2.0], [0.1])
    line = table(1, {"HTTP": base, "stream": other})[1]
    assert line == "| 1 | stream | 20.0 | 1.00 | 100 | 100 | 2.0 | 0.50 | 0 |"


def test_photos_are_reduced(tmp_path: Path) -> None:
    for number, frame in enumerate(frames_of(None, (320, 240))[:2]):
        (tmp_path / f"{number}.jpg").write_bytes(frame)
    assert len(frames_of(tmp_path, (160, 120))) == 2
