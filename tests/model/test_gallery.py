"""The page of an evaluation: what it shows, and that it writes nowhere else."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from model.data import find_pairs
from model.evaluate import Evaluation, Network, evaluate
from model.gallery import overlay, write_gallery
from photos.image import lesion_mask
from photos.regions import largest_part, largest_region
from tests.support.lesions import write_pairs
from tests.support.probabilities import faint

COUNT = 9


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, COUNT - 1, 150, 120)
    write_pairs(folder, 1, 700, 500, first_seed=COUNT - 1)

    def ever_worse(batch: np.ndarray) -> np.ndarray:
        rows, columns = np.mgrid[:128, :128]
        discs = [np.hypot(rows - 64, columns - 64) - 28 + 3 * index for index in range(len(batch))]
        return np.asarray(1 / (1 + np.exp(np.array(discs) / 3)), np.float32)

    network = Network(Path("disc.onnx"), 128, {"version": "<7>"}, ever_worse)
    return evaluate(find_pairs(folder, folder), network)


@pytest.fixture(scope="module")
def page(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gallery(evaluation, tmp_path_factory.mktemp("gallery") / "a" / "b")


def test_the_page_shows_cases_in_order_with_their_scores(
    page: Path, evaluation: Evaluation
) -> None:
    text = page.read_text(encoding="utf-8")
    sections = re.split(r"<h2>(Worst|Median|Best) cases</h2>", text)
    shown = {
        title: [float(value) for value in re.findall(r"Jaccard (\d\.\d+) ·", body)]
        for title, body in zip(sections[1::2], sections[2::2], strict=True)
    }
    assert {title: len(scores) for title, scores in shown.items()} == {
        "Worst": 6,
        "Median": 6,
        "Best": 6,
    }
    assert shown["Worst"] == sorted(shown["Worst"])
    assert shown["Best"] == sorted(shown["Best"], reverse=True)
    scores = np.array([float(row["jaccard"]) for row in evaluation.rows()])
    assert shown["Worst"][0] == pytest.approx(scores.min(), abs=1e-3)
    assert shown["Best"][0] == pytest.approx(scores.max(), abs=1e-3)
    assert f"{scores.mean():.4f}" in text


def test_every_picture_is_there_and_nothing_else(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    sources = set(re.findall(r'<img src="([^"]+)"', text))
    assert len(sources) == 18
    assert {path.name for path in page.parent.iterdir()} == sources | {"index.html"}
    assert [path.name for path in page.parent.parent.iterdir()] == ["b"]
    for source in sources:
        with Image.open(page.parent / source) as image:
            image.verify()


def test_the_page_needs_nothing_from_elsewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    references = re.findall(r'(?:src|href)="([^"#][^"]*)"', text)
    assert not [name for name in references if "//" in name]
    assert "<script" not in text


def test_the_page_is_well_formed_and_escaped(page: Path) -> None:
    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "img", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    text = page.read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(text)
    assert balance.open == []
    assert "disc.onnx &lt;7&gt;" in text
    assert "<7>" not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert text.count("<svg") == 4
    assert all(f"n = {n}" in text for n in (COUNT - 1, 1))  # widths up to 256, and above 640
    assert ids


def test_truth_is_outlined_blue_and_prediction_orange(evaluation: Evaluation) -> None:
    for case in (evaluation.cases[0], evaluation.cases[-1]):
        pixels = np.asarray(overlay(case, 0.5)).reshape(-1, 3).tolist()
        assert [0, 144, 255] in pixels
        assert [255, 176, 0] in pixels
    large = overlay(evaluation.cases[-1], 0.5)
    assert large.size == (480, 343)
    assert overlay(evaluation.cases[0], 0.5).size == (150, 120)


def test_a_cleaned_prediction_is_drawn_as_it_is_counted(evaluation: Evaluation) -> None:
    drawn = 0
    for seed in range(20):
        # In the photo it can have several parts, of which one counts.
        probability = largest_region(faint(seed), 0.01)
        case = replace(evaluation.cases[0], probability=probability)
        mask = lesion_mask(probability, *case.image_size, 0.01)
        has_parts = not np.array_equal(mask, largest_part(mask))
        cleaned, plain = overlay(case, 0.01, clean=True), overlay(case, 0.01)
        assert has_parts != (cleaned == plain)
        drawn += has_parts
    assert drawn


def test_one_image_is_enough(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 1, 64, 64)
    network = Network(
        Path("none.onnx"), 64, {}, lambda batch: np.zeros(batch.shape[:3], np.float32)
    )
    pairs = find_pairs(tmp_path / "pairs", tmp_path / "pairs")
    page = write_gallery(evaluate(pairs, network), tmp_path / "gallery")
    assert page.read_text(encoding="utf-8").count("<img") == 3
