"""POST /segment: a photo in, its lesion's mask out, in every form that is offered."""

import base64
import itertools
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from photos.image import read_photo
from tests.support.answers import assert_problem, post, read_png
from tests.support.launch import ServerProcess, serve
from tests.support.lesions import drawn_photo, encode_photo, lesion_photo
from tests.support.offline import CPU_BACKEND, Offline
from tests.support.phones import FORMATS as PHONE_FORMATS
from tests.support.phones import encode_phone, needs
from tests.support.samples import Sample

Bits = NDArray[np.bool_]


def test_mask_has_the_photos_size_and_is_the_offline_prediction(
    server: ServerProcess, photos: list[Sample], offline: Offline
) -> None:
    for photo in photos:
        mask = read_png(post(server, photo.data).content)
        assert mask.shape == photo.mask.shape
        np.testing.assert_array_equal(mask, offline.mask(photo.data), photo.name)


def test_form_and_raw_body_get_the_same_answer(server: ServerProcess, photos: list[Sample]) -> None:
    data = photos[0].data
    form = post(server, data)
    for headers in ({"Content-Type": "image/jpeg"}, {"Content-Type": "application/octet-stream"}):
        raw = httpx.post(f"{server.url}/segment", content=data, headers=headers)
        assert raw.status_code == 200
        assert raw.content == form.content
    # In pieces of unknown total length, as a camera's stream comes.
    chunked = httpx.post(f"{server.url}/segment", content=iter([data[:100], data[100:]]))
    assert chunked.content == form.content


def test_a_file_name_may_be_in_any_charset(server: ServerProcess, photos: list[Sample]) -> None:
    for name in (b"l\xe4sion.jpg", "läsion.jpg".encode()):
        form = (
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n' % name
            + photos[0].data
            + b"\r\n--b--\r\n"
        )
        response = httpx.post(
            f"{server.url}/segment",
            content=form,
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        )
        assert response.content == post(server, photos[0].data).content


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_every_format_is_read(server: ServerProcess, image_format: str, offline: Offline) -> None:
    data = drawn_photo(1, 400, 300, image_format)
    np.testing.assert_array_equal(read_png(post(server, data).content), offline.mask(data))


@pytest.mark.parametrize("image_format", PHONE_FORMATS)
def test_phones_formats_are_read(
    server: ServerProcess, image_format: str, offline: Offline
) -> None:
    needs(image_format)
    data = encode_phone(lesion_photo(1, 400, 300).pixels, image_format)
    np.testing.assert_array_equal(read_png(post(server, data).content), offline.mask(data))
    drawn = post(server, data, params={"format": "overlay"})
    assert drawn.headers["content-type"] == "image/jpeg"


def test_a_server_without_the_decoder_says_what_to_do() -> None:
    start = (
        "import runpy, sys; sys.modules['pillow_heif'] = None;"
        "runpy.run_module('server', run_name='__main__')"
    )
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    with serve(command=("-c", start)) as server:
        answer = httpx.post(f"{server.url}/segment", content=heic)
    assert_problem(answer, 415, "HEIC", "requirements-heif.txt", "JPEG")


def test_mask_lies_as_the_photo_is_looked_at(server: ServerProcess) -> None:
    pixels = lesion_photo(2, 300, 200).pixels
    upright = read_png(post(server, encode_photo(pixels, "PNG")).content)
    turned = read_png(post(server, encode_photo(pixels, "PNG", orientation=6)).content)
    assert upright.shape == turned.shape == (200, 300)
    # The two squares differ by the rounding of the area average over differently laid pixels.
    assert (upright == turned).mean() > 0.99


def test_threshold_moves_the_border(
    server: ServerProcess, photos: list[Sample], offline: Offline
) -> None:
    data = photos[0].data
    masks = {
        threshold: read_png(post(server, data, params={"threshold": threshold}).content)
        for threshold in (0, 0.25, 0.75, 1)
    }
    for threshold, mask in masks.items():
        np.testing.assert_array_equal(mask, offline.mask(data, threshold))
    for lower, higher in itertools.pairwise(masks.values()):
        assert not (higher & ~lower).any()
    assert not masks[1].any()


def test_clean_leaves_the_largest_region_alone(server: ServerProcess, two_lesions: bytes) -> None:
    found = read_png(post(server, two_lesions).content)
    regions, count = ndimage.label(found)
    sizes = np.bincount(regions.ravel())[1:]
    assert count >= 2
    clean = read_png(post(server, two_lesions, params={"clean": "true"}).content)
    np.testing.assert_array_equal(clean, regions == 1 + sizes.argmax())
    answers = [
        post(server, two_lesions, params={"format": "json", "mask": "polygons", "clean": clean})
        for clean in ("false", "true")
    ]
    for answer, left, area in zip(answers, (count, 1), (found.sum(), clean.sum()), strict=True):
        body = answer.json()
        assert len(body["mask"]["polygons"]) == left
        assert body["lesion"]["area"] == area
        assert body["clean"] is (left == 1)


def test_size_model_gives_the_networks_own_resolution(
    server: ServerProcess, photos: list[Sample]
) -> None:
    mask = read_png(post(server, photos[0].data, params={"size": "model"}).content)
    assert mask.shape == (128, 128)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "image/png"),
        ("image/png", "image/png"),
        ("application/json", "application/json"),
        ("application/json;q=0.5, image/*", "image/png"),
        ("image/png;q=0.1, application/json;q=0.9", "application/json"),
        ("text/html", "image/png"),
        (";;,q=,", "image/png"),
        ("application/json;q=0.5, */*;q=0.5", "application/json"),
        ("*/*, application/json", "application/json"),
        ("*/*;q=0.9, application/json;q=0.1", "image/png"),
        ("image/png;q=0", "application/json"),
        ("image/png;q=0, */*", "application/json"),
        ("application/json;q=nan", "image/png"),
    ],
)
def test_accept_chooses_the_form(
    server: ServerProcess, photos: list[Sample], accept: str, kind: str
) -> None:
    response = post(server, photos[0].data, headers={"Accept": accept})
    assert response.headers["content-type"] == kind


def test_accept_may_come_in_several_headers(server: ServerProcess, photos: list[Sample]) -> None:
    headers = [("Accept", "image/png;q=0.5"), ("Accept", "application/json")]
    assert post(server, photos[0].data, headers=headers).json()["lesion"]["found"]


@pytest.mark.parametrize("accept", ["*/*", "application/json", "image/avif, */*;q=0.8"])
def test_a_mask_that_only_json_holds_asks_for_json(
    server: ServerProcess, photos: list[Sample], accept: str
) -> None:
    options: dict[str, Any] = {"params": {"mask": "rle"}, "headers": {"Accept": accept}}
    assert "rle" in post(server, photos[0].data, **options).json()["mask"]


def test_json_says_what_the_mask_shows(
    server: ServerProcess, photos: list[Sample], offline: Offline
) -> None:
    for photo in photos[:4]:
        answer = post(server, photo.data, params={"format": "json"}).json()
        expected = offline.mask(photo.data)
        height, width = expected.shape
        assert answer["image"] == {"width": width, "height": height, "orientation": 1}
        assert answer["mask"].keys() == {"format", "width", "height", "png"}
        np.testing.assert_array_equal(read_png(base64.b64decode(answer["mask"]["png"])), expected)
        lesion = answer["lesion"]
        assert lesion["area"] == expected.sum()
        assert lesion["area_fraction"] == pytest.approx(expected.mean(), rel=1e-3)
        rows, columns = np.nonzero(expected)
        assert lesion["found"] is (rows.size > 0)
        if rows.size:
            x, y, box_width, box_height = lesion["bounding_box"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + box_width - 1, y + box_height - 1) == (columns.max(), rows.max())
            assert lesion["centroid"] == pytest.approx(
                [columns.mean() + 0.5, rows.mean() + 0.5], abs=0.006
            )
            assert all(len(str(figure).split(".")[1]) <= 2 for figure in lesion["centroid"])
        assert len(f"{lesion['area_fraction']:e}".split("e")[0].rstrip("0")) <= len("2.564")


def test_json_without_a_lesion(server: ServerProcess, photos: list[Sample]) -> None:
    answer = post(server, photos[0].data, params={"format": "json", "threshold": 1}).json()
    assert 0 <= answer["lesion"].pop("max_probability") <= 1
    assert answer["lesion"] == {
        "found": False,
        "area": 0,
        "area_fraction": 0,
        "bounding_box": None,
        "centroid": None,
        "mean_probability": None,
    }


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_json_has_the_probabilities(
    server: ServerProcess, photos: list[Sample], offline: Offline, threshold: float
) -> None:
    for photo in photos[:3]:
        parameters: dict[str, Any] = {"format": "json", "threshold": threshold}
        lesion = post(server, photo.data, params=parameters).json()["lesion"]
        probability = offline.probability(read_photo(photo.data))
        assert lesion["max_probability"] == pytest.approx(probability.max(), abs=2e-4)
        inside = probability[probability > threshold]
        assert lesion["mean_probability"] == pytest.approx(inside.mean(), abs=2e-4)


def test_rle_is_cocos(server: ServerProcess, photos: list[Sample], offline: Offline) -> None:
    for photo in photos[:4]:
        answer = post(server, photo.data, params={"format": "json", "mask": "rle"}).json()
        assert answer["mask"].keys() == {"format", "width", "height", "rle"}
        np.testing.assert_array_equal(_from_rle(answer["mask"]["rle"]), offline.mask(photo.data))


def _from_rle(rle: dict[str, Any]) -> Bits:
    """`rleFrString` and `rleDecode` of cocoapi's maskApi.c."""
    runs: list[int] = []
    characters = iter(rle["counts"].encode())
    for first in characters:
        value, shift, group = 0, 0, first - 48
        while True:
            value |= (group & 0x1F) << shift
            shift += 5
            if not group & 0x20:
                break
            group = next(characters) - 48
        if group & 0x10:
            value |= -1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    height, width = rle["size"]
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def test_polygons_enclose_the_lesion(
    server: ServerProcess, photos: list[Sample], offline: Offline
) -> None:
    answer = post(server, photos[0].data, params={"format": "json", "mask": "polygons"}).json()
    assert answer["mask"].keys() == {"format", "width", "height", "polygons"}
    points = np.concatenate([np.array(rings[0]) for rings in answer["mask"]["polygons"]])
    x, y, width, height = answer["lesion"]["bounding_box"]
    # Pixels are in the mask by their centres, outlines run between these.
    assert points.min(axis=0) == pytest.approx([x, y], abs=1)
    assert points.max(axis=0) == pytest.approx([x + width, y + height], abs=1)


def test_every_answer_has_its_id_and_its_timing(
    server: ServerProcess, photos: list[Sample]
) -> None:
    mine = post(server, photos[0].data, headers={"X-Request-ID": "scan-17:left"})
    assert mine.headers["x-request-id"] == "scan-17:left"
    ours = post(server, photos[0].data, headers={"X-Request-ID": "<script>"})
    assert ours.headers["x-request-id"].isalnum()
    missing = httpx.get(f"{server.url}/nothing")
    assert missing.headers["x-request-id"] == missing.json()["request_id"]
    assert missing.headers["server-timing"].startswith("total;dur=")

    entries = [entry.split(";dur=") for entry in ours.headers["server-timing"].split(", ")]
    timing = dict(entry for entry in entries if len(entry) == 2)
    assert list(timing) == ["read", "decode", "queue", "infer", "encode", "total"]
    stages = sum(float(value) for name, value in timing.items() if name != "total")
    assert stages == pytest.approx(float(timing["total"]), rel=0.1, abs=5)


def test_model_card_is_the_files_own(server: ServerProcess, photos: list[Sample]) -> None:
    card = httpx.get(f"{server.url}/model").json()
    assert card["name"] == "slsnet"
    assert card["parameters"] == 2_347_900
    assert len(card["weights_sha256"]) == 64
    assert card["attention"] == "pooled"
    assert card["backend"]["name"] == CPU_BACKEND
    answer = post(server, photos[0].data, params={"format": "json"}).json()
    assert answer["model"] == {key: card[key] for key in answer["model"]}


def test_health(server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/health/live").json()["status"] == "live"
    ready = httpx.get(f"{server.url}/health/ready")
    assert ready.status_code == 200
    assert ready.json() == {"status": "ready", "backend": CPU_BACKEND}


def test_a_request_without_parameters_is_answered_as_one_that_brings_the_defaults(
    server: ServerProcess, photos: list[Sample]
) -> None:
    brief = httpx.post(f"{server.url}/segment", content=photos[0].data, timeout=60)
    full = httpx.post(
        f"{server.url}/segment?threshold=0.5&size=original",
        content=photos[0].data,
        headers={"X-Request-Timeout-Ms": "60000", "Priority": "u=3"},
        timeout=600,
    )
    assert brief.status_code == full.status_code == 200
    assert brief.content == full.content
    assert brief.headers["content-type"] == full.headers["content-type"] == "image/png"
