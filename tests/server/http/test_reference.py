"""GET /docs and /openapi.json: complete, and usable without the internet."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from server.http.problems import PROBLEM_JSON
from server.keys import new_key
from tests.support.launch import ServerProcess, serve
from tests.support.wire import connect, read_all


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
        with connect(server) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 404 ")
    assert httpx.get(f"{server.url}/docs/favicon.png").status_code == 404


def test_document_is_complete(server: ServerProcess) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    models = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
    assert set(document["paths"]) == {
        "/v2",
        "/v2/repository/index",
        "/v2/repository/models/{model}/load",
        "/v2/repository/models/{model}/unload",
        "/v2/health/live",
        "/v2/health/ready",
        *(model + path for model in models for path in ("", "/ready", "/config", "/infer")),
        "/segment",
        "/segment/json",
        "/segment/batch",
        "/segment/batch/json",
        "/health/live",
        "/health/ready",
        "/model",
        "/metrics",
        "/admin/reload",
    }
    segment = document["paths"]["/segment"]["post"]
    assert set(segment["requestBody"]["content"]) == {
        "multipart/form-data",
        "application/dicom",
        "image/avif",
        "image/heic",
        "image/jpeg",
        "image/png",
        "image/webp",
        "image/tiff",
        "image/bmp",
        "application/octet-stream",
    }
    headers = {"x-request-timeout-ms", "priority", "X-Request-ID"}
    for path, types, names in (
        (
            "/segment",
            {"image/png", "application/octet-stream"},
            {"threshold", "size", "clean", "model", "reject_unfit", "frame"},
        ),
        (
            "/segment/json",
            {"application/json"},
            {
                *("threshold", "size", "clean", "model", "reject_unfit"),
                *("mask", "borders", "features", "frame"),
            },
        ),
    ):
        operation = document["paths"][path]["post"]
        assert set(operation["responses"]["200"]["content"]) == types
        assert {parameter["name"] for parameter in operation["parameters"]} == names | headers


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


def test_every_answer_is_described_with_an_example_that_fits(server: ServerProcess) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            responses = operation["responses"]
            # Keys, broken or slow HTTP, failures: they can meet any path.
            assert set(responses) >= {"200", "400", "408", "429", "431", "500", "503"}, path
            assert ("401" in responses) is not path.endswith(("/live", "/health/ready"))
            assert ("security" in operation) is ("401" in responses)
            for status, response in responses.items():
                assert response["content"]
                for media_type, content in response["content"].items():
                    if int(status) >= 400:
                        assert_described(document, path, status, media_type, content["example"])
                    elif content["schema"].get("format") != "binary":
                        assert re.search("'(examples?|const)'", str(resolved(document, content)))
            for parameter in operation["parameters"]:
                told = {"example", "examples", "default", "enum"}
                assert told & set(resolved(document, parameter) | parameter["schema"]), parameter
    assert set(document["components"]["securitySchemes"]) == {"bearer", "header", "basic"}


def resolved(document: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """With the schema that it refers to in its place."""
    schema = node["schema"]
    reference = schema.get("items", schema).get("$ref", "")
    named = document["components"]["schemas"].get(reference.rpartition("/")[2])
    return {**node, "schema": named or node["schema"]}


def assert_described(
    document: dict[str, Any], path: str, status: int | str, media_type: str, body: Any
) -> None:
    """The document has this answer of this path, and its schema lets this body be."""
    (operation,) = document["paths"][path].values()
    content = operation["responses"][str(status)]["content"][media_type]
    jsonschema_rs.validate(resolved(document, content)["schema"], body)


@pytest.mark.usefixtures("small_networks")
def test_refusals_are_as_described(tmp_path: Path) -> None:
    """Those that the tool which tries the document (`test_hostile_input.py`) has no way to get."""
    user, line = new_key("clinic")
    keys = tmp_path / "keys"
    keys.write_text(f"{line}\n{new_key('ops', 'admin')[1]}\n", encoding="utf-8")
    flags = ("--key-requests-per-s", "0.01", "--key-burst", "2", "--head-timeout-s", "5")
    with serve("--api-keys-file", str(keys), *flags) as server:
        client = httpx.Client(base_url=server.url, headers={"X-API-Key": user}, timeout=60)
        with client:
            document = client.get("/openapi.json").json()
            answers = [
                (path, httpx.request(method, server.url + path, timeout=60))
                for method, path in (("POST", "/segment"), ("GET", "/model"), ("GET", "/v2"))
            ]
            assert {answer.status_code for _, answer in answers} == {401}
            forbidden = client.post("/admin/reload")
            assert forbidden.status_code == 403
            answers.append(("/admin/reload", forbidden))
            # What is left of the burst.
            client.get("/model")
            for path in ("/model", "/v2"):
                limited = client.get(path)
                assert limited.status_code == 429
                answers.append((path, limited))
        for path, answer in answers:
            media_type = answer.headers["content-type"]
            assert_described(document, path, answer.status_code, media_type, answer.json())
        with contextlib.ExitStack() as stack:
            # All at once, since some take the whole time of a head.
            asked = []
            for path in ("/segment", "/health/live", "/v2"):
                for status, sent in (
                    (400, b"nonsense\r\n\r\n"),
                    (408, f"GET {path} HTTP/1.1\r\n".encode()),
                    (431, f"GET {path}?{40_000 * 'x'} HTTP/1.1\r\n\r\n".encode()),
                    (
                        501,
                        f"GET {path} HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n".encode(),
                    ),
                ):
                    connection = stack.enter_context(connect(server))
                    connection.sendall(sent)
                    asked.append((path, status, connection))
            for path, status, connection in asked:
                head, _, body = read_all(connection).partition(b"\r\n\r\n")
                assert head.startswith(f"HTTP/1.1 {status} ".encode())
                assert_described(document, path, status, PROBLEM_JSON, json.loads(body))


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


def test_every_path_is_counted_by_its_name(server: ServerProcess) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            httpx.request(method, server.url + path.format(model="slsnet", version="1"))
    figures = httpx.get(f"{server.url}/metrics").text
    counted = set(re.findall(r'slsnet_requests_total\{[^}]*path="([^"]*)"', figures))
    assert {"/openapi.json", "/v2/models/{model}/versions/{version}/infer"} <= counted
    # Without keys there is no administration.
    changes = {f"/v2/repository/models/{{model}}/{change}" for change in ("load", "unload")}
    assert set(document["paths"]) - counted == {"/admin/reload", *changes}
    assert all(path.startswith("/") or path == "other" for path in counted)


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
