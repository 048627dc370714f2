"""GET /docs and /openapi.json: complete, and usable without the internet."""

import re

import httpx

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
    assert httpx.get(f"{server.url}/docs/../../etc/passwd").status_code == 404
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
    assert names == {"threshold", "size", "format", "mask", "x-request-timeout-ms", "priority"}
    assert all(parameter["description"] for parameter in segment["parameters"])
    for response in segment["responses"].values():
        assert {"X-Request-ID", "Server-Timing"} <= set(response["headers"])
