"""The page that says where a network is good and where not: detectors, variations, gaps."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from model.conditions import SIDE, Conditions, conditions, lab
from model.evaluate import main
from model.report import FEW, gaps, groups
from model.variations import ROTATIONS, VARIATIONS, rotated
from tests.support.lesions import SKIN_TONES, write_pairs


def skin(rgb: tuple[int, int, int] = (217, 180, 160)) -> Image.Image:
    """Bare skin with a lesion in the middle."""
    picture = Image.new("RGB", (SIDE, SIDE), rgb)
    ImageDraw.Draw(picture).ellipse((90, 90, 160, 160), fill=tuple(c // 2 for c in rgb))
    return picture


def lesion() -> NDArray[np.bool_]:
    mask = Image.new("1", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse((90, 90, 160, 160), fill=1)
    return np.asarray(mask)


def look(picture: Image.Image) -> Conditions:
    return conditions(np.asarray(picture), lesion())


def test_lab_is_cie_lab() -> None:
    colours = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
    found = np.stack(lab(colours), axis=-1)
    # White, black, red and blue of sRGB.
    expected = [(100, 0, 0), (0, 0, 0), (53.24, 80.09, 67.20), (32.30, 79.19, -107.86)]
    np.testing.assert_allclose(found, expected, atol=0.1)


def test_the_angle_falls_from_pale_skin_to_dark_skin() -> None:
    found = [look(skin(tone)) for tone in SKIN_TONES]
    angles = [each.ita for each in found]
    assert angles == sorted(angles, reverse=True)
    assert found[0].skin_tone == "very light" and found[-1].skin_tone in ("brown", "dark")
    bare = found[0]
    assert not (bare.hair or bare.pen_marks or bare.ruler or bare.dark_corners)


def test_the_lesion_is_not_taken_for_skin() -> None:
    black = skin()
    ImageDraw.Draw(black).ellipse((90, 90, 160, 160), fill=(20, 10, 10))
    assert look(black).ita == pytest.approx(look(skin()).ita, abs=0.5)


def test_hair_ink_ruler_and_corners_are_told_apart() -> None:
    hairy, inked, ruled, tunnel = (skin() for _ in range(4))
    draw = ImageDraw.Draw(hairy)
    for at in range(-200, 300, 17):
        draw.line((at, 0, at + 140, SIDE), fill=(45, 35, 30), width=2)
    ImageDraw.Draw(inked).line((10, 30, 240, 60), fill=(90, 60, 170), width=9)
    for at in range(0, SIDE, 8):
        length = 22 if at % 40 == 0 else 12
        ImageDraw.Draw(ruled).line((at, 0, at, length), fill=(30, 30, 30), width=2)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE * 2 - 1
    pixels = np.asarray(tunnel).copy()
    pixels[np.hypot(x, y) > 1] = 5
    found = [look(p) for p in (hairy, inked, ruled, Image.fromarray(pixels))]
    names = ("hair", "pen_marks", "ruler", "dark_corners")
    for name, each in zip(names, found, strict=True):
        assert getattr(each, name), name
    for name in ("pen_marks", "dark_corners"):
        assert not getattr(found[0], name)
    for name in ("hair", "ruler", "dark_corners"):
        assert not getattr(found[1], name)
    for name in ("hair", "pen_marks", "dark_corners"):
        assert not getattr(found[2], name)
    for name in ("hair", "pen_marks", "ruler"):
        assert not getattr(found[3], name)


def test_a_frame_without_skin_has_no_tone() -> None:
    black = np.zeros((SIDE, SIDE, 3), np.uint8)
    assert conditions(black, lesion()).skin_tone == "no skin to be seen"
    assert conditions(black, np.ones((SIDE, SIDE), np.bool_)).skin_tone == "no skin to be seen"


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_stronger_variation_changes_more(name: str) -> None:
    change, strengths, unit = VARIATIONS[name]
    pixels = np.asarray(skin())
    changes = [
        np.abs(change(pixels, strength).astype(int) - pixels).mean() for strength in strengths
    ]
    assert unit and changes == sorted(changes) and 0 < changes[0] < changes[2]
    assert change(pixels, strengths[2]).dtype == np.uint8


@pytest.mark.parametrize("degrees", ROTATIONS)
def test_a_mask_turns_with_its_photo(degrees: float) -> None:
    mask = np.zeros((SIDE, SIDE), np.bool_)
    mask[40:90, 100:200] = True
    photo = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    turned = rotated(photo, degrees)[..., 0] > 127
    assert (turned != rotated(mask, degrees)).mean() < 0.01
    assert (turned != mask).mean() > 0.02


def test_a_gap_is_named_and_a_small_group_is_not_judged() -> None:
    rng = np.random.default_rng(0)
    scores = np.clip(rng.normal(0.85, 0.05, 100), 0, 1)
    scores[:20] -= 0.3
    scores[95:] = 0.1
    tone = (60.0,) * 95 + (-40.0,) * 5
    shown = [Conditions(angle, index < 20, False, False, False) for index, angle in enumerate(tone)]
    found = groups(scores, shown, np.full(100, 0.15))
    by_name = {(group.factor, group.name): group for group in found}
    hair = by_name["hair", "yes"]
    assert (hair.photos, hair.verdict) == (20, "behind")
    assert hair.jaccard == pytest.approx(scores[:20].mean())
    assert hair.against_rest == pytest.approx(scores[:20].mean() - scores[20:].mean())
    assert by_name["skin tone", "dark"].verdict == "too few to say" and FEW > 5
    assert ("skin tone", "tan") not in by_name, "no photo has it"
    said = gaps(found)
    assert said[0].startswith("hair “yes”") and "skin tone “dark” (5)" in said[-1]


def test_the_report_is_a_folder_with_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path, 3, 120, 90)
    pairs = ["--images", str(tmp_path), "--masks", str(tmp_path)]
    main([*pairs, "--report", str(tmp_path / "page")])
    assert "varying the photos" in capsys.readouterr().err
    page = (tmp_path / "page/index.html").read_text()
    for words in ("skin tone", "too few photos to say", "compression", "rotation", "Chardon"):
        assert words in page
    assert "http" not in page.split("</style>")[1].replace("arXiv", ""), "nothing from elsewhere"
    figures = json.loads((tmp_path / "page/report.json").read_text())
    assert figures["count"] == 3
    assert len(figures["variations"]) == 3 * (len(VARIATIONS) + 1)
    assert {group["factor"] for group in figures["groups"]} >= {"skin tone", "hair", "ruler"}
    with (tmp_path / "page/conditions.csv").open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [
            "lesion_000",
            "lesion_001",
            "lesion_002",
        ]
    assert (tmp_path / "page/report.csv").is_file()
