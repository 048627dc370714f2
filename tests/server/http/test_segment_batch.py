"""POST /segment/batch: each photo is answered for itself, soon, and in nobody's way."""

import base64
import email
import json
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import numpy as np
import pytest

from photos.image import encode_png, read_photo
from tests.support.answers import figures, post, read_png
from tests.support.held import digest, run_photos, serve_held
from tests.support.launch import ServerProcess, serve
from tests.support.lesions import drawn_photo
from tests.support.offline import Offline
from tests.support.samples import Sample
from tests.support.waiting import until

Form = list[tuple[str, tuple[str, bytes]]]


def form(*fields: tuple[str, bytes]) -> Form:
    return [(name, ("secret-patient.jpg", data)) for name, data in fields]


def send(server: ServerProcess, files: Form, **options: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/segment/batch", files=files, timeout=60, **options)


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    """In the photos' order."""
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    answers = [json.loads(line) for line in response.text.splitlines()]
    return sorted(answers, key=lambda answer: int(answer["index"]))


def decode_rle(rle: dict[str, Any]) -> int:
    """Pixels of the lesion."""
    runs: list[int] = []
    value = shift = 0
    for character in rle["counts"].encode():
        group = character - 48
        value |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:
            if group & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return sum(runs[1::2])


def test_each_photo_gets_its_own_mask(
    server: ServerProcess, photos: list[Sample], offline: Offline
) -> None:
    response = send(
        server,
        form(*((f"lesion {index}", photo.data) for index, photo in enumerate(photos))),
        params={"threshold": "0.3", "mask": "rle"},
    )
    answers = lines(response)
    assert [answer["index"] for answer in answers] == list(range(len(photos)))
    assert "secret-patient" not in response.text
    for photo, answer in zip(photos, answers, strict=True):
        assert (answer["name"], answer["status"]) == (f"lesion {answer['index']}", 200)
        result = answer["result"]
        assert result["request_id"] == response.headers["x-request-id"]
        assert {"decode", "queue", "infer"} <= set(result["timings_ms"])
        expected = offline.mask(photo.data, 0.3)
        assert result["mask"]["rle"]["size"] == list(expected.shape)
        # Sums of a float32 network differ by batch size in the last digits.
        assert abs(result["lesion"]["area"] - int(expected.sum())) <= 2
        assert decode_rle(result["mask"]["rle"]) == result["lesion"]["area"]


@pytest.mark.parametrize("accept", ["application/x-ndjson", "multipart/mixed"])
def test_clean_holds_for_each_photo(server: ServerProcess, two_lesions: bytes, accept: str) -> None:
    alone = post(server, two_lesions, params={"clean": "true"}).content
    response = send(
        server,
        form(("a", two_lesions)),
        params={"clean": "true"},
        headers={"Accept": accept},
    )
    if accept == "multipart/mixed":
        assert alone in response.content
    else:
        (answer,) = lines(response)
        assert base64.b64decode(answer["result"]["mask"]["png"]) == alone


def test_answers_as_multipart_mixed(
    server: ServerProcess, photos: list[Sample], offline: Offline
) -> None:
    fields = [("ärm", photos[0].data), ("bad", b"nonsense"), ("", photos[1].data)]
    response = send(server, form(*fields), headers={"Accept": "multipart/mixed"})
    assert response.status_code == 200
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    whole = email.message_from_bytes(head + response.content)
    payload = whole.get_payload()
    assert isinstance(payload, list)
    parts = [part for part in payload if isinstance(part, Message)]
    parts.sort(key=lambda part: int(part["Item-Index"]))
    assert [unquote(part["Item-Name"]) for part in parts] == ["ärm", "bad", ""]
    assert [part["Item-Status"] for part in parts] == ["200", "415", "200"]
    assert [part.get_content_type() for part in parts] == [
        "image/png",
        "application/problem+json",
        "image/png",
    ]
    for part, photo in [(parts[0], photos[0]), (parts[2], photos[1])]:
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes) and len(content) == int(part["Content-Length"])
        assert (read_png(content) != offline.mask(photo.data)).mean() < 1e-3
    problem = json.loads(str(parts[1].get_payload()))
    assert problem["status"] == 415 and problem["instance"] == "/segment/batch"


@pytest.mark.usefixtures("small_networks")
def test_bad_photos_are_their_own_answers(photos: list[Sample]) -> None:
    good = photos[0].data
    with serve("--max-body-bytes", str(len(good)), "--max-pixels", "2000000") as server:
        bad = {
            "empty": (b"", 400),
            "long": (good + b"x", 413),
            "large": (encode_png(np.zeros((2000, 250), np.uint8), 2000, 2000), 413),
            "text": (b"Dear server", 415),
            "cut": (good[: len(good) // 2], 422),
        }
        fields = [(name, data) for name, (data, _) in bad.items()]
        answers = lines(send(server, form(("a", good), *fields, ("b", good))))
        assert [answer["status"] for answer in answers] == [
            200,
            *(status for _, status in bad.values()),
            200,
        ]
        for answer in answers[1:-1]:
            assert "result" not in answer
            assert answer["error"]["status"] == answer["status"]
            assert answer["error"]["detail"].endswith(".")
        assert answers[0]["result"]["mask"] == answers[-1]["result"]["mask"]
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'slsnet_bulk_photos_total{status="413"} 2.0' in metrics
        assert "slsnet_requests_in_flight 0.0" in metrics
        assert "slsnet_bytes_in_flight 0.0" in metrics


@pytest.mark.parametrize(
    ("content", "content_type", "status", "says"),
    [
        (b"\xff\xd8", "image/jpeg", 415, "multipart/form-data"),
        (b"", "multipart/form-data", 400, "boundary"),
        (b"", "multipart/form-data; boundary=b", 400, "malformed"),
        (b"--b--\r\n", "multipart/form-data; boundary=b", 400, "empty"),
        (b"", "", 400, "The request has no body"),
        (b"", "image/jpeg", 400, "The request has no body"),
        (b"--b\r\nContent-Dis", "multipart/form-data; boundary=b", 400, "malformed"),
    ],
)
def test_what_is_no_form_of_photos(
    server: ServerProcess, content: bytes, content_type: str, status: int, says: str
) -> None:
    response = httpx.post(
        f"{server.url}/segment/batch", content=content, headers={"Content-Type": content_type}
    )
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert says in response.json()["detail"]


@pytest.mark.usefixtures("small_networks")
def test_limits_of_the_whole_request(photos: list[Sample]) -> None:
    good = photos[0].data
    limit = len(good) * 3
    with serve("--bulk-max-photos", "3", "--bulk-max-bytes", str(limit)) as server:
        for files, says in [
            (form(*[("a", b"x")] * 4), "the 3 photos"),
            (form(*[("a", good)] * 3), f"{limit} bytes"),
        ]:
            response = send(server, files)
            assert response.status_code == 413
            assert says in response.json()["detail"]
        assert len(lines(send(server, form(*[("a", good)] * 2)))) == 2


@pytest.mark.usefixtures("small_networks")
def test_photos_whose_turn_does_not_come_in_time_say_so(tmp_path: Path) -> None:
    # Many that are quickly there: only then each has an answer of its own.
    files = form(*[("a", drawn_photo(3, 96, 80))] * 200)
    with serve_held(tmp_path) as (server, hold), hold():
        answers = lines(send(server, files, headers={"X-Request-Timeout-Ms": "4000"}))
    assert len(answers) == 200
    assert {answer["status"] for answer in answers} == {504}
    assert "deadline of 4000 ms" in answers[-1]["error"]["detail"]


@pytest.mark.usefixtures("small_networks")
def test_interactive_photos_go_before_those_of_a_batch(
    tmp_path: Path, photos: list[Sample]
) -> None:
    count = 24
    # The network is given one photo that it is not given otherwise.
    first, *others = photos
    files = form(*(("a", others[index % len(others)].data) for index in range(count)))

    def waiting(priority: str) -> float:
        return figures(server, priority=priority)["slsnet_queue_depth"]

    with serve_held(tmp_path) as (server, hold), ThreadPoolExecutor(2) as clients:
        with hold():
            batch = clients.submit(send, server, files)
            until(lambda: waiting("bulk") >= 1)
            interactive = clients.submit(post, server, first.data)
            until(lambda: waiting("interactive") == 1)
        interactive.result()
        assert len(lines(batch.result())) == count
    # It waits for those that the network has already, and for no other.
    order = run_photos(tmp_path)[-(count + 1) :]
    assert order.index(digest(read_photo(first.data).pixels)) < count / 2


@pytest.mark.usefixtures("small_networks")
def test_bulk_leaves_half_of_the_queue_to_others(tmp_path: Path, photos: list[Sample]) -> None:
    photo = photos[0].data
    flags = ("--max-queue", "2")
    with serve_held(tmp_path, *flags) as (server, hold), ThreadPoolExecutor(2) as clients:
        url = f"{server.url}/segment"

        def in_flight(count: int) -> None:
            until(lambda: figures(server)["slsnet_requests_in_flight"] == count)

        with hold():
            batch = clients.submit(send, server, form(("a", photo)))
            in_flight(1)
            bulk = httpx.post(url, content=photo, headers={"Priority": "bulk"})
            assert bulk.status_code == 429
            assert "queue is full" in bulk.json()["detail"]
            assert send(server, form(("a", photo))).status_code == 429
            alone = clients.submit(httpx.post, url, content=photo)
            in_flight(2)
        assert batch.result().status_code == alone.result().status_code == 200


def test_photos_of_who_hung_up_are_not_run(server: ServerProcess) -> None:
    photo = drawn_photo(3, 600, 450)
    before = figures(server)["slsnet_batch_size_sum"]
    count = 200
    files = form(*[("a", photo)] * count)
    with httpx.stream("POST", f"{server.url}/segment/batch", files=files, timeout=60) as response:
        next(response.iter_lines())
    until(lambda: figures(server)["slsnet_requests_in_flight"] == 0)
    assert figures(server)["slsnet_batch_size_sum"] - before < count / 2
    assert figures(server)["slsnet_bytes_in_flight"] == 0
    assert "never retrieved" not in server.log()


def test_polygons_and_size_are_those_of_segment(
    server: ServerProcess, photos: list[Sample]
) -> None:
    options = {"size": "model", "mask": "polygons"}
    alone = httpx.post(
        f"{server.url}/segment",
        content=photos[0].data,
        params={**options, "format": "json"},
        timeout=600,
    ).json()
    (answer,) = lines(send(server, form(("a", photos[0].data)), params=options))
    for member in ("image", "lesion", "mask", "model", "threshold"):
        assert answer["result"][member] == alone[member]
