"""A dependency of the whole application, or of a router, holds on every route."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException

from server.http import app as app_module
from server.http.app import create_app
from server.http.context import RequestContext
from server.http.openinference.protocol import VERSION
from server.http.segment.route import add_segment
from server.inference.service import Service
from server.observe.metrics import Metrics
from server.settings import DEFAULT_NETWORK, Settings
from tests.support.backends import Constant
from tests.support.lesions import drawn_photo

CLOSED = 418
PHOTO = drawn_photo(1, 60, 40)
WARD = {"X-Ward": "7"}


async def only_ward_seven(x_ward: Annotated[str, Header()] = "") -> None:
    if x_ward != "7":
        raise HTTPException(CLOSED)


Ask = Callable[..., Awaitable[httpx.Response]]


def run(app: Any, scenario: Callable[[Ask], Awaitable[None]]) -> None:
    async def whole() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            await scenario(client.request)

    asyncio.run(whole())


async def routes(ask: Ask) -> list[tuple[str, str]]:
    """Method and path of every route that the document has, but those that need a key."""
    document = (await ask("GET", "/openapi.json", headers=WARD)).json()
    return [
        (method.upper(), path.format(model=DEFAULT_NETWORK, version=VERSION))
        for path, methods in document["paths"].items()
        for method in methods
        if not path.startswith(("/admin/", "/v2/repository/models/"))
    ]


def test_a_guard_of_the_application_holds_on_every_route(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = partial(FastAPI, dependencies=[Depends(only_ward_seven)])
    monkeypatch.setattr(app_module, "FastAPI", guarded)
    app, _ = create_app(Settings())

    async def scenario(ask: Ask) -> None:
        found = await routes(ask)
        assert ("POST", "/segment") in found
        for method, path in [*found, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/")]:
            for query in ("", "?threshold=0.4"):
                for body in (b"", PHOTO):
                    answer = await ask(method, path + query, content=body)
                    assert answer.status_code == CLOSED, (method, path, query)
            assert (await ask(method, path, headers=WARD)).status_code != CLOSED

    run(app, scenario)


def test_a_guard_of_a_router_holds_for_photos_with_and_without_parameters() -> None:
    service = Service(Settings(), Metrics())
    app = FastAPI()
    router = APIRouter(dependencies=[Depends(only_ward_seven)])
    add_segment(router, service)
    app.include_router(router)
    counted = RequestContext(app, service.metrics, lambda: False)

    async def scenario(ask: Ask) -> None:
        await service.use(Constant(0.5))
        for path in ("/segment", "/segment/json"):
            for query in ("", "?threshold=0.4"):
                for priority in ({}, {"Priority": "bulk"}):
                    url = path + query
                    refused = await ask("POST", url, content=PHOTO, headers=priority)
                    assert refused.status_code == CLOSED
                    served = await ask("POST", url, content=PHOTO, headers={**priority, **WARD})
                    assert served.status_code == 200
        await service.close()

    run(counted, scenario)
