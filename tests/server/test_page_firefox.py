"""The page in Firefox: a photo, the outline corrected, all masks saved, and the camera."""

import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.firefox import Firefox, firefox, needs_firefox
from tests.support.launch import ServerProcess
from tests.support.lesions import drawn_photo
from tests.support.waiting import until

pytestmark = needs_firefox


@pytest.fixture(scope="module")
def page(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firefox]:
    with firefox(tmp_path_factory.mktemp("firefox")) as page:
        page.open(f"{server.url}/")
        page.until("document.getElementById('server').dataset.ready === 'true'")
        yield page


def click(page: Firefox, selector: str) -> None:
    page.run(f"document.querySelector({selector!r}).click()")


def test_photos_are_outlined_corrected_and_saved_together(
    page: Firefox, server: ServerProcess, tmp_path: Path
) -> None:
    photos = [tmp_path / "one.jpg", tmp_path / "two.jpg"]
    for number, photo in enumerate(photos):
        photo.write_bytes(drawn_photo(7 + number, 900, 600))
    page.choose("choose", *photos)
    page.until("document.getElementById('progress').textContent === '2 of 2 photos done'")
    page.until("document.body.dataset.state === 'done'")
    before = page.text("area")

    page.run("document.getElementById('edit-box').open = true")
    click(page, "input[value=add]")
    left, top, pixel = page.run(
        """
        document.getElementById("stage").scrollIntoView();
        const {x, y, width} = document.getElementById("overlay").getBoundingClientRect();
        return [x, y, width / 900];
        """
    )
    page.drag(*((left + at * pixel, top + at * pixel) for at in (30, 60, 90)))
    page.until(f"document.getElementById('area').textContent !== {before!r}")
    click(page, "#undo")
    page.until(f"document.getElementById('area').textContent === {before!r}")

    click(page, "#save-zip")
    saved = page.downloads / "lesion-masks.zip"
    until(lambda: saved.is_file() and zipfile.is_zipfile(saved))
    with zipfile.ZipFile(saved) as archive:
        assert archive.namelist() == ["one_mask.png", "two_mask.png"]
        for photo, name in zip(photos, archive.namelist(), strict=True):
            mask = httpx.post(f"{server.url}/segment", content=photo.read_bytes()).content
            expected, found = (
                np.asarray(Image.open(BytesIO(png))) for png in (mask, archive.read(name))
            )
            assert (expected != found).mean() <= 1e-4
    names = page.run("return performance.getEntriesByType('resource').map(({name}) => name)")
    assert names and all(name.startswith((server.url, "blob:")) for name in names)


def test_the_camera_is_outlined_and_a_frame_is_kept(page: Firefox) -> None:
    click(page, "#live-camera")
    page.until("Number(document.getElementById('live-rate').textContent) > 0")
    assert int(page.text("live-latency")) >= 0
    click(page, "#live-freeze")
    page.until("document.body.dataset.state === 'done' && document.getElementById('live').hidden")
    assert page.run("return document.getElementById('video').srcObject === null")
