"""The load test's judge: it has to tell rounding from a wrong mask, and one mask from another."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.deck import deal, given
from tests.support import MODEL
from tests.support.expected import Expected
from tests.support.lesions import encode_photo, lesion_photo

WIDTH, HEIGHT = 800, 600


def map_of_a_disc(radius: float = 0.3) -> NDArray[np.float32]:
    y, x = (np.mgrid[:128, :128] + 0.5) / 128 - 0.5
    return np.asarray(1 / (1 + np.exp((np.hypot(x, y) - radius) * 4)), np.float32)


def mask_of(probability: NDArray[np.float32], width: int = WIDTH, height: int = HEIGHT) -> bytes:
    return Expected(probability, width, height).png


@pytest.fixture
def expected() -> Expected:
    return Expected(map_of_a_disc(), WIDTH, HEIGHT)


def test_the_same_bytes_are_identical(expected: Expected) -> None:
    assert expected.verdict(mask_of(map_of_a_disc()), "fp32") == "identical"


def test_pixels_at_the_threshold_may_round_either_way(expected: Expected) -> None:
    rounded = mask_of(map_of_a_disc() + np.float32(5e-5))
    assert rounded != expected.png
    assert expected.verdict(rounded, "fp32") == "rounding"


def test_pixels_away_from_the_threshold_may_not(expected: Expected) -> None:
    shifted = mask_of(map_of_a_disc() + np.float32(4e-4))
    assert expected.verdict(shifted, "fp32") == "wrong"
    assert expected.verdict(mask_of(map_of_a_disc(0.2)), "fp32") == "wrong"


def test_an_engine_of_less_precision_is_held_to_its_own_gate(expected: Expected) -> None:
    assert expected.verdict(mask_of(map_of_a_disc() + np.float32(4e-4)), "fp16") == "rounding"
    assert expected.verdict(mask_of(map_of_a_disc(0.29)), "fp16") == "wrong"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_answer_that_is_no_mask_of_this_size_is_wrong(expected: Expected, precision: str) -> None:
    assert expected.verdict(b"", precision) == "wrong"
    assert expected.verdict(expected.png[:60], precision) == "wrong"
    assert expected.verdict(mask_of(map_of_a_disc(), WIDTH, HEIGHT + 1), precision) == "wrong"


def test_given_images_are_sent_as_form_and_bare_without_names(
    tmp_path: Path,
) -> None:
    pixels = lesion_photo(1, 64, 48).pixels
    (tmp_path / "Jane Doe 1970.jpg").write_bytes(encode_photo(pixels))
    (tmp_path / "scan.png").write_bytes(encode_photo(pixels, "PNG"))
    (tmp_path / "notes.txt").write_text("no photo")
    deck = given(tmp_path, MODEL)
    assert deck.source == "2 given photos"
    assert deck.kinds == {"64×48 JPEG": 2, "64×48 PNG": 2}
    assert [card.content_type.split(";")[0] for card in deck.cards] == [
        "multipart/form-data",
        "image/jpeg",
        "multipart/form-data",
        "image/png",
    ]
    assert not any(b"Jane" in card.body for card in deck.cards)
    with Image.open(BytesIO(deck.cards[0].expected.png)) as mask:
        assert mask.size == (64, 48)


def test_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no image"):
        given(tmp_path, MODEL)


def test_every_photo_is_dealt_as_often_as_the_others(tmp_path: Path) -> None:
    for seed in range(3):
        pixels = lesion_photo(seed, 40 + seed, 40).pixels
        (tmp_path / f"{seed}.bmp").write_bytes(encode_photo(pixels, "BMP"))
    deck = given(tmp_path, MODEL)
    dealt = deal(deck.cards)
    first, second = ([next(dealt).kind for _ in deck.cards] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(card.kind for card in deck.cards)
