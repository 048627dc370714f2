"""Probabilities at the photo's size: what they hold, and what bounds them."""

import base64

import httpx
import numpy as np
import pytest
from PIL import Image

from photos.image import read_photo
from tests.support.answers import assert_problem
from tests.support.launch import ServerProcess, serve
from tests.support.offline import Offline
from tests.support.samples import Sample

WHOLE = {"mask": "probabilities", "size": "original"}


@pytest.mark.parametrize("path", ["/segment", "/segment/json"])
def test_probabilities_at_the_photos_size(
    server: ServerProcess, photos: list[Sample], offline: Offline, path: str
) -> None:
    for photo in photos[:3]:
        answer = httpx.post(server.url + path, content=photo.data, params=WHOLE).json()
        size = answer["image"]["width"], answer["image"]["height"]
        assert (answer["mask"]["width"], answer["mask"]["height"]) == size
        levels = np.frombuffer(base64.b64decode(answer["mask"]["probabilities"]), "<u2")
        found = levels.reshape(size[::-1]) / 65535
        own = Image.fromarray(offline.probability(read_photo(photo.data)))
        # Enlarging, Pillow's filter is bilinear with half-pixel centres and clamped edges.
        expected = np.asarray(own.resize(size, Image.Resampling.BILINEAR))
        assert np.abs(found - expected).max() < 1e-4


@pytest.mark.usefixtures("small_networks")
def test_what_holds_for_large_answers(photos: list[Sample]) -> None:
    photo = photos[0].data
    read = read_photo(photo)
    pixels = read.width * read.height
    with serve("--max-bytes-in-flight", str(2 * (len(photo) + pixels))) as server:
        alone = httpx.post(f"{server.url}/segment/json", content=photo, params=WHOLE)
        assert_problem(alone, 429, "memory")
        form = [("file", ("a.jpg", photo)), ("file", ("b.jpg", photo))]
        many = httpx.post(f"{server.url}/segment/batch/json", files=form, params=WHOLE)
        assert [item["status"] for item in many.json()] == [429, 429]
        # What was refused, or sent, is no longer held.
        for _ in range(3):
            wanted = {"mask": "probabilities"}
            found = httpx.post(f"{server.url}/segment/json", content=photo, params=wanted)
            assert found.status_code == 200
        figures = httpx.get(f"{server.url}/metrics").text
        assert "\nslsnet_bytes_in_flight 0.0" in figures
    with serve("--max-bytes-in-flight", str(2 * (2 * len(photo) + 3 * pixels))) as server:
        for _ in range(3):
            many = httpx.post(f"{server.url}/segment/batch/json", files=form, params=WHOLE)
            assert [item["status"] for item in many.json()] == [200, 200]
            found = httpx.post(f"{server.url}/segment/json", content=photo, params=WHOLE)
            assert found.status_code == 200
