"""A picture that is no dermoscopic photo is told of with its mask, or refused if that is asked."""

import email
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from photos.fitness import Detector
from photos.image import read_photo
from server.backends import BackendError
from server.bulk.__main__ import main as bulk
from server.command.segment import main as segment
from server.http.app import create_app
from server.settings import Settings
from tests.support import MODEL
from tests.support.answers import assert_problem, figures
from tests.support.app import serve_app
from tests.support.launch import ServerProcess
from tests.support.lesions import drawn_photo, encode_photo
from tests.support.loading import load
from tests.support.results import table
from tests.support.waiting import until

DETECTOR = Detector.parse(MODEL.with_suffix(".fitness.json").read_bytes())
FIT = drawn_photo(3, 200, 150)
CAP = encode_photo(np.zeros((150, 200, 3), np.uint8), "PNG")
FILES = [("a", ("a.jpg", CAP)), ("b", ("b.jpg", FIT))]


def post(server: ServerProcess, path: str, **options: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", **options)


def header(photo: bytes) -> str:
    distance = DETECTOR.distance(read_photo(photo).pixels)
    return f"{'unfit' if distance > 1 else 'fit'};distance={distance:.3f}"


def test_the_mask_comes_with_a_warning(server: ServerProcess) -> None:
    assert header(FIT).startswith("fit") and header(CAP).startswith("unfit")
    for photo in (FIT, CAP):
        distance = DETECTOR.distance(read_photo(photo).pixels)
        for path in ("/segment/json", "/segment?format=json&mask=rle", "/segment?features=true"):
            answer = post(server, path, content=photo).raise_for_status().json()
            assert answer["fitness"] == {"distance": distance, "unfit": distance > 1}
        for path in ("/segment", "/segment?clean=true", "/segment?format=overlay"):
            answer = post(server, path, content=photo).raise_for_status()
            assert answer.headers["Photo-Fitness"] == header(photo)


def test_it_is_refused_where_that_is_asked(server: ServerProcess) -> None:
    for path in ("/segment", "/segment/json", "/segment?format=overlay"):
        path += f"{'&' if '?' in path else '?'}reject_unfit=true"
        assert post(server, path, content=FIT).status_code == 200
        refused = post(server, path, content=CAP)
        assert_problem(refused, 422, "no dermoscopic photo", "distance 5.29", "reject_unfit")
    form = {"files": {"file": ("a.png", CAP)}, "data": {"reject_unfit": "true"}}
    assert_problem(post(server, "/segment", **form), 422, "no dermoscopic photo")


def test_each_photo_of_a_batch_has_its_own(server: ServerProcess) -> None:
    lines = post(server, "/segment/batch?reject_unfit=true", files=FILES).text.splitlines()
    assert {x["index"]: x["status"] for x in map(json.loads, lines)} == {0: 422, 1: 200}
    mixed = post(server, "/segment/batch", files=FILES, headers={"Accept": "multipart/mixed"})
    message = email.message_from_bytes(
        f"Content-Type: {mixed.headers['content-type']}\r\n\r\n".encode() + mixed.content
    )
    said = {part["Item-Index"]: part["Photo-Fitness"] for part in message.walk()}
    assert (said["0"], said["1"]) == (header(CAP), header(FIT))


def test_unfit_photos_are_counted(server: ServerProcess) -> None:
    name = "slsnet_unfit_photos_total"
    before = figures(server).get(name, 0)
    post(server, "/segment", content=CAP).raise_for_status()
    post(server, "/segment?reject_unfit=true", content=CAP)
    post(server, "/segment", content=FIT).raise_for_status()
    assert figures(server)[name] == before + 2


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The shipped network alone, without its detector."""
    return Path(shutil.copy(MODEL, tmp_path / "alone.onnx"))


@pytest.fixture
def alone(model: Path) -> Iterator[httpx.Client]:
    app, _ = create_app(Settings(model=model, backend="onnxruntime", threads=1))
    with serve_app(app) as client:
        until(lambda: client.get("/health/ready").status_code == 200)
        yield client


def test_without_a_detector_nothing_is_said_and_nothing_promised(alone: httpx.Client) -> None:
    assert alone.post("/segment/json", content=CAP).raise_for_status().json()["fitness"] is None
    assert "Photo-Fitness" not in alone.post("/segment", content=CAP).raise_for_status().headers
    refused = alone.post("/segment?reject_unfit=true", content=FIT)
    assert_problem(refused, 422, "no detector", "reject_unfit")


def run(folder: Path, model: Path) -> str:
    """The column in the table of an archive."""
    (folder / "photos").mkdir()
    (folder / "photos/cap.png").write_bytes(CAP)
    where = [str(folder / "photos"), str(folder / "results"), "--model", str(model)]
    assert bulk([*where, "--threads", "1"]) == 0
    return str(table(folder / "results")["cap.png"]["fitness_distance"])


def test_archives_and_the_command_tell_of_it(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert float(run(tmp_path, MODEL)) == DETECTOR.distance(read_photo(CAP).pixels)
    (tmp_path / "fit.jpg").write_bytes(FIT)
    assert segment([str(tmp_path / "photos/cap.png"), str(tmp_path / "fit.jpg")]) == 0
    cap, fit = capsys.readouterr().out.splitlines()[-2:]
    assert "WARNING: likely no dermoscopic photo" in cap and "WARNING" not in fit
    (tmp_path / "without").mkdir()
    assert run(tmp_path / "without", model) == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"does not load .*alone\.fitness\.json"),
        (DETECTOR.document()[:-200], r"does not load .*alone\.fitness\.json"),
        (
            DETECTOR.document().replace(DETECTOR.weights_sha256.encode(), b"f00d" * 16),
            r"alone\.fitness\.json belongs to the weights f00d.*model\.fitness",
        ),
    ],
)
def test_a_detector_that_is_damaged_or_of_other_weights_is_refused_by_name(
    model: Path, content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model.with_suffix(".fitness.json").write_bytes(content)
    with pytest.raises(BackendError, match=said):
        load(model)
    with pytest.raises(SystemExit) as ended:
        segment(["a.jpg", "--model", str(model)])
    assert ended.value.code == 1 and "alone.fitness.json" in capsys.readouterr().err
