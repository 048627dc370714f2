"""The model repository of V2: which networks there are, loaded and retired by name.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md

Everybody may read the index. `server.http.access` guards the rest for administrators' keys. A
network is loaded from a file that the server has: no client brings one.
"""

from enum import Enum
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ValidationError

from server.backends import BackendError
from server.http.errors import BadRequest
from server.http.openinference.protocol import (
    VERSION,
    IndexEntry,
    IndexRequest,
    LoadRequest,
    errors,
)
from server.http.reference import inlined
from server.http.uploads import read_body
from server.inference.errors import Unprocessable
from server.inference.repository import NOT_LOADED, Entry, Repository, entries
from server.inference.service import Service
from server.inference.sharing.feeder import Link

__all__ = ["repository_router"]

Asked = TypeVar("Asked", bound=BaseModel)

_TAGS: list[str | Enum] = ["open inference protocol"]

_Name = Annotated[str, Path(description="of the network", examples=["lite"])]

_MOST_BYTES = 2**16

# Basic is not offered: browsers send it by themselves.
_FOR_ADMINISTRATORS: dict[str, Any] = {"security": [{"bearer": []}, {"header": []}]}


def repository_router(service: Service, repository: Repository | Link) -> APIRouter:
    """The routes under `/v2/repository`.

    Args:
        service: has the networks.
        repository: loads and retires them.
    """
    router = APIRouter(prefix="/v2/repository", tags=_TAGS)

    @router.post(
        "/index",
        summary="The networks that serve, and those that may be loaded",
        responses=errors(400, 413),
        openapi_extra=_body(IndexRequest),
    )
    async def index(request: Request) -> list[IndexEntry]:
        asked = await _read(request, IndexRequest)
        found = await service.threads.run(lambda: list(entries(service)))
        return [_entry(entry) for entry in found if entry.is_ready or not asked.ready]

    @router.post(
        "/models/{model}/load",
        summary="Load a network and let it serve, or load it from its file again",
        responses=errors(400, 403, 404, 413, 422),
        openapi_extra={**_body(LoadRequest), **_FOR_ADMINISTRATORS},
    )
    async def load(request: Request, model: _Name) -> IndexEntry:
        await _check(request)
        try:
            await repository.load(model)
        except BackendError as error:
            raise Unprocessable(
                f"The network {model!r} cannot serve, the others go on: {error}"
            ) from error
        return _entry(Entry(model, True, ""))

    @router.post(
        "/models/{model}/unload",
        summary="Retire a network: requests that it has are still answered",
        responses=errors(400, 403, 404, 413, 422),
        openapi_extra={**_body(LoadRequest), **_FOR_ADMINISTRATORS},
    )
    async def unload(request: Request, model: _Name) -> IndexEntry:
        await _check(request)
        await repository.retire(model)
        return _entry(Entry(model, False, NOT_LOADED))

    return router


def _entry(entry: Entry) -> IndexEntry:
    state: Literal["READY", "UNAVAILABLE"] = "READY" if entry.is_ready else "UNAVAILABLE"
    return IndexEntry(name=entry.name, version=VERSION, state=state, reason=entry.reason)


async def _check(request: Request) -> None:
    """Refuse parameters that would be without effect."""
    asked = await _read(request, LoadRequest)
    for name in asked.parameters:
        if name != "unload_dependents":
            raise BadRequest(
                f"The parameter {name[:80]!r} is not served: a network is loaded from its file in"
                " the server."
            )


async def _read(request: Request, message: type[Asked]) -> Asked:
    """The request's body; an empty one asks for nothing special."""
    body = await read_body(request.receive, request.headers, lambda _: None, max_bytes=_MOST_BYTES)
    try:
        return message.model_validate_json(body.take() or b"{}")
    except ValidationError as error:
        told = error.errors(include_input=False, include_url=False)[0]["msg"]
        raise BadRequest(f"The request is no JSON of the protocol: {told}.") from error


def _body(message: type[BaseModel]) -> dict[str, Any]:
    schema = inlined(message.model_json_schema())
    return {"requestBody": {"required": False, "content": {"application/json": {"schema": schema}}}}
