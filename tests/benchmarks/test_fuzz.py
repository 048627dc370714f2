"""Damaged photos: never a crash, and no error but the one that says why."""

from pathlib import Path

from benchmarks.fuzz import fuzz
from tests.support.phones import needs
from tests.support.samples import Sample


def test_damaged_photos_decode_or_are_refused(tmp_path: Path, photos: list[Sample]) -> None:
    for number, photo in enumerate(photos[:2]):
        (tmp_path / f"{number}.jpg").write_bytes(photo.data)
    report = fuzz(2000, 7, tmp_path)
    assert report.wrong == []
    assert report.outcomes["decoded"] > 100
    assert report.outcomes["CorruptImageError"] > 100


def test_damaged_photos_of_phones_decode_or_are_refused() -> None:
    needs("AVIF")
    report = fuzz(80, 7, phones=True)
    assert report.wrong == []
    assert report.outcomes["decoded"] > 5
    assert report.outcomes["CorruptImageError"] > 20
