"""Preflights: a page that may come may send, and read, whatever is documented."""

import httpx
import pytest

from tests.support.launch import ServerProcess, serve

pytestmark = pytest.mark.usefixtures("small_networks")

_ORIGIN = "https://clinic.example"


def preflight(server: ServerProcess, headers: str = "", **more: str) -> httpx.Response:
    asked = {"Origin": _ORIGIN, "Access-Control-Request-Method": "POST", **more}
    if headers:
        asked["Access-Control-Request-Headers"] = headers
    return httpx.options(f"{server.url}/segment", headers=asked)


@pytest.mark.parametrize("private", [False, True])
def test_what_a_page_may_send_and_read(private: bool) -> None:
    flags = ("--cors-origins", _ORIGIN, "--cors-private-network", str(private))
    with serve(*flags) as server:
        document = httpx.get(f"{server.url}/openapi.json").json()
        operations = [one for path in document["paths"].values() for one in path.values()]
        sent = {
            parameter["name"]
            for operation in operations
            for parameter in operation["parameters"]
            if parameter["in"] == "header"
        }
        sent |= {"traceparent", "tracestate", "baggage", "authorization", "x-api-key"}
        sent |= {"content-type", "content-encoding", "accept"}
        answer = preflight(server, ", ".join(sorted(sent)))
        assert answer.status_code == 200, answer.text
        assert answer.headers["access-control-allow-origin"] == _ORIGIN
        assert preflight(server, "x-other").status_code == 400

        network = preflight(server, **{"Access-Control-Request-Private-Network": "true"})
        assert network.status_code == (200 if private else 400)
        allowed = network.headers.get("access-control-allow-private-network")
        assert allowed == ("true" if private else None)

        live = httpx.get(f"{server.url}/health/live", headers={"Origin": _ORIGIN})
        exposed = live.headers["access-control-expose-headers"].lower().split(", ")
        told = {
            header.lower()
            for operation in operations
            for response in operation["responses"].values()
            for header in response.get("headers", {})
        }
        assert told <= set(exposed)
