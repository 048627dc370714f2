"""Label Studio's ML backend, as a process that asks a real server for real masks."""

import base64
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from slsnet_client.label_studio import BadConfig, Control, Prompts, brush_rle
from tests.support import ROOT
from tests.support.launch import ServerProcess, free_port
from tests.support.lesions import drawn_photo, encode_photo, lesion_photo
from tests.support.offline import Offline
from tests.support.studio import Studio
from tests.support.waiting import until

BRUSH = """<View><Image name="photo" value="$image"/>
<BrushLabels name="mask" toName="photo"><Label value="Skin"/><Label value="Lesion"/></BrushLabels>
<RectangleLabels name="box" toName="photo" smart="true"><Label value="Lesion"/></RectangleLabels>
</View>"""
POLYGON = BRUSH.replace("BrushLabels", "PolygonLabels")

PHOTO = drawn_photo(2, 400, 300, "PNG")
KEY = "0123456789abcdef"


@dataclass
class Running:
    """The ML backend."""

    url: str
    log: Path
    studio: Studio

    def predict(self, *addresses: str, config: str = BRUSH, **params: Any) -> httpx.Response:
        body = {
            "tasks": [{"id": i, "data": {"image": each}} for i, each in enumerate(addresses)],
            "label_config": config,
            "project": "1.1",
            "params": params,
        }
        return httpx.post(f"{self.url}/predict", json=body)

    def one(self, address: str, **options: Any) -> list[dict[str, Any]]:
        (result,) = self.predict(address, **options).raise_for_status().json()["results"]
        regions: list[dict[str, Any]] = result["result"]
        return regions


@contextlib.contextmanager
def running(server: str, studio: Studio, *flags: str, **environment: str) -> Iterator[Running]:
    port = free_port()
    command = [
        *(sys.executable, "-m", "slsnet_client.label_studio", "--server", server),
        *("--label-studio", studio.url, "--port", str(port), *flags),
    ]
    own = {**os.environ, "PYTHONPATH": str(ROOT / "client"), "LABEL_STUDIO_API_KEY": KEY}
    with (
        tempfile.NamedTemporaryFile(suffix=".log") as log,
        subprocess.Popen(
            command, env={**own, **environment}, stdout=log, stderr=subprocess.STDOUT
        ) as process,
    ):
        backend = Running(f"http://127.0.0.1:{port}", Path(log.name), studio)

        def answers() -> bool:
            assert process.poll() is None, backend.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{backend.url}/health").status_code in (200, 401)
            return False

        until(answers)
        yield backend
        process.terminate()
        assert process.wait(60) in (0, -15)


@pytest.fixture(scope="module")
def studio(two_lesions: bytes) -> Iterator[Studio]:
    def guarded(photo: bytes) -> Any:
        def answer(headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
            known = headers.get("authorization") == f"Token {KEY}"
            return (200, {}, photo) if known else (401, {}, b"")

        return answer

    turned = encode_photo(lesion_photo(2, 400, 300).pixels, "JPEG", orientation=6)
    with Studio(
        {
            "/data/upload/1/lesion.png": guarded(PHOTO),
            "/data/upload/1/turned.jpg": guarded(turned),
            "/data/upload/1/two.png": guarded(two_lesions),
            "/data/upload/1/none.png": guarded(b"no photo"),
        }
    ) as found:
        yield found


@pytest.fixture(scope="module")
def backend(server: ServerProcess, studio: Studio) -> Iterator[Running]:
    with running(server.url, studio, "--allow-private") as found:
        yield found


def unpacked(rle: list[int], width: int, height: int) -> NDArray[np.bool_]:
    """As thi.ng/rle-pack reads it."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    at = 0

    def read(count: int) -> int:
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    total, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values: list[NDArray[np.uint8]] = []
    done = 0
    while done < total:
        is_run = read(1)
        length = 1 + read(sizes[read(2)])
        assert is_run
        values.append(np.full(length, read(word), np.uint8))
        done += length
    whole = np.concatenate(values).reshape(height, width, 4)
    assert (whole == whole[..., :1]).all()
    return np.asarray(whole[..., 3] == 255)


def mask_of(region: dict[str, Any]) -> NDArray[np.bool_]:
    return unpacked(region["value"]["rle"], region["original_width"], region["original_height"])


def test_it_is_up_and_says_which_network_answers(backend: Running) -> None:
    for path in ("/", "/health"):
        assert httpx.get(backend.url + path).json()["status"] == "UP"
    said = httpx.post(
        f"{backend.url}/setup",
        json={"project": "1.1", "schema": BRUSH, "hostname": "http://x", "access_token": "x"},
    ).json()
    assert said["model_version"].startswith("slsnet ")
    assert httpx.get(f"{backend.url}/versions").json()["versions"] == [said["model_version"]]
    for path in ("/train", "/webhook"):
        assert httpx.post(backend.url + path, json={"action": "x"}).status_code == 200


def test_a_brush_is_the_mask_of_the_network(backend: Running, offline: Offline) -> None:
    (region,) = backend.one("/data/upload/1/lesion.png")
    assert (region["from_name"], region["to_name"]) == ("mask", "photo")
    assert (region["type"], region["value"]["format"]) == ("brushlabels", "rle")
    assert region["value"]["brushlabels"] == ["Lesion"]
    assert (region["original_width"], region["original_height"]) == (400, 300)
    assert 0.5 < region["score"] <= 1
    np.testing.assert_array_equal(mask_of(region), offline.mask(PHOTO))


def test_label_studios_own_code_reads_the_brush(backend: Running, offline: Offline) -> None:
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="needs its SDK")
    (region,) = backend.one("/data/upload/1/lesion.png")
    pixels = brush.decode_rle(region["value"]["rle"]).reshape(300, 400, 4)
    np.testing.assert_array_equal(pixels[..., 3] > 0, offline.mask(PHOTO))


def test_polygons_are_in_percent(backend: Running, offline: Offline) -> None:
    regions = backend.one("/data/upload/1/lesion.png", config=POLYGON)
    canvas = Image.new("1", (400, 300))
    for region in regions:
        assert region["type"] == "polygonlabels" and region["value"]["closed"]
        assert region["value"]["polygonlabels"] == ["Lesion"]
        points = [(x * 4, y * 3) for x, y in region["value"]["points"]]
        ImageDraw.Draw(canvas).polygon(points, fill=1)
    drawn, mask = np.asarray(canvas), offline.mask(PHOTO)
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.97


def test_a_turned_photo_has_an_upright_mask(backend: Running) -> None:
    (region,) = backend.one("/data/upload/1/turned.jpg")
    assert (region["original_width"], region["original_height"]) == (400, 300)


def box(x: float, y: float, width: float, height: float, label: str = "Skin") -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, "rectanglelabels": [label]}
    return {"type": "rectanglelabels", "value": value}


def point(x: float, y: float, **more: Any) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": 1, "keypointlabels": ["Skin"]}
    return {"type": "keypointlabels", "value": value, **more}


@pytest.mark.parametrize("config", [BRUSH, POLYGON])
def test_a_box_looks_at_a_part_of_the_photo(backend: Running, config: str) -> None:
    # The small lesion is in the last third of the photo.
    context = {"result": [box(67, 10, 33, 80)]}
    regions = backend.one("/data/upload/1/two.png", config=config, context=context)
    assert len(regions) == 1
    (region,) = regions
    assert region["value"][region["type"]] == ["Skin"]
    width = region["original_width"]
    if config == BRUSH:
        columns = np.nonzero(mask_of(region).any(axis=0))[0]
    else:
        columns = np.array(region["value"]["points"])[:, 0] * width / 100
    assert columns.min() > 0.67 * width - 0.25 * 0.33 * width - 1
    assert columns.max() <= width


def test_points_look_at_their_surroundings(backend: Running, offline: Offline) -> None:
    photo = "/data/upload/1/two.png"
    (near,) = backend.one(photo, context={"result": [point(83, 50), point(5, 5, is_positive=0)]})
    columns = np.nonzero(mask_of(near).any(axis=0))[0]
    assert columns.min() >= (0.83 - 0.25) * near["original_width"] - 1
    # A point of what is not meant is no prompt.
    (whole,) = backend.one(photo, context={"result": [point(83, 50, is_positive=0)]})
    assert np.nonzero(mask_of(whole).any(axis=0))[0].min() < columns.min()


def test_what_is_wrong_with_a_task_is_its_own(backend: Running) -> None:
    inside = "data:image/png;base64," + base64.b64encode(PHOTO).decode()
    answer = backend.predict(
        "/data/upload/1/lesion.png", "/data/upload/1/none.png", "http://169.254.169.254/", inside
    )
    results = answer.raise_for_status().json()["results"]
    assert [len(result["result"]) for result in results] == [1, 0, 0, 1]
    assert "not an image" in results[1]["error"]
    assert "not among those that are allowed" in results[2]["error"]
    assert results[0]["model_version"].startswith("slsnet ")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://elsewhere.example/a.png", "allowed"),
        ("file:///etc/passwd", "http or https"),
        ("s3://bucket/key", "http or https"),
        ("/data/upload/1/gone.png", "404"),
        ("//169.254.169.254/latest", "allowed"),
        ("data:image/png,abc", "base64"),
        ("", "no address"),
    ],
)
def test_a_lone_task_that_fails_is_an_error(backend: Running, address: str, words: str) -> None:
    answer = backend.predict(address)
    assert answer.status_code == 502 and words in answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "content", "status", "words"),
    [
        ("/predict", b"{", 400, "JSON"),
        ("/predict", b"[]", 422, "object"),
        ("/predict", b"{}", 422, "tasks"),
        ("/predict", json.dumps({"tasks": [1], "label_config": "<View/>"}).encode(), 422, "Brush"),
        ("/setup", b'{"schema": "<View/>"}', 422, "BrushLabels"),
        ("/predict", b'"' + bytes(20_000_000) + b'"', 413, "bytes"),
        ("/predict", b"[" * 200_000, 400, "JSON"),
    ],
)
def test_malformed_requests_are_told(
    backend: Running, path: str, content: bytes, status: int, words: str
) -> None:
    answer = httpx.post(backend.url + path, content=content)
    assert answer.status_code == status and words in answer.json()["error"]


def test_odd_tasks_fail_alone(backend: Running) -> None:
    body = {"tasks": [None, {"id": 1}, {"data": 3}, {"data": {"image": 4}}], "label_config": BRUSH}
    assert httpx.post(f"{backend.url}/predict", json=body).status_code == 502
    assert httpx.post(f"{backend.url}/predict", json={**body, "tasks": []}).json() == {
        "results": []
    }


def test_a_private_label_studio_has_to_be_allowed(server: ServerProcess, studio: Studio) -> None:
    with running(server.url, studio, ML_BACKEND_USER="labels:word") as guarded:
        assert httpx.get(f"{guarded.url}/health").status_code == 401
        body = {"tasks": [{"data": {"image": "/data/upload/1/lesion.png"}}], "label_config": BRUSH}
        answer = httpx.post(f"{guarded.url}/predict", json=body, auth=("labels", "word"))
        assert answer.status_code == 502 and "--allow-private" in answer.json()["error"]


def test_no_address_and_no_key_is_logged(backend: Running) -> None:
    backend.predict("http://elsewhere.example/anna-smith.png?token=abc")
    log = backend.log.read_text()
    assert "task 0 has no prediction" in log
    assert "anna-smith" not in log and KEY not in log


def test_a_server_that_is_gone_is_told(studio: Studio) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    with running(gone, studio, "--allow-private") as backend:
        answer = httpx.post(f"{backend.url}/setup", json={"schema": BRUSH})
        assert answer.status_code == 502 and "not reached" in answer.json()["error"]


def test_a_personal_access_token_is_exchanged(server: ServerProcess) -> None:
    def photo(headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        known = headers.get("authorization") == "Bearer short-lived"
        return (200, {}, PHOTO) if known else (401, {}, b"")

    paths = {
        "/api/token/refresh": lambda _: (200, {}, b'{"access": "short-lived"}'),
        "/data/lesion.png": photo,
    }
    with (
        Studio(paths) as studio,
        running(
            server.url, studio, "--allow-private", LABEL_STUDIO_API_KEY="head.body.signature"
        ) as backend,
    ):
        for _ in range(2):
            assert len(backend.one("/data/lesion.png")) == 1
    assert [path for path, _ in studio.asked].count("/api/token/refresh") == 1


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((3, 5), np.bool_),
        np.ones((3, 5), np.bool_),
        np.ones((300, 400), np.bool_),
        np.random.default_rng(0).random((37, 53)) < 0.5,
    ],
)
def test_a_brush_of_any_mask(mask: NDArray[np.bool_]) -> None:
    assert np.array_equal(unpacked(brush_rle(mask), *mask.shape[::-1]), mask)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "<View>",
        "<View><Image name='i' value='$image'/></View>",
        "<View><Image name='i' value='https://x/y.png'/><BrushLabels name='m' toName='i'>"
        "<Label value='a'/></BrushLabels></View>",
        "<!DOCTYPE x [<!ENTITY a 'aaaa'>]><View>&a;</View>",
    ],
)
def test_an_interface_without_a_place_for_masks_is_refused(config: str) -> None:
    with pytest.raises(BadConfig):
        Control.of(config)


@pytest.mark.parametrize(
    "context",
    [
        None,
        3,
        {},
        {"result": 3},
        {"result": [3, {}, {"type": "rectanglelabels"}]},
        {"result": [{"type": "keypointlabels", "value": {"x": "a", "y": 1}}]},
    ],
)
def test_what_is_no_prompt_is_passed_over(context: Any) -> None:
    assert Prompts.of(context).crop is None
