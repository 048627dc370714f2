"""JSON that is allowed and seldom seen: never a failure of the server's, never a broken line."""

import json
from typing import Any

import httpx
import pytest

from tests.support.launch import ServerProcess
from tests.support.samples import Sample

_SHAPE = [1, 128, 128, 3]


def infer(server: ServerProcess, text: str | bytes) -> httpx.Response:
    return httpx.post(f"{server.url}/v2/models/slsnet/infer", content=text, timeout=60)


def request(**members: Any) -> str:
    data = [0] * (128 * 128 * 3)
    tensor = {"name": "image", "shape": _SHAPE, "datatype": "UINT8", "data": data}
    return json.dumps({"inputs": [tensor]} | members)


@pytest.mark.parametrize("timeout", [10**9, 10**18, 10**308, 10**400])
def test_any_timeout_is_one(server: ServerProcess, timeout: int) -> None:
    response = infer(server, request(parameters={"timeout": timeout}))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 400, "1e400", "9" * 5000])
@pytest.mark.parametrize(
    "text",
    [
        '{"parameters":{"timeout":%s},"inputs":[]}',
        '{"parameters":{"priority":%s},"inputs":[]}',
        '{"inputs":[{"name":"image","datatype":"UINT8","shape":[%s,128,128,3],"data":[1]}]}',
        '{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,%s,128,3],"data":[1]}]}',
        '{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,128,128,3],"data":[%s]}]}',
        '{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,128,128,3],'
        '"parameters":{"binary_data_size":%s}}]}',
    ],
)
def test_no_number_is_too_large_to_be_refused(
    server: ServerProcess, text: str, number: str
) -> None:
    response = infer(server, text % number)
    assert response.status_code in (400, 413), response.text
    assert len(response.json()["error"]) > 10


@pytest.mark.parametrize("half", [r"\ud800", r"\udfff", r"a\ud83d", r"\ude00\ud83d"])
@pytest.mark.parametrize(
    "text",
    [
        '{"id":"%s","inputs":[]}',
        '{"%s":1,"inputs":[]}',
        '{"inputs":[{"name":"%s","datatype":"UINT8","shape":[1,128,128,3],"data":[1]}]}',
        '{"inputs":[{"name":"image","datatype":"%s","shape":[1,128,128,3],"data":[1]}]}',
        '{"inputs":[],"outputs":[{"name":"%s"}]}',
    ],
)
def test_half_of_a_surrogate_pair_is_no_text(server: ServerProcess, text: str, half: str) -> None:
    response = infer(server, text % half)
    assert response.status_code == 400
    assert "not JSON" in response.json()["error"]
    whole = infer(server, request(id="x").replace('"x"', r'"\ud83d\ude00"'))
    assert whole.json()["id"] == "\N{GRINNING FACE}"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\n", "\r", "\v", "\x1c"])
@pytest.mark.parametrize("is_photo", [True, False])
def test_a_line_stays_one_whatever_the_name(
    server: ServerProcess, photos: list[Sample], separator: str, is_photo: bool
) -> None:
    name = f"a{separator}b é"
    escaped = name.replace("\n", "%0A").replace("\r", "%0D")
    form = (
        f'--b\r\nContent-Disposition: form-data; name="{escaped}"; filename="x"\r\n\r\n'.encode()
        + (photos[0].data if is_photo else b"no photo")
        + b"\r\n--b--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = httpx.post(f"{server.url}/segment/batch", content=form, headers=headers, timeout=60)
    if answer.status_code == 400:
        # Control characters are not allowed in a part's header.
        assert separator < " "
        return
    (line,) = answer.text.splitlines()
    assert json.loads(line)["name"].startswith("a")
    assert json.loads(line)["status"] == (200 if is_photo else 415)
