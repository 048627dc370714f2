"""Clients that stock generators make of `/openapi.json` work, whatever is asked for."""

import base64
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.answers import read_png
from tests.support.launch import ServerProcess
from tests.support.samples import Sample

# The forms of JSON's mask, with the sizes that they can have.
ASKED = [
    {"mask": "png", "threshold": 0.9},
    {"mask": "png", "size": "model"},
    {"mask": "rle", "clean": True},
    {"mask": "polygons"},
    {"mask": "coco", "features": True},
    {"mask": "svg", "features": True},
    {"mask": "probabilities"},
    {"mask": "probabilities", "size": "original"},
]


def generate(server: ServerProcess, folder: Path, command: list[str]) -> None:
    document = folder / "openapi.json"
    document.write_bytes(httpx.get(f"{server.url}/openapi.json").content)
    result = subprocess.run(
        [arg.format(document) for arg in command],
        cwd=folder,
        # Both, and ruff, with which one formats, are beside Python.
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@contextmanager
def importable(folder: Path) -> Iterator[Callable[[str], Any]]:
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(folder))


def raw(server: ServerProcess, path: str, photo: bytes, asked: dict[str, Any]) -> Any:
    """What an ordinary client is answered, without what differs from one request to the next."""
    response = httpx.post(server.url + path, files={"file": ("a.jpg", photo)}, params=asked)
    assert response.status_code == 200
    return told(response.json())


def told(answer: Any) -> Any:
    if isinstance(answer, list):
        return [told(item) for item in sorted(answer, key=lambda item: int(item["index"]))]
    if "result" in answer:
        answer = answer | {"result": told(answer["result"])}
    if "mask" in answer:
        # A client may have the forms that were not asked for as null.
        mask = {name: value for name, value in answer["mask"].items() if value is not None}
        answer = answer | {"mask": mask}
    if "lesion" in answer and answer["lesion"].get("millimetres") is None:
        lesion = {name: v for name, v in answer["lesion"].items() if name != "millimetres"}
        answer = answer | {"lesion": lesion}
    answer = {
        name: value
        for name, value in answer.items()
        if value is not None or name not in ("borders", "features")
    }
    return {
        name: value for name, value in answer.items() if name not in ("request_id", "timings_ms")
    }


@pytest.fixture(scope="module")
def python_client(
    server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Any]]:
    """A client by openapi-python-client: gives its modules by their names."""
    folder = tmp_path_factory.mktemp("python-client")
    options = ("--path", "{}", "--meta", "none", "--output-path", "made_by_opc")
    generate(server, folder, ["openapi-python-client", "generate", *options])
    with importable(folder) as load:
        yield lambda name: load(f"made_by_opc.{name}" if name else "made_by_opc")


@pytest.fixture
def connection(server: ServerProcess, python_client: Callable[[str], Any]) -> Iterator[Any]:
    with python_client("").Client(server.url) as client:
        yield client


def file_of(client: Callable[[str], Any], photo: bytes, name: str = "a.jpg") -> Any:
    return client("types").File(io.BytesIO(photo), name, "image/jpeg")


def test_python_client_gets_masks(
    server: ServerProcess,
    python_client: Callable[[str], Any],
    connection: Any,
    photos: list[Sample],
) -> None:
    segment = python_client("api.segmentation.segment")
    form = python_client("models").SegmentFilesBody
    photo = photos[0].data
    expected = httpx.post(f"{server.url}/segment", content=photo).content
    for body in (file_of(python_client, photo), form(file_of(python_client, photo))):
        assert segment.sync(client=connection, body=body).payload.read() == expected
    found = segment.sync_detailed(client=connection, body=file_of(python_client, photo))
    assert found.status_code == 200
    read_png(found.content)
    refused = segment.sync_detailed(client=connection, body=file_of(python_client, b"nothing"))
    assert refused.status_code == 415
    assert isinstance(refused.parsed, python_client("models").ProblemAnswer)
    assert "not an image" in refused.parsed.detail


@pytest.mark.parametrize("asked", ASKED)
def test_python_client_gets_json(
    server: ServerProcess,
    python_client: Callable[[str], Any],
    connection: Any,
    photos: list[Sample],
    asked: dict[str, Any],
) -> None:
    models = python_client("models")
    typed = dict(asked)
    typed["mask"] = models.SegmentJsonMask(asked["mask"])
    if "size" in asked:
        typed["size"] = models.SegmentJsonSize(asked["size"])
    found = python_client("api.segmentation.segment_json").sync(
        client=connection,
        body=file_of(python_client, photos[0].data),
        **typed,
    )
    assert isinstance(found, models.SegmentationAnswer)
    assert told(found.to_dict()) == raw(server, "/segment/json", photos[0].data, asked)
    assert found.lesion.area > 0


def test_python_client_gets_answers_to_many(
    server: ServerProcess,
    python_client: Callable[[str], Any],
    connection: Any,
    photos: list[Sample],
) -> None:
    models = python_client("models")
    batch = [(photo.data, f"{photo.name}.jpg") for photo in photos[:3]] + [(b"nothing" * 99, "x")]

    def files() -> list[Any]:
        return [file_of(python_client, *photo) for photo in batch]

    by_json = python_client("api.segmentation.segment_batch_json").sync(
        client=connection,
        body=models.SegmentBatchJsonBody(file=files()),
        mask=models.SegmentBatchJsonMask.RLE,
        file_names=True,
    )
    assert {item.file_name: item.status for item in by_json} == {
        **{f"{photo.name}.jpg": 200 for photo in photos[:3]},
        "x": 415,
    }
    for item in by_json:
        assert (item.file_name == "x") is isinstance(item.error, models.ProblemAnswer)
        if item.status == 200:
            photo = photos[item.index].data
            assert told(item.result.to_dict()) == raw(
                server, "/segment/json", photo, {"mask": "rle"}
            )
    lines = python_client("api.segmentation.segment_batch").sync(
        client=connection, body=models.SegmentBatchBody(file=files())
    )
    answers = [json.loads(line) for line in lines.payload]
    assert sorted(answer["status"] for answer in answers) == [200, 200, 200, 415]


def test_python_client_gets_the_rest(
    server: ServerProcess,
    python_client: Callable[[str], Any],
    connection: Any,
    photos: list[Sample],
) -> None:

    def get(name: str) -> Any:
        return python_client(f"api.{name}").sync(client=connection)

    assert get("model.model").to_dict() == httpx.get(f"{server.url}/model").json()
    assert get("health.health_live").to_dict()["status"] == "live"
    assert get("health.health_ready").to_dict()["status"] == "ready"
    assert "slsnet_requests_total" in get("health.metrics")
    assert get("open_inference_protocol.v2").to_dict() == httpx.get(f"{server.url}/v2").json()


@pytest.fixture(scope="module")
def generator_client(
    server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A client by OpenAPI Generator, which is written in Java."""
    if shutil.which("java") is None:
        pytest.skip("needs java (apt-get install default-jre-headless)")
    folder = tmp_path_factory.mktemp("generator-client")
    options = ("-g", "python", "-i", "{}", "-o", ".", "--package-name", "made_by_generator")
    generate(server, folder, ["openapi-generator-cli", "generate", *options])
    with importable(folder) as load:
        yield load("made_by_generator")


def test_generator_client_gets_masks(
    server: ServerProcess, generator_client: Any, photos: list[Sample]
) -> None:
    with generator_client.ApiClient(generator_client.Configuration(server.url)) as connection:
        api = generator_client.SegmentationApi(connection)
        photo = photos[0].data
        assert api.segment(photo) == httpx.post(f"{server.url}/segment", content=photo).content
        with pytest.raises(generator_client.ApiException) as refused:
            api.segment(b"nothing")
        assert "not an image" in refused.value.data.detail


@pytest.mark.parametrize("asked", ASKED)
def test_generator_client_gets_json(
    server: ServerProcess, generator_client: Any, photos: list[Sample], asked: dict[str, Any]
) -> None:
    with generator_client.ApiClient(generator_client.Configuration(server.url)) as connection:
        found = generator_client.SegmentationApi(connection).segment_json(photos[0].data, **asked)
        assert isinstance(found, generator_client.SegmentationAnswer)
        expected = raw(server, "/segment/json", photos[0].data, asked)
        assert told(json.loads(found.to_json())) == expected


def test_generator_client_gets_answers_to_many(
    server: ServerProcess, generator_client: Any, photos: list[Sample]
) -> None:
    with generator_client.ApiClient(generator_client.Configuration(server.url)) as connection:
        api = generator_client.SegmentationApi(connection)
        batch = [(f"{photo.name}.jpg", photo.data) for photo in photos[:3]]
        found = api.segment_batch_json(file=batch, mask="rle", file_names=True)
        assert {item.file_name for item in found} == {name for name, _ in batch}
        for item in found:
            photo = photos[item.index].data
            expected = raw(server, "/segment/json", photo, {"mask": "rle"})
            assert told(json.loads(item.result.to_json())) == expected
        assert len(api.segment_batch(file=batch).splitlines()) == 3


def test_generator_client_gets_the_rest(server: ServerProcess, generator_client: Any) -> None:
    with generator_client.ApiClient(generator_client.Configuration(server.url)) as connection:
        model = generator_client.ModelApi(connection).model()
        assert json.loads(model.to_json()) == httpx.get(f"{server.url}/model").json()
        health = generator_client.HealthApi(connection)
        assert health.health_live().status == "live"
        assert health.health_ready().status == "ready"
        assert "slsnet_requests_total" in health.metrics()


def test_the_probabilities_of_a_generated_client_are_the_mask(
    server: ServerProcess,
    python_client: Callable[[str], Any],
    connection: Any,
    photos: list[Sample],
) -> None:
    models = python_client("models")
    photo = photos[0].data
    found = python_client("api.segmentation.segment_json").sync(
        client=connection,
        body=file_of(python_client, photo),
        mask=models.SegmentJsonMask.PROBABILITIES,
        size=models.SegmentJsonSize.ORIGINAL,
    )
    levels = np.frombuffer(base64.b64decode(found.mask.probabilities), "<u2")
    above = levels.reshape(found.image.height, found.image.width) > 0.5 * 65535
    mask = read_png(httpx.post(f"{server.url}/segment", content=photo).content)
    assert (above != mask).mean() < 1e-4
