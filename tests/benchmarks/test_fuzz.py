"""Damaged photos: never a crash, and no error but the one that says why."""

import subprocess
import sys
from pathlib import Path

from benchmarks.fuzz import fuzz
from tests.support import ROOT
from tests.support.dicom import needs_dicom
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


def test_damaged_dicom_decodes_or_is_refused() -> None:
    needs_dicom()
    # In a process of its own: a fork of one with the suite's threads could hang.
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.fuzz_dicom", "--images", "200", "--seed", "7"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "decoded" in ran.stdout and "refused by name" in ran.stdout
