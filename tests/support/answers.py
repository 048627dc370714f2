"""What a server's answers say."""

from io import BytesIO
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.support.launch import ServerProcess


def assert_problem(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """An RFC 9457 document with this status, whose detail has these words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["type"] == "about:blank"
    assert problem["instance"] == httpx.URL(str(response.url)).path
    assert problem["request_id"] == response.headers["x-request-id"]
    for word in words:
        assert word in problem["detail"]
    return problem


def figures(server: ServerProcess, **labels: str) -> dict[str, float]:
    """The server's metrics, those of one name added up; or only those with these labels."""
    values: dict[str, float] = {}
    text = httpx.get(f"{server.url}/metrics", verify=server.trust or True).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if labels.items() <= sample.labels.items():
                values[sample.name] = values.get(sample.name, 0) + sample.value
    return values


def refused_connections(server: ServerProcess, reason: str) -> float:
    """How many it says that it refused for this reason."""
    return figures(server, reason=reason).get("slsnet_connections_refused_total", 0)


def read_png(data: bytes) -> NDArray[np.bool_]:
    image = Image.open(BytesIO(data))
    assert image.format == "PNG"
    assert image.mode == "1"
    return np.asarray(image)


def post(server: ServerProcess, data: bytes, **options: Any) -> httpx.Response:
    response = httpx.post(f"{server.url}/segment", files={"file": data}, timeout=60, **options)
    assert response.status_code == 200, response.text
    return response
