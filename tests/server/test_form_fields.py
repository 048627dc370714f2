"""Parameters as fields of the form mean what they mean in the query, on every path with a form."""

from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.support.answers import assert_problem
from tests.support.launch import ServerProcess
from tests.support.samples import Sample

Fields = dict[str, Any]


def post(server: ServerProcess, path: str, photo: bytes, **options: Any) -> httpx.Response:
    return httpx.post(server.url + path, files={"file": ("a.jpg", photo)}, timeout=60, **options)


@pytest.mark.parametrize(
    "fields",
    [
        {"threshold": "0.9"},
        {"size": "model"},
        {"clean": "true"},
        {"format": "json"},
        {"mask": "rle"},
        {"threshold": "0.9", "mask": "polygons", "clean": "1", "size": "model"},
    ],
)
def test_fields_are_the_querys_parameters(
    server: ServerProcess, photos: list[Sample], fields: Fields
) -> None:
    data = photos[0].data
    by_form = post(server, "/segment", data, data=fields)
    by_query = post(server, "/segment", data, params=fields)
    assert by_form.status_code == by_query.status_code == 200
    assert by_form.headers["content-type"] == by_query.headers["content-type"]
    assert what_matters(by_form) == what_matters(by_query)


def what_matters(response: httpx.Response) -> Any:
    """Without what differs from one request to the next."""
    if response.headers["content-type"] == "image/png":
        return response.content
    line: dict[str, Any] = response.json()
    answer = line.get("result", line)
    return {key: answer[key] for key in answer if key not in ("request_id", "timings_ms")}


@pytest.mark.parametrize(
    "fields", [{"threshold": "0.9"}, {"mask": "rle"}, {"size": "model", "mask": "polygons"}]
)
def test_fields_hold_for_many_photos_too(
    server: ServerProcess, photos: list[Sample], fields: Fields
) -> None:
    data = photos[0].data
    by_form = post(server, "/segment/batch", data, data=fields)
    by_query = post(server, "/segment/batch", data, params=fields)
    assert len(by_form.text.splitlines()) == 1
    assert what_matters(by_form) == what_matters(by_query)


@pytest.mark.parametrize("path", ["/segment?format=json", "/segment/batch", "/segment/batch/json"])
def test_a_parameter_may_have_a_file_name(
    server: ServerProcess, photos: list[Sample], path: str
) -> None:
    files = {"file": ("a.jpg", photos[0].data), "threshold": ("threshold", b"0.9")}
    answer = httpx.post(server.url + path, files=files, timeout=60).json()
    if path == "/segment/batch/json":
        (answer,) = answer
    assert answer.get("result", answer)["threshold"] == 0.9


@pytest.mark.parametrize("path", ["/segment", "/segment/batch"])
@pytest.mark.parametrize(
    ("query", "fields", "words"),
    [
        ("", {"treshold": "0.9"}, ["'treshold'", "threshold, size, clean"]),
        ("", {"patient": "none"}, ["'patient'"]),
        ("", {"threshold": "2"}, ["form.threshold", "less than or equal to 1", "2"]),
        ("", {"threshold": "nan"}, ["form.threshold"]),
        ("", {"threshold": ""}, ["form.threshold"]),
        ("", {"mask": "gif"}, ["form.mask", "polygons"]),
        ("", {"clean": "perhaps", "size": "huge"}, ["form.clean", "form.size"]),
        ("", {"threshold": ["0.5", "0.6"]}, ["'threshold' comes more than once"]),
        ("?threshold=0.5", {"threshold": "0.9"}, ["threshold=0.5", "'0.9'", "once"]),
        ("?mask=png", {"mask": "rle"}, ["mask=png", "'rle'"]),
        ("", {"x-request-timeout-ms": "5"}, ["'x-request-timeout-ms'"]),
    ],
)
def test_422_fields_that_the_query_would_not_be_let_have(
    server: ServerProcess,
    photos: list[Sample],
    path: str,
    query: str,
    fields: Fields,
    words: list[str],
) -> None:
    assert_problem(post(server, path + query, photos[0].data, data=fields), 422, *words)


@pytest.mark.parametrize("path", ["/segment", "/segment/batch"])
def test_the_same_in_both_places_is_no_matter(
    server: ServerProcess, photos: list[Sample], path: str
) -> None:
    response = post(server, f"{path}?threshold=0.5", photos[0].data, data={"threshold": "0.50"})
    assert response.status_code == 200


def test_a_form_says_what_it_wants_in_spite_of_accept(
    server: ServerProcess, photos: list[Sample]
) -> None:
    data = photos[0].data
    nothing = {"Accept": "*/*;q=0"}
    assert post(server, "/segment", data, data={"format": "json"}, headers=nothing).json()
    assert_problem(post(server, "/segment", data, headers=nothing), 406, "Accept")
    fields = {"format": "png", "mask": "rle"}
    assert_problem(post(server, "/segment", data, data=fields), 422, "mask=rle", "image/png")


@pytest.mark.parametrize("accept", ["application/x-ndjson", "multipart/mixed"])
def test_file_names_come_back_if_asked(
    server: ServerProcess, photos: list[Sample], accept: str
) -> None:
    url, name = f"{server.url}/segment/batch", "linker Ärm\u2028.jpg"
    files = {"file": (name, photos[0].data)}
    plain = httpx.post(url, files=files, headers={"Accept": accept})
    asked = httpx.post(url, files=files, headers={"Accept": accept}, data={"file_names": "true"})
    if accept == "multipart/mixed":
        assert f"\r\nItem-File-Name: {quote(name)}\r\n".encode() in asked.content
        assert b"Item-File-Name" not in plain.content
    else:
        assert asked.json()["file_name"] == name
        assert "file_name" not in plain.json()


def test_a_form_without_photos_is_none(server: ServerProcess) -> None:
    form = {"threshold": (None, "0.5")}
    assert_problem(httpx.post(f"{server.url}/segment", files=form), 400, "'file'", "'threshold'")
    assert_problem(httpx.post(f"{server.url}/segment/batch", files=form), 400, "no photo")


def test_a_long_field_is_no_parameter(server: ServerProcess, photos: list[Sample]) -> None:
    fields = {"threshold": "0.5" + "0" * 5000}
    response = post(server, "/segment", photos[0].data, data=fields)
    assert_problem(response, 422, "'threshold'", "5003 bytes")
