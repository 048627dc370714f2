"""`POST /segment` and `POST /segment/json`: one photo in, its mask out."""

import contextlib
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.http.admitted import SEGMENT, SEGMENT_JSON, Admitted
from server.http.answers import MaskFormat
from server.http.parameters import (
    Clean,
    Features,
    MaskForm,
    MaskSize,
    Priority,
    Threshold,
    TimeoutMs,
    WithBorders,
    answer_type,
    is_bulk,
    is_original,
    json_for,
    only_known,
    with_fields,
)
from server.http.reference import SEGMENT_BODY, SEGMENT_JSON_RESPONSES, SEGMENT_RESPONSES
from server.http.segment.masks import JSON, MEDIA_TYPES, PNG, Asked, encoded
from server.http.uploads import Fields, check_type, image_in_body, is_form, read_body
from server.inference.errors import Unprocessable
from server.inference.service import Service
from server.inference.submission import Body, submitted
from server.observe.stages import Stages

__all__ = ["segment_router"]

# The last one is PNG too, for clients that take bytes only under this name.
_FORMS = (PNG, JSON, "application/octet-stream")
_BY_FORMAT: dict[str | None, str] = {"png": PNG, "json": JSON}

# Forms that `Accept` may name. A type that several forms have is the mask's.
_BY_ACCEPT = {
    media_type: form for form, media_type in MEDIA_TYPES.items() if media_type not in (PNG, JSON)
}

_Format = Literal[
    "png",
    "json",
    "overlay",
    "overlay-png",
    "probability8",
    "probability16",
    "npy",
    "svg",
    "coco",
]


def segment_router(service: Service) -> APIRouter:
    """The routes `/segment` and `/segment/json`."""

    # Generated clients expect one form of answer for each path. So this path is described with PNG,
    # though it can give JSON too, and JSON has a path of its own.
    async def segment(
        request: Request,
        threshold: Threshold = 0.5,
        size: MaskSize = None,
        clean: Clean = False,
        answer_format: Annotated[
            _Format | None, Query(alias="format", include_in_schema=False)
        ] = None,
        mask: Annotated[MaskFormat, Query(include_in_schema=False)] = MaskFormat.PNG,
        borders: Annotated[bool, Query(include_in_schema=False)] = False,
        features: Annotated[bool, Query(include_in_schema=False)] = False,
        x_request_timeout_ms: TimeoutMs = None,
        priority: Priority = "",
    ) -> Response:
        given = {
            "threshold": threshold,
            "size": size,
            "clean": clean,
            "format": answer_format,
            "mask": mask,
            "borders": borders,
            "features": features,
        }
        wishes = _Wishes(request, given, _FORMS)
        return await _answer(service, request, wishes, x_request_timeout_ms, priority)

    async def segment_json(
        request: Request,
        threshold: Threshold = 0.5,
        size: MaskSize = None,
        clean: Clean = False,
        mask: MaskForm = MaskFormat.PNG,
        borders: WithBorders = False,
        features: Features = False,
        x_request_timeout_ms: TimeoutMs = None,
        priority: Priority = "",
    ) -> Response:
        given = {
            "threshold": threshold,
            "size": size,
            "clean": clean,
            "mask": mask,
            "borders": borders,
            "features": features,
        }
        wishes = _Wishes(request, given, (JSON,))
        return await _answer(service, request, wishes, x_request_timeout_ms, priority)

    router = APIRouter()
    one, other = "Segment the lesion in a photo", "The same, with figures, as JSON"
    _add(router, SEGMENT, segment, one, SEGMENT_RESPONSES)
    _add(router, SEGMENT_JSON, segment_json, other, SEGMENT_JSON_RESPONSES)
    return router


def _add(
    router: APIRouter,
    route: Admitted,
    endpoint: Callable[..., Coroutine[Any, Any, Response]],
    summary: str,
    responses: dict[int | str, dict[str, Any]],
) -> None:
    declared = APIRoute(
        route.path,
        endpoint,
        methods=["POST"],
        dependencies=[Depends(only_known)],
        response_class=Response,
    )
    router.add_api_route(
        route.path,
        _briefly(declared),
        methods=["POST"],
        tags=["segmentation"],
        summary=summary,
        response_class=Response,
        responses=responses,
        openapi_extra={"parameters": _parameters(declared), **SEGMENT_BODY},
    )


async def _answer(
    service: Service,
    request: Request,
    wishes: "_Wishes",
    timeout_ms: float | None,
    priority: str,
) -> Response:
    settings = service.settings
    stages: Stages = request.state.stages
    headers = request.headers
    check_type(headers)
    bare = not is_form(content_type := headers.get("content-type", ""))
    if bare:
        # A form's parameters are known only once it is parsed.
        wishes.asked()
    read = partial(read_body, request.receive, headers, max_bytes=settings.max_body_bytes)
    with contextlib.ExitStack() as held, Body(b"") as drawn:

        def unpack(data: bytes) -> bytes:
            photo = image_in_body(data, content_type, wishes.take_fields)
            if wishes.asked().draws_photo:
                drawn.put(photo)
            return photo

        async with (
            submitted(
                service,
                request.receive,
                stages,
                settings.timeout_s(timeout_ms),
                read,
                bulk=is_bulk(priority),
            ) as received,
            received.work() as work,
        ):
            if bare and wishes.asked().draws_photo:
                # A small photo is decoded without being unpacked.
                drawn.put(received.body.data)
            segmentation = await work.segment(unpack, bare=bare)
            stages.notes["batch"] = str(segmentation.batch_size)
            asked = wishes.asked()
            answer = await encoded(work, segmentation, asked, drawn, held)
        about = {} if asked.form == "json" else answer.headers
        return _Answer(answer.content, wishes.media_type(), about, held.pop_all())


class _Wishes:
    """What a request asks for, in its query, its form's fields and its headers."""

    def __init__(self, request: Request, given: dict[str, Any], forms: tuple[str, ...]) -> None:
        self._request = request
        self._given = given
        self._forms = forms
        self._asked: Asked | None = None

    def take_fields(self, fields: Fields) -> None:
        """Apply the form's fields, or raise what is wrong with them."""
        self._given = with_fields(self._request, self._given, fields)
        self._asked = None
        self.asked()

    def media_type(self) -> str:
        """The media type of the answer.

        Raises:
            NotAcceptable, Unprocessable: see `answer_type`.
        """
        headers, given = self._request.headers, self._given
        asked = given.get("format")
        needed_by = json_for(given)
        if asked in MEDIA_TYPES:
            if needed_by:
                raise Unprocessable(
                    f"{needed_by} is for format=json, and format={asked} is asked for: leave one of"
                    " them out."
                )
            return MEDIA_TYPES[asked]
        others = tuple(_BY_ACCEPT) if PNG in self._forms else ()
        by_name = _BY_FORMAT.get(asked)
        return answer_type(headers, self._forms, needed_by, by_name, others=others)

    def asked(self) -> Asked:
        """The form of the answer; raises what `media_type` raises."""
        if self._asked is None:
            given, media_type = self._given, self.media_type()
            form = given.get("format")
            if form not in MEDIA_TYPES:
                form = _BY_ACCEPT.get(media_type) or ("json" if media_type == JSON else "png")
            self._asked = Asked(
                given["threshold"],
                is_original(given["size"], given["mask"] if form == "json" else form),
                given["clean"],
                given["mask"],
                given["features"],
                form,
                self._request.state.request_id,
                given["borders"],
            )
        return self._asked


def _briefly(declared: APIRoute) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """An endpoint that asks FastAPI for the parameters of `declared` only if a request sets one.

    All have defaults, and most photos come without any: to find that out FastAPI would take 5 to
    10 % of the server's time for a small photo. Dependencies of the application and of routers
    belong to the route of this endpoint, so FastAPI solves them for every request before it comes
    here.
    """
    with_parameters = declared.get_route_handler()
    headers = [field.alias for field in declared.dependant.header_params]

    async def segment(request: Request) -> Response:
        # Its parameters are those that a form may have too.
        request.scope["route"] = declared
        if request.scope["query_string"] or any(name in request.headers for name in headers):
            return await with_parameters(request)
        response: Response = await declared.endpoint(request)
        return response

    return segment


def _parameters(declared: APIRoute) -> list[Any]:
    """The parameters in the API's document."""
    document = get_openapi(title="", version="", routes=[declared])
    parameters: list[Any] = document["paths"][declared.path]["post"]["parameters"]
    return parameters


class _Answer(Response):
    """An answer that may hold bytes of the budget until it is sent."""

    def __init__(
        self, content: bytes, media_type: str, headers: dict[str, str], held: contextlib.ExitStack
    ) -> None:
        super().__init__(content, media_type=media_type, headers={"Vary": "Accept", **headers})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)
