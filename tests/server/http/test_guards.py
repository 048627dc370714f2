"""A dependency of the whole application, or of a router, holds on every route."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message

from server.http import app as app_module
from server.http.app import create_app
from server.http.context import RequestContext
from server.http.openinference.protocol import VERSION
from server.http.segment.route import add_segment
from server.inference.service import Service
from server.keys import new_key
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


def routes(router: Any) -> Iterator[tuple[str, str]]:
    """Method and path of every route of an application or router; `WS` is that of a WebSocket."""
    for route in router.routes:
        if isinstance(route, WebSocketRoute):
            yield "WS", filled(route.path)
        elif isinstance(route, Route):
            yield from ((method, filled(route.path)) for method in route.methods or ())
        else:
            # A router that was included. Anything else has to be tried by this test, too.
            yield from routes(route.original_router)


def filled(path: str) -> str:
    """A path of the route; a parameter has a value that is known, or its own name."""
    known = {"model": DEFAULT_NETWORK, "version": VERSION}
    return re.sub(r"{(\w+)(?::path)?}", lambda found: known.get(found[1], found[1]), path)


async def handshake(app: ASGIApp, path: str, headers: dict[str, str]) -> Message:
    """The first message that answers a WebSocket."""
    sent: list[Message] = []
    received: list[Message] = [{"type": "websocket.connect"}]

    async def receive() -> Message:
        return received.pop() if received else {"type": "websocket.disconnect", "code": 1000}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": path,
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "subprotocols": [],
        "state": {},
    }
    await app(scope, receive, send)
    return sent[0]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder as `python -m server.static` writes it, of one small file."""
    folder = tmp_path / "site/page/device"
    (folder / "digest").mkdir(parents=True)
    (folder / "digest/network").write_bytes(b"network")
    told = {"folder": "digest", "names": {"network": "network"}, "runtimes": {}}
    (folder / "files.json").write_text(json.dumps(told), encoding="utf-8")
    return tmp_path / "site"


def test_a_guard_of_the_application_holds_on_every_route(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: Path
) -> None:
    made: list[FastAPI] = []

    def guarded(**options: Any) -> FastAPI:
        made.append(FastAPI(**options, dependencies=[Depends(only_ward_seven)]))
        return made[0]

    monkeypatch.setattr(app_module, "FastAPI", guarded)
    key, line = new_key("ops", "admin")
    (tmp_path / "keys").write_text(f"{line}\n", encoding="utf-8")
    app, _ = create_app(Settings(api_keys_file=tmp_path / "keys", device_dir=files))
    found = sorted(routes(made[0]))
    some = {("POST", "/segment"), ("WS", "/stream"), ("GET", "/page/device/name"), ("GET", "/docs")}
    assert some | {("GET", "/openapi.json"), ("POST", "/admin/reload"), ("GET", "/")} <= set(found)
    known = {"X-API-Key": key}

    async def scenario(ask: Ask) -> None:
        for method, path in found:
            if method == "WS":
                assert (await handshake(app, path, known))["status"] == CLOSED, path
                assert (await handshake(app, path, known | WARD))["type"] == "websocket.accept"
                continue
            for query in ("", "?threshold=0.4"):
                for body in (b"", PHOTO):
                    answer = await ask(method, path + query, content=body, headers=known)
                    assert answer.status_code == CLOSED, (method, path, query)
            assert (await ask(method, path, headers=known | WARD)).status_code != CLOSED, path

    run(app, scenario)


def test_routes_of_included_routers_are_among_those_that_are_tried() -> None:
    app = FastAPI(dependencies=[Depends(only_ward_seven)])
    inner, outer = APIRouter(), APIRouter()

    @inner.get("/{model}/forgotten/{name:path}")
    async def forgotten() -> None:
        """Nobody wrote this route down."""

    outer.include_router(inner)
    app.include_router(outer)
    assert ("GET", f"/{DEFAULT_NETWORK}/forgotten/name") in set(routes(app))


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
