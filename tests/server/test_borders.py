"""`borders=true`: a tight and a generous outline beside the mask's own, which they never cross."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from photos.quality import QualityTable
from photos.regions import largest_region
from server.http.app import create_app
from server.settings import Settings
from tests.support import MODEL
from tests.support.answers import assert_problem
from tests.support.app import serve_app
from tests.support.launch import ServerProcess
from tests.support.lesions import drawn_photo
from tests.support.probabilities import faint
from tests.support.waiting import until

TABLE = QualityTable.parse(MODEL.with_suffix(".quality.json").read_bytes())
PHOTO = drawn_photo(3, 300, 240)


def ask(server: ServerProcess, query: str, photo: bytes = PHOTO) -> dict[str, Any]:
    response = httpx.post(f"{server.url}/segment/json?{query}", content=photo).raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def filled(parts: list[Any], width: int, height: int) -> NDArray[np.bool_]:
    """The pixels within polygons, and without their holes."""
    picture = Image.new("1", (width, height))
    draw = ImageDraw.Draw(picture)
    for outer, *holes in parts:
        draw.polygon([tuple(point) for point in outer], fill=1)
        for hole in holes:
            draw.polygon([tuple(point) for point in hole], fill=0)
    return np.asarray(picture)


@pytest.mark.parametrize("threshold", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("clean", [False, True])
def test_they_lie_on_both_sides_of_the_masks_own(
    server: ServerProcess, two_lesions: bytes, threshold: float, clean: bool
) -> None:
    for photo, width, height in ((PHOTO, 300, 240), (two_lesions, 480, 400)):
        query = f"borders=true&mask=polygons&threshold={threshold}&clean={clean}"
        answer = ask(server, query, photo)
        borders = answer["borders"]
        assert borders["share"] == TABLE.share
        assert borders["tight"]["threshold"] == max(TABLE.tight, threshold)
        assert borders["generous"]["threshold"] == min(TABLE.generous, threshold)
        tight, middle, generous = (
            filled(parts, width, height)
            for parts in (
                borders["tight"]["polygons"],
                answer["mask"]["polygons"],
                borders["generous"]["polygons"],
            )
        )
        # Filling draws the outline itself too, so edges that touch may be a pixel apart.
        assert (tight & ~middle).sum() <= 0.005 * middle.size
        assert (middle & ~generous).sum() <= 0.005 * middle.size
        assert tight.sum() <= middle.sum() + 50 and middle.sum() <= generous.sum() + 50
        assert generous.sum() > tight.sum()
        if clean:
            assert len(borders["generous"]["polygons"]) == 1


def test_a_cleaned_region_stays_that_of_the_mask_at_a_lower_level() -> None:
    probability = np.zeros((128, 128), np.float32)
    probability[20:40, 20:40] = 0.9
    probability[70:120, 20:120] = 0.2  # larger, but fainter than the mask's threshold
    mask = largest_region(probability, 0.5) > 0.5
    assert mask.sum() == 400
    around = largest_region(probability, 0.1, around=mask) > 0.1
    assert (around == mask).all()
    assert (largest_region(probability, 0.1) > 0.1).sum() == 5000
    # Where there is no mask, the largest region is taken.
    nothing = np.zeros_like(mask)
    assert (largest_region(probability, 0.1, around=nothing) > 0.1).sum() == 5000
    for seed in range(4):
        rough = faint(seed)
        mask = largest_region(rough, 0.5) > 0.5
        core = mask & (rough > 0.5)
        assert (largest_region(rough, 0.05, around=mask)[core] > 0.05).all()


def test_they_are_there_only_if_asked_for(server: ServerProcess) -> None:
    assert "borders" not in ask(server, "")
    files = {"file": ("a.jpg", PHOTO)}
    asked = httpx.post(f"{server.url}/segment/batch?borders=true", files=files).raise_for_status()
    assert json.loads(asked.text)["result"]["borders"] == ask(server, "borders=true")["borders"]
    form = httpx.post(f"{server.url}/segment", files=files, data={"borders": "true"})
    assert form.raise_for_status().json()["borders"]["tight"]["polygons"]


def test_a_png_cannot_have_them(server: ServerProcess) -> None:
    url = f"{server.url}/segment?borders=true"
    refused = httpx.post(f"{url}&format=png", content=PHOTO)
    assert_problem(refused, 422, "borders=true is for JSON answers", "leave borders out")
    assert httpx.post(url, content=PHOTO).json()["borders"], "JSON is taken where nothing is said"
    assert_problem(httpx.post(f"{server.url}/segment?borders=wide", content=PHOTO), 422, "borders")


def test_a_network_without_levels_has_none(tmp_path: Path) -> None:
    model = Path(shutil.copy(MODEL, tmp_path / "alone.onnx"))
    app, _ = create_app(Settings(model=model, backend="onnxruntime", threads=1))
    with serve_app(app) as client:
        until(lambda: client.get("/health/ready").status_code == 200)
        answer = client.post("/segment/json?borders=true", content=PHOTO).raise_for_status()
        assert answer.json()["borders"] is None
