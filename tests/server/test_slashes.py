"""A path with a slash too many is refused: a redirect would send photo and key somewhere else."""

import httpx
import pytest

from tests.support.launch import ServerProcess


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_nothing_is_redirected(server: ServerProcess, method: str) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    paths = [*document["paths"], "/docs", "/openapi.json", "/page/app.js", "/segment?threshold=0.3"]
    for path in paths:
        path, _, query = path.format(model="slsnet", version="1").partition("?")
        for end in ("/", "//"):
            url = f"{server.url}{path}{end}?{query}"
            response = httpx.request(method, url, follow_redirects=False)
            assert response.status_code == 404, url
            assert "location" not in response.headers


def test_404_says_which_path_was_meant(server: ServerProcess) -> None:
    photo = {"file": b"x"}
    detail = httpx.post(f"{server.url}/segment/", files=photo).json()["detail"]
    assert "try /segment." in detail
    assert "try /v2." in httpx.get(f"{server.url}/v2/").json()["error"]
    assert "slash" not in httpx.get(f"{server.url}/nothing").json()["detail"]
