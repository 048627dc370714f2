"""The table of routes that take a place holds for every route that the application has."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import httpx
import pytest
from uvicorn._types import HTTPScope

from server.http.admitted import ADMITTED
from server.http.app import create_app
from server.http.openinference.protocol import VERSION
from server.http.shedding import Door
from server.inference.service import Service
from server.settings import DEFAULT_NETWORK, Settings
from tests.support.backends import Constant

Ask = Callable[[str, str, dict[str, str]], Awaitable[httpx.Response]]


def run(scenario: Callable[[Service, Ask], Awaitable[None]]) -> None:
    """Run with the application, asked past its connections, so that no `Door` is there."""

    async def whole() -> None:
        app, service = create_app(Settings(max_queue=2))
        await service.use(Constant(0.5))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:

            async def ask(method: str, path: str, headers: dict[str, str]) -> httpx.Response:
                return await client.request(method, path, headers=headers)

            await scenario(service, ask)
        await service.close()

    asyncio.run(whole())


async def posted_paths(ask: Ask) -> list[str]:
    """The paths of all routes that take POST."""
    document = (await ask("GET", "/openapi.json", {})).json()
    return [
        path.format(model=DEFAULT_NETWORK, version=VERSION)
        for path, methods in document["paths"].items()
        if "post" in methods
    ]


def is_refused_at_the_door(service: Service, path: str, headers: dict[str, str]) -> bool:
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope: Any = {"path": path, "method": "POST", "headers": pairs, "state": {}}
    return Door(service).refuses(cast(HTTPScope, scope)) is not None


@pytest.mark.parametrize("headers", [{}, {"Priority": "bulk"}])
@pytest.mark.parametrize(("taken", "bulk"), [(2, False), (1, True), (1, False)])
def test_the_door_refuses_what_the_routes_would_refuse(
    taken: int, bulk: bool, headers: dict[str, str]
) -> None:
    async def scenario(service: Service, ask: Ask) -> None:
        refused, at_the_door = set(), set()
        with service.gate.places(taken, bulk=bulk):
            for path in await posted_paths(ask):
                if (await ask("POST", path, headers)).status_code == 429:
                    refused.add(path)
                if is_refused_at_the_door(service, path, headers):
                    at_the_door.add(path)
        assert at_the_door == refused
        if taken == 2:
            assert refused == set(ADMITTED)

    run(scenario)


def test_each_is_counted_by_the_path_of_its_route() -> None:
    async def scenario(service: Service, ask: Ask) -> None:
        for path, route in ADMITTED.items():
            # Refused by the route itself, for its body.
            answer = await ask("POST", path, {"Content-Encoding": "br"})
            assert answer.status_code in (400, 415)
            (counted,) = service.metrics.requests.collect()
            assert any(
                sample.labels["path"] == route.path and sample.labels["status"] in ("400", "415")
                for sample in counted.samples
            )

    run(scenario)
