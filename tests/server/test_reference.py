"""GET /docs and /openapi.json: complete, and usable without the internet."""

import re
import socket

import httpx
import pytest

from benchmarks.launch import ServerProcess


def test_page_needs_nothing_from_elsewhere(server: ServerProcess) -> None:
    page = httpx.get(f"{server.url}/docs")
    assert page.status_code == 200
    assert "http" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assets = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page.text)
    assert len(assets) == 3
    for asset in assets:
        response = httpx.get(f"{server.url}/{asset}")
        assert response.status_code == 200
        assert response.content
    start = httpx.get(f"{server.url}/docs/start.js").text
    assert "openapi.json" in start
    # The client must not tidy these up before they are sent.
    for path in ("/docs/../../../etc/passwd", "/docs/..%2f..%2f..%2fetc%2fpasswd"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 404 ")
    assert httpx.get(f"{server.url}/docs/favicon.png").status_code == 404


def test_document_is_complete(server: ServerProcess) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    models = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
    assert set(document["paths"]) == {
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        *(model + path for model in models for path in ("", "/ready", "/config", "/infer")),
        "/segment",
        "/segment/batch",
        "/health/live",
        "/health/ready",
        "/model",
        "/metrics",
    }
    segment = document["paths"]["/segment"]["post"]
    assert set(segment["requestBody"]["content"]) == {
        "multipart/form-data",
        "image/jpeg",
        "image/png",
        "image/webp",
        "image/tiff",
        "image/bmp",
        "application/octet-stream",
    }
    assert set(segment["responses"]["200"]["content"]) == {"image/png", "application/json"}
    names = {parameter["name"] for parameter in segment["parameters"]}
    assert names == {
        *("threshold", "size", "format", "mask"),
        *("x-request-timeout-ms", "priority", "X-Request-ID"),
    }


def test_every_path_tells_what_all_have(server: ServerProcess) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    ids = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            ids[method, path] = operation["operationId"]
            parameters = operation["parameters"]
            assert all(parameter["description"] for parameter in parameters)
            assert "X-Request-ID" in {parameter["name"] for parameter in parameters}
            for status, response in operation["responses"].items():
                assert {"X-Request-ID", "Server-Timing"} <= set(response["headers"]), (path, status)
            assert ("405" in operation["responses"]) is not path.startswith("/v2")
    # FastAPI's own form of 422 is never sent.
    assert "ValidationError" not in str(document)
    assert len(set(ids.values())) == len(ids)
    assert ids["post", "/segment"] == "segment"
    assert ids["get", "/health/ready"] == "health_ready"


def test_references_in_the_document_lead_somewhere(server: ServerProcess) -> None:
    response = httpx.get(f"{server.url}/openapi.json")
    document = response.json()
    references = set(re.findall(r'"\$ref":"#/([^"]+)"', response.text))
    assert "components/schemas/ProblemAnswer" in references
    for reference in references:
        node = document
        for key in reference.split("/"):
            node = node[key]
        assert node


def test_paths_of_the_reference_are_counted_by_name(server: ServerProcess) -> None:
    httpx.get(f"{server.url}/openapi.json")
    figures = httpx.get(f"{server.url}/metrics").text
    assert re.search(r'slsnet_requests_total\{[^}]*path="/openapi.json"', figures)


@pytest.mark.parametrize(
    "path", ["/health/live", "/health/ready", "/model", "/metrics", "/docs", "/openapi.json", "/v2"]
)
def test_head_is_get_without_the_body(server: ServerProcess, path: str) -> None:
    with httpx.Client(base_url=server.url) as client:
        get, head = client.get(path), client.head(path)
        # On the same connection: a body that was sent all the same would be taken for an answer.
        assert client.get("/health/live").json()["status"] == "live"
    assert (head.status_code, head.content) == (200, b"")
    assert set(head.headers) == set(get.headers)
    if path != "/metrics":
        assert head.headers["content-length"] == get.headers["content-length"]


def test_head_is_refused_where_get_is(server: ServerProcess) -> None:
    assert httpx.head(f"{server.url}/segment").status_code == 405
    assert httpx.head(f"{server.url}/nothing").status_code == 404
    refused = httpx.post(f"{server.url}/model")
    assert refused.status_code == 405
    assert refused.headers["allow"] == "GET, HEAD"
    assert "use GET, HEAD" in refused.json()["detail"]
