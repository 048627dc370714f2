"""Bad input: each kind gets its row of the status table, and the next good request is served."""

import asyncio
import gzip
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from photos.image import DEFAULT_MAX_PIXELS
from server.http import health
from server.http.answers import ProblemAnswer
from server.http.app import create_app
from server.http.errors import NotFound
from server.http.problems import told
from server.inference import errors
from server.settings import Settings
from tests.support.answers import assert_problem, figures
from tests.support.held import serve_held
from tests.support.launch import ServerProcess
from tests.support.lesions import encode_photo
from tests.support.samples import Sample
from tests.support.waiting import until
from tests.support.wire import connect

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.fixture
def good(server: ServerProcess, photos: list[Sample]) -> Iterator[Sample]:
    """A photo that is served, before and after whatever a test does to the server."""
    yield photos[0]
    response = httpx.post(f"{server.url}/segment", files={"file": photos[0].data})
    assert response.status_code == 200


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["no body", "curl -F file="]),
        ({"content": b""}, ["no body"]),
        ({"content": b"", "headers": {"Content-Type": "image/jpeg"}}, ["no body"]),
        ({"files": {"image": b"\xff\xd8\xff"}}, ["'file'", "It has 'image'"]),
        ({"files": [("file", b"a"), ("file", b"b")]}, ["2 fields 'file'", "one photo"]),
        ({"files": {"file": b""}}, ["'file' is empty"]),
        (
            {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
            ["boundary"],
        ),
        (
            {"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
            ["malformed"],
        ),
        (
            {
                "content": b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\ncut off',
                "headers": {"Content-Type": "multipart/form-data; boundary=b"},
            },
            ["malformed"],
        ),
        (
            {
                "content": b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
                "headers": {"Content-Type": "multipart/form-data; boundary=b"},
            },
            ["no field 'file'", "a field without a name"],
        ),
        (
            {"files": [(f"field{index}", b"x") for index in range(40)]},
            ["malformed"],
        ),
    ],
)
def test_400_no_image_in_the_request(
    server: ServerProcess, options: dict[str, Any], words: list[str]
) -> None:
    assert_problem(httpx.post(f"{server.url}/segment", **options), 400, *words)


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/json", "application/x-www-form-urlencoded", "video/mp4", "x"],
)
def test_415_a_body_that_is_no_image(server: ServerProcess, kind: str) -> None:
    response = httpx.post(
        f"{server.url}/segment", content=b"GIF89a", headers={"Content-Type": kind}
    )
    assert_problem(response, 415, kind, "image/jpeg", "multipart/form-data")


@pytest.mark.usefixtures("good")
def test_415_tells_curl_what_to_say(server: ServerProcess) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    response = httpx.post(f"{server.url}/segment", content=b"x", headers=headers)
    assert_problem(response, 415, "-H 'Content-Type: image/jpeg'")


@pytest.mark.parametrize("path", ["/segment", "/segment/batch"])
def test_415_a_compressed_body(server: ServerProcess, good: Sample, path: str) -> None:
    form = httpx.Request("POST", server.url, files={"file": good.data})
    response = httpx.post(
        server.url + path,
        content=gzip.compress(form.read()),
        headers={"Content-Type": form.headers["content-type"], "Content-Encoding": "gzip"},
    )
    assert_problem(response, 415, "gzip", "Send it without Content-Encoding")
    assert response.headers["accept-encoding"] == "identity"


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize("path", ["/segment", "/segment/batch"])
@pytest.mark.parametrize("accept", ["*/*;q=0", "image/*;q=0, multipart/*;q=0, application/*;q=0"])
def test_406_nothing_is_wanted(server: ServerProcess, path: str, accept: str) -> None:
    response = httpx.post(server.url + path, files={"file": b"x"}, headers={"Accept": accept})
    assert_problem(response, 406, "Accept", "json")


@pytest.mark.parametrize(
    ("query", "accept", "words"),
    [
        ("format=json", "*/*", ["query.format: Input should be 'dicom', got 'json'."]),
        ("answer=json", "*/*", ["no parameter 'answer'", "threshold, size, clean, ", ", mask, "]),
        ("mask=polygons", "multipart/mixed", ["mask=polygons", "multipart/mixed"]),
    ],
)
def test_422_a_parameter_that_many_photos_do_not_have(
    server: ServerProcess, good: Sample, query: str, accept: str, words: list[str]
) -> None:
    response = httpx.post(
        f"{server.url}/segment/batch?{query}",
        files={"file": good.data},
        headers={"Accept": accept},
    )
    assert_problem(response, 422, *words)


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize("data", [b"just some text", b"GIF89a\1\0\1\0\0\0\0;", bytes(1000)])
def test_415_an_image_that_is_none(server: ServerProcess, data: bytes) -> None:
    files = {"file": ("lesion.jpg", data, "image/jpeg")}
    assert_problem(httpx.post(f"{server.url}/segment", files=files), 415, "JPEG, PNG")
    raw = httpx.post(f"{server.url}/segment", content=data, headers={"Content-Type": "image/jpeg"})
    assert_problem(raw, 415, "JPEG, PNG")


@pytest.mark.parametrize("tenths", range(10))
def test_422_a_truncated_jpeg(server: ServerProcess, good: Sample, tenths: int) -> None:
    cut = good.data[: 4 + (len(good.data) - 8) * tenths // 10]
    response = httpx.post(f"{server.url}/segment", files={"file": cut})
    assert_problem(response, 422, "send the ")


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("threshold=2", ["threshold", "less than or equal to 1", "2"]),
        ("threshold=-0.1", ["threshold", "greater than or equal to 0"]),
        ("threshold=nan", ["threshold"]),
        ("threshold=half", ["threshold", "number"]),
        ("threshold=0.1_5", ["threshold: a number has no underscores, got '0.1_5'."]),
        ("frame=1_0", ["frame: a number has no underscores"]),
        ("size=huge", ["query.size: Input should be 'original' or 'model', got 'huge'."]),
        ("frame=x", ["query.frame: Input should be a valid integer", "got 'x'."]),
        ("format=gif", ["format", "png", "json"]),
        ("format=json&mask=gif", ["mask", "polygons"]),
        ("treshold=0.3", ["no parameter 'treshold'", "threshold, size, clean, ", ", format, "]),
        ("threshold=0.3&threshold=0.7", ["'threshold' comes more than once"]),
        ("format=png&mask=rle", ["mask=rle", "JSON", "image/png"]),
    ],
)
def test_422_a_parameter_out_of_range(server: ServerProcess, query: str, words: list[str]) -> None:
    response = httpx.post(f"{server.url}/segment?{query}", files={"file": b"x"})
    assert_problem(response, 422, *words)


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize("timeout", ["0", "-5", "soon", "nan", "2_000"])
def test_422_a_deadline_that_is_none(server: ServerProcess, timeout: str) -> None:
    response = httpx.post(
        f"{server.url}/segment",
        files={"file": b"x"},
        headers={"X-Request-Timeout-Ms": timeout},
    )
    assert_problem(response, 422, "x-request-timeout-ms")


def test_413_more_pixels_than_allowed(server: ServerProcess, good: Sample) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    response = httpx.post(f"{server.url}/segment", files={"file": bomb})
    assert_problem(response, 413, "2500000000 pixels", str(DEFAULT_MAX_PIXELS))

    large = encode_photo(np.zeros((8001, 8000, 3), np.uint8), "PNG")
    response = httpx.post(f"{server.url}/segment", files={"file": large}, timeout=60)
    assert_problem(response, 413, "8000×8001", str(DEFAULT_MAX_PIXELS), "smaller")


def test_413_more_bytes_than_allowed(server: ServerProcess, good: Sample) -> None:
    limit = Settings().max_body_bytes
    body = bytes(100 * 2**20)
    announced = httpx.post(
        f"{server.url}/segment", content=body, headers={"Content-Type": "image/png"}
    )
    assert_problem(announced, 413, str(limit), "smaller")
    form = httpx.post(f"{server.url}/segment", files={"file": body}, timeout=60)
    assert_problem(form, 413, str(limit), "smaller")
    pieces = (bytes(2**20) for _ in range(100))
    streamed = httpx.post(
        f"{server.url}/segment", content=pieces, headers={"Content-Type": "image/png"}, timeout=600
    )
    assert_problem(streamed, 413, str(limit), "smaller")


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_405_wrong_method(server: ServerProcess, method: str) -> None:
    response = httpx.request(method, f"{server.url}/segment")
    assert_problem(response, 405, method, "use POST")
    assert response.headers["allow"] == "POST"


@pytest.mark.usefixtures("good")
def test_404_nothing_there(server: ServerProcess) -> None:
    response = httpx.post(f"{server.url}/segmentation", files={"file": b"x"})
    assert_problem(response, 404, "/segmentation", "POST /segment")


def test_504_the_deadline_passed(server: ServerProcess, good: Sample) -> None:
    response = httpx.post(
        f"{server.url}/segment",
        files={"file": good.data},
        headers={"X-Request-Timeout-Ms": "0.01"},
    )
    assert_problem(response, 504, "0.01 ms", "X-Request-Timeout-Ms")


@pytest.mark.usefixtures("good")
def test_504_a_body_that_does_not_come(server: ServerProcess) -> None:
    head = (
        b"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
        b"X-Request-Timeout-Ms: 200\r\nContent-Length: 1000\r\n\r\n\xff\xd8\xff"
    )
    with connect(server) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 504 Gateway Timeout\r\n")


def test_429_more_requests_or_bytes_than_there_is_room_for(
    tmp_path: Path, photos: list[Sample]
) -> None:
    data = photos[0].data
    room = 2 * len(data)
    flags = ("--max-queue", "1", "--max-bytes-in-flight", str(room))
    with (
        serve_held(tmp_path, *flags) as (server, hold),
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(1) as other,
    ):
        too_many_bytes = client.post("/segment", content=bytes(room + 1))
        problem = assert_problem(too_many_bytes, 429, "memory")
        assert int(too_many_bytes.headers["retry-after"]) >= 1
        assert f"{too_many_bytes.headers['retry-after']} s" in problem["detail"]
        with hold():
            answer = other.submit(client.post, "/segment", content=data)
            until(lambda: figures(server)["slsnet_requests_in_flight"] == 1)
            refused = httpx.post(f"{server.url}/segment", content=data)
            assert_problem(refused, 429, "queue is full")
            assert int(refused.headers["retry-after"]) >= 1
        assert answer.result().status_code == 200
        assert client.post("/segment", content=data).status_code == 200


def test_500_is_answered_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a fault of the server's own")

    monkeypatch.setattr(health, "model_answer", broken)
    app, _ = create_app(Settings())

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get("/model")

    problem = assert_problem(asyncio.run(ask()), 500, "report the request_id")
    (failure,) = (record for record in caplog.records if record.exc_info)
    assert problem["request_id"] in failure.getMessage()
    assert "a fault of the server's own" in caplog.text
    assert "own" not in problem["detail"]


def test_problems_are_told_in_the_reference(server: ServerProcess) -> None:
    operation = httpx.get(f"{server.url}/openapi.json").json()["paths"]["/segment"]["post"]
    for status in ("400", "405", "406", "413", "415", "422", "429", "500", "503", "504"):
        content = operation["responses"][status]["content"]
        assert list(content) == ["application/problem+json"]
        example = content["application/problem+json"]["example"]
        assert example["status"] == int(status)
        assert len(example["detail"]) > 20
        assert example.keys() == ProblemAnswer.model_fields.keys()


BUSY = "The server is busy: "
QUEUE_FULL = errors.Overloaded(f"{BUSY}the queue is full.", 3, "queue_full")
LATE = errors.Overloaded(f"{BUSY}it takes longer than the request may take.", 2, "would_be_late")
LESS_BUSY = (
    "Send it again when the server is less busy, or allow more time with X-Request-Timeout-Ms."
)


TOLD: list[tuple[errors.Problem, int, str, str | None]] = [
    (QUEUE_FULL, 429, f"{BUSY}the queue is full. Try again in about 3 s (Retry-After).", "3"),
    (
        LATE,
        429,
        f"{BUSY}it takes longer than the request may take (X-Request-Timeout-Ms). Try again in"
        " about 2 s (Retry-After).",
        "2",
    ),
    (
        errors.Unavailable("It is being loaded."),
        503,
        "It is being loaded. Try again when GET /health/ready answers 200.",
        "1",
    ),
    (errors.GoingDown("It goes down."), 503, "It goes down.", "1"),
    (errors.DeadlineExceeded("It passed."), 504, f"It passed. {LESS_BUSY}", None),
    (
        errors.InferenceFailed("It failed."),
        500,
        "It failed. Trying again later may work; if it does not, report the request_id.",
        None,
    ),
    (errors.Problem("It failed."), 500, "It failed.", None),
    (errors.TooLarge("It is large."), 413, "It is large.", None),
    (errors.UnsupportedType("It is a GIF."), 415, "It is a GIF.", None),
    (errors.Unprocessable("It is cut."), 422, "It is cut.", None),
    (errors.UnknownNetwork("It has another name."), 404, "It has another name.", None),
    (NotFound("There is none."), 404, "There is none.", None),
]


@pytest.mark.parametrize(("problem", "status", "text", "retry_after"), TOLD)
def test_http_adds_status_and_advice_to_what_happened(
    problem: errors.Problem, status: int, text: str, retry_after: str | None
) -> None:
    said = told(problem)
    assert (said.status, said.detail) == (status, text)
    assert said.headers.get("Retry-After") == retry_after


def test_the_table_above_has_every_error_of_the_inference() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    problems = {kind for kind in kinds if issubclass(kind, errors.Problem)}
    assert problems <= {type(problem) for problem, *_ in TOLD}
