"""Damaged photos: never a crash, and no error but the one that says why."""

from pathlib import Path

from benchmarks.fuzz import fuzz
from tests.support.samples import Sample


def test_damaged_photos_decode_or_are_refused(tmp_path: Path, photos: list[Sample]) -> None:
    for number, photo in enumerate(photos[:2]):
        (tmp_path / f"{number}.jpg").write_bytes(photo.data)
    report = fuzz(2000, 7, tmp_path)
    assert report.wrong == []
    assert report.outcomes["decoded"] > 100
    assert report.outcomes["CorruptImageError"] > 100
