"""The expected Jaccard of a mask, and the table that makes its quality of it."""

import json

import numpy as np
import pytest

from photos.quality import GRADES, QualityTable, expected_jaccard, grade

TABLE = QualityTable("ab" * 32, 100, (0.0, 0.5, 0.9), (0.0, 0.4, 0.8), 0.8, 0.1, 0.9)


def test_expected_jaccard_is_that_of_the_expected_areas() -> None:
    probability = np.array([[0.9, 0.8], [0.3, 0.1]], np.float32)
    lesion = probability > 0.5
    assert expected_jaccard(probability, lesion) == pytest.approx(1.7 / 2.4)
    # Of the mask that is asked about, not of any.
    assert expected_jaccard(probability, probability > 0.2) == pytest.approx(2.0 / 3.1)


def test_a_sure_mask_is_good_and_an_empty_one_is_not() -> None:
    spot = np.zeros((128, 128), np.float32)
    spot[40:80, 30:90] = 1
    assert expected_jaccard(spot, spot > 0.5) == 1
    assert expected_jaccard(spot, spot > 1) == 0
    assert expected_jaccard(np.zeros_like(spot), spot > 1) == 0
    doubtful = np.clip(spot, 0.3, 0.6)
    assert expected_jaccard(doubtful, doubtful > 0.5) < 0.3


def test_the_table_rises_between_its_rows_and_ends_with_them() -> None:
    assert [TABLE.likely(x) for x in (0.0, 0.25, 0.5, 0.7, 0.9, 1.0)] == [
        0,
        0.2,
        0.4,
        0.6,
        0.8,
        0.8,
    ]
    found = [TABLE.likely(x) for x in np.linspace(0, 1, 200)]
    assert (np.diff(found) >= 0).all()


def test_grades_are_of_the_number_that_is_shown() -> None:
    assert [grade(x) for x in (1.0, 0.8, 0.799, 0.65, 0.649, 0.0)] == [
        *("good", "good", "fair", "fair", "poor", "poor")
    ]
    assert GRADES[-1][0] == 0, "every mask has one"


def test_a_table_is_what_was_written() -> None:
    assert QualityTable.parse(TABLE.document()) == TABLE


@pytest.mark.parametrize(
    "change",
    [
        {"expected": [0.0, 0.5]},
        {"expected": [0.0, 0.9, 0.5]},
        {"jaccard": [0.0, 0.8, 0.4]},
        {"jaccard": [0.0, 0.4, 1.4]},
        {"jaccard": [0.0, 0.4, float("nan")]},
        {"expected": "abc"},
        {"generous": 0.95},
        {"tight": 1.0},
        {"share": 0},
        {"share": None},
        {"weights_sha256": ...},
    ],
)
def test_what_is_no_table_is_refused(change: dict[str, object]) -> None:
    values = {**json.loads(TABLE.document()), **change}
    document = json.dumps({name: value for name, value in values.items() if value is not ...})
    with pytest.raises(ValueError, match=r"ascend|length|within|holds no table|convert"):
        QualityTable.parse(document.encode())
    for text in (b"", b"[]", b"\xff", b"3"):
        with pytest.raises(ValueError, match=r".+"):
            QualityTable.parse(text)
