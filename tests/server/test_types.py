"""Types of a body: its bytes decide, and what cannot be read is told by its cause."""

import json

import httpx
import pytest

from tests.support.answers import assert_problem
from tests.support.launch import ServerProcess
from tests.support.samples import Sample

_INFER = "/v2/models/slsnet/infer"


@pytest.mark.parametrize(
    "kind",
    [
        *("image/*", "image/tif", "image/x-tiff", "image/jpg", "image/heic", "IMAGE/JPEG; q=1"),
        *("application/x-image", "binary/octet-stream", "application/octet-stream", "*/*", ""),
        *("application/binary", "image/gif"),
    ],
)
def test_the_bytes_decide(server: ServerProcess, photos: list[Sample], kind: str) -> None:
    data = photos[0].data
    headers = {"Content-Type": kind}
    raw = httpx.post(f"{server.url}/segment", content=data, headers=headers)
    form = httpx.post(f"{server.url}/segment", files={"file": ("a", data, kind)})
    assert raw.status_code == form.status_code == 200, raw.text
    assert raw.content == form.content
    none = httpx.post(f"{server.url}/segment", content=b"GIF89a\1\0\1\0\0\0\0;", headers=headers)
    assert_problem(none, 415, "JPEG, PNG")


def test_no_type_at_all(server: ServerProcess, photos: list[Sample]) -> None:
    assert httpx.post(f"{server.url}/segment", content=photos[0].data).status_code == 200


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("multipart/form-data", ["boundary", "Do not set Content-Type yourself"]),
        ("multipart/form-data; boundary=", ["boundary", "Do not set Content-Type yourself"]),
        ("image/jpeg", ["is a form", "image/jpeg", "Do not set Content-Type yourself"]),
        ("", ["is a form", "missing"]),
    ],
)
@pytest.mark.parametrize("path", ["/segment", "/segment/batch"])
def test_a_form_that_is_not_told_apart(
    server: ServerProcess, photos: list[Sample], path: str, kind: str, words: list[str]
) -> None:
    form = httpx.Request("POST", server.url, files={"file": photos[0].data})
    response = httpx.post(
        server.url + path, content=form.read(), headers={"Content-Type": kind}, timeout=600
    )
    if path == "/segment/batch" and not kind.startswith("multipart"):
        assert_problem(response, 415, "multipart/form-data")
    else:
        assert_problem(response, 400, *words)


@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("value", [b"\0", b"\x80", b"[", b"{", b"a"])
def test_binary_tensors_without_the_length_of_their_json(
    server: ServerProcess, count: int, value: bytes
) -> None:
    size = count * 128 * 128 * 3
    tensor = {"name": "image", "shape": [count, 128, 128, 3], "datatype": "UINT8"}
    request = {"inputs": [{**tensor, "parameters": {"binary_data_size": size}}]}
    body = json.dumps(request).encode() + value * size
    response = httpx.post(server.url + _INFER, content=body, timeout=60)
    assert response.status_code == 400
    assert "Inference-Header-Content-Length is missing" in response.json()["error"]
