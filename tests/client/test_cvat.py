"""CVAT's auto-annotation function and its serverless form, against a real server."""

import base64
import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from slsnet_client import RequestRefused, nuclio
from tests.support import ROOT
from tests.support.launch import ServerProcess
from tests.support.lesions import drawn_photo, lesion_photo
from tests.support.offline import Offline

PHOTO = drawn_photo(2, 400, 300, "PNG")
PICTURE = Image.fromarray(lesion_photo(2, 400, 300).pixels)


def unpacked(points: list[float], width: int, height: int) -> NDArray[np.bool_]:
    """CVAT's mask: runs within a box, then the box, whose edges belong to it."""
    *runs, left, top, right, bottom = map(int, points)
    mask = np.zeros((height, width), np.bool_)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    mask[top : bottom + 1, left : right + 1] = flat.reshape(bottom + 1 - top, right + 1 - left)
    return mask


@pytest.fixture
def function(server: ServerProcess) -> Iterator[Callable[..., Any]]:
    pytest.importorskip("cvat_sdk", reason="needs cvat-sdk")
    from slsnet_client import cvat

    with contextlib.ExitStack() as made:

        def create(**options: Any) -> Any:
            return made.enter_context(contextlib.closing(cvat.create(server.url, **options)))

        yield create


def detected(found: Any, threshold: float | None = None) -> list[Any]:
    context = SimpleNamespace(frame_name="a.png", conf_threshold=threshold)
    return list(found.detect(context, PICTURE))


def test_a_frame_gets_the_mask_of_the_network(
    function: Callable[..., Any], offline: Offline
) -> None:
    lesions = function()
    (label,) = lesions.spec.labels
    assert (label.name, label.id, label.type) == ("lesion", 0, "mask")
    (shape,) = detected(lesions)
    assert (str(shape.type), shape.label_id, shape.frame) == ("mask", 0, 0)
    np.testing.assert_array_equal(unpacked(shape.points, 400, 300), offline.mask(PHOTO))
    (tighter,) = detected(lesions, 0.9)
    expected = offline.mask(PHOTO, 0.9)
    np.testing.assert_array_equal(unpacked(tighter.points, 400, 300), expected)
    assert detected(lesions, 1.0) == []


def test_a_frame_gets_polygons(function: Callable[..., Any]) -> None:
    lesions = function(shape="polygon", label="Nevus", clean=True)
    assert lesions.spec.labels[0].name == "Nevus"
    (shape,) = detected(lesions)
    assert str(shape.type) == "polygon" and len(shape.points) >= 6
    points = np.array(shape.points).reshape(-1, 2)
    assert (points >= 0).all() and (points <= (400, 300)).all()


def test_a_shape_that_does_not_exist_is_told(function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="mask or polygon"):
        function(shape="circle")


def test_what_the_server_refuses_is_told(function: Callable[..., Any]) -> None:
    lesions = function(threshold=3)
    with pytest.raises(RequestRefused, match="threshold"):
        detected(lesions)


@pytest.fixture
def context(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    sdk = pytest.importorskip("nuclio_sdk", reason="needs nuclio-sdk")
    monkeypatch.setenv("SLSNET_URL", server.url)
    made = sdk.Context(logging.getLogger("nuclio"), None)
    nuclio.init_context(made)
    yield made
    made.user_data.client.close()


def called(context: Any, body: Any) -> Any:
    sdk = pytest.importorskip("nuclio_sdk")
    answer = nuclio.handler(context, sdk.Event(body=body, content_type="application/json"))
    return answer.status_code, json.loads(answer.body)


def test_the_serverless_form_answers_as_cvat_reads(context: Any, offline: Offline) -> None:
    image = base64.b64encode(PHOTO).decode()
    status, (shape,) = called(context, {"image": image, "threshold": 0.4})
    assert status == 200 and (shape["label"], shape["type"]) == ("lesion", "mask")
    *pixels, left, top, right, bottom = shape["mask"]
    mask = np.zeros((300, 400), np.bool_)
    size = bottom + 1 - top, right + 1 - left
    mask[top : bottom + 1, left : right + 1] = np.array(pixels).reshape(size)
    np.testing.assert_array_equal(mask, offline.mask(PHOTO, 0.4))
    assert len(shape["points"]) >= 6 and 0.4 < float(shape["confidence"]) <= 1
    assert called(context, {"image": image, "threshold": 1}) == (200, [])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"bytes", "no image"),
        ({}, "no image"),
        ({"image": "***"}, "malformed"),
        ({"image": "aaaa", "threshold": [1]}, "malformed"),
        ({"image": base64.b64encode(b"no photo").decode()}, "not an image"),
    ],
)
def test_the_serverless_form_says_what_is_wrong(context: Any, body: Any, words: str) -> None:
    status, answer = called(context, body)
    assert status == 422 and words in answer["error"]


def test_the_function_that_is_deployed_exists() -> None:
    manifest = yaml.safe_load((ROOT / "client/nuclio/function.yaml").read_text(encoding="utf-8"))
    module, _, name = manifest["spec"]["handler"].partition(":")
    assert module == nuclio.__name__ and hasattr(nuclio, name)
    (label,) = json.loads(manifest["metadata"]["annotations"]["spec"])
    # Private: nuclio asks for two functions, and nothing else.
    assert label["name"] == nuclio._LABEL
    (command,) = manifest["spec"]["build"]["directives"]["preCopy"]
    project = (ROOT / "client/pyproject.toml").read_text(encoding="utf-8")
    dependencies = project.split("dependencies = [")[1].split("]")[0].replace(", ", " ")
    assert dependencies in command["value"], "what the client needs is installed there"
    assert Path(ROOT / "client/nuclio/function.yaml").read_text().startswith("#")
