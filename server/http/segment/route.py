"""`POST /segment` and `POST /segment/json`: one photo in, its mask out."""

import contextlib
from collections.abc import Callable, Container, Coroutine
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.http.admitted import SEGMENT, SEGMENT_JSON, Admitted
from server.http.parameters import Priority, TimeoutMs, is_bulk, only_known
from server.http.segment.masks import Asked, encoded
from server.http.segment.parameters import JsonParameters, MaskParameters, SegmentParameters
from server.http.segment.reference import SEGMENT_BODY, SEGMENT_JSON_RESPONSES, SEGMENT_RESPONSES
from server.http.uploads import check_type, image_in_body, is_form, read_body
from server.inference.service import Service
from server.inference.submission import Body, submitted
from server.observe.stages import Stages

__all__ = ["add_segment"]

_Endpoint = Callable[..., Coroutine[Any, Any, Response]]


def add_segment(router: APIRouter, service: Service) -> None:
    """Add the routes `/segment` and `/segment/json`.

    To the application's own router, since one that is included costs each request a second search.
    """

    async def segment(
        request: Request,
        given: Annotated[SegmentParameters, Query()],
        x_request_timeout_ms: TimeoutMs = None,
        priority: Priority = "",
    ) -> Response:
        return await _answer(service, request, given, x_request_timeout_ms, priority)

    async def segment_json(
        request: Request,
        given: Annotated[JsonParameters, Query()],
        x_request_timeout_ms: TimeoutMs = None,
        priority: Priority = "",
    ) -> Response:
        return await _answer(service, request, given, x_request_timeout_ms, priority)

    # Generated clients expect one form of answer for each path. So this path is described with PNG
    # and its parameters, though it can give JSON too, and JSON has a path of its own.
    summary = "Segment the lesion in a photo"
    described = MaskParameters.model_fields
    _add(router, SEGMENT, segment, SegmentParameters, described, summary, SEGMENT_RESPONSES)
    summary = "The same, with figures, as JSON"
    described = JsonParameters.model_fields
    _add(
        router,
        SEGMENT_JSON,
        segment_json,
        JsonParameters,
        described,
        summary,
        SEGMENT_JSON_RESPONSES,
    )


def _add(
    router: APIRouter,
    route: Admitted,
    endpoint: _Endpoint,
    parameters: type[JsonParameters],
    described: Container[str],
    summary: str,
    responses: dict[int | str, dict[str, Any]],
) -> None:
    declared = APIRoute(
        route.path,
        endpoint,
        methods=["POST"],
        dependencies=[only_known(parameters)],
        response_class=Response,
    )
    document = get_openapi(title="", version="", routes=[declared])
    operation = document["paths"][route.path]["post"]
    router.add_api_route(
        route.path,
        _briefly(declared, parameters()),
        methods=["POST"],
        tags=["segmentation"],
        summary=summary,
        response_class=Response,
        responses=responses,
        openapi_extra={
            "parameters": [
                parameter
                for parameter in operation["parameters"]
                if parameter["in"] != "query" or parameter["name"] in described
            ],
            **SEGMENT_BODY,
        },
    )


def _briefly(
    declared: APIRoute, defaults: JsonParameters
) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """An endpoint that asks FastAPI for the parameters of `declared` only if a request sets one.

    All have defaults, and most photos come without any: to find that out FastAPI would take 5 to
    10 % of the server's time for a small photo. Dependencies of the application and of routers
    belong to the route of this endpoint, so FastAPI solves them for every request before it comes
    here.
    """
    with_parameters = declared.get_route_handler()
    headers = [field.alias for field in declared.dependant.header_params]

    async def segment(request: Request) -> Response:
        if request.scope["query_string"] or any(name in request.headers for name in headers):
            return await with_parameters(request)
        response: Response = await declared.endpoint(request, defaults)
        return response

    return segment


async def _answer(
    service: Service,
    request: Request,
    given: JsonParameters,
    timeout_ms: float | None,
    priority: str,
) -> Response:
    headers, settings = request.headers, service.settings
    check_type(headers)
    stages: Stages = request.state.stages
    read = partial(read_body, request.receive, headers, max_bytes=settings.max_body_bytes)
    with contextlib.ExitStack() as held, Body(b"") as drawn:
        contents = _Contents(request, given, drawn)
        async with (
            submitted(
                service,
                request.receive,
                stages,
                settings.timeout_s(timeout_ms),
                read,
                bulk=is_bulk(priority),
                network=given.model,
            ) as received,
            received.work() as work,
        ):
            if contents.bare:
                # A small photo is decoded without being unpacked.
                contents.keep(received.body.data)
            segmentation = await work.segment(
                contents.unpack,
                bare=contents.bare,
                frame=lambda: contents.asked.frame,
                network=lambda: contents.asked.network,
            )
            stages.notes["batch"] = str(segmentation.batch_size)
            asked = contents.asked
            answer = await encoded(work, segmentation, asked, drawn, held)
        about = {} if asked.form == "json" else answer.headers
        return _HeldResponse(answer.content, asked.media_type, about, held.pop_all())


class _Contents:
    """What a body holds: the photo, and in a form parameters too."""

    asked: Asked
    """The form of the answer; a form's body tells it once it is unpacked."""

    def __init__(self, request: Request, given: JsonParameters, drawn: Body) -> None:
        """`drawn` gets the photo's bytes, if the answer draws it."""
        self._request, self._given, self._drawn = request, given, drawn
        self._type = request.headers.get("content-type", "")
        self.bare = not is_form(self._type)
        """Whether the body is the photo itself."""
        if self.bare:
            self.asked = given.asked(request)

    def unpack(self, data: bytes) -> bytes:
        """The photo's bytes; called in a thread."""
        photo, fields = image_in_body(data, self._type)
        if not self.bare:
            self.asked = self._given.with_fields(self._request, fields).asked(self._request)
            self.keep(photo)
        return photo

    def keep(self, photo: bytes) -> None:
        """Check that the answer can be made of the photo, and keep it if it is drawn."""
        self.asked.check(photo)
        if self.asked.needs_photo:
            self._drawn.put(photo)


class _HeldResponse(Response):
    """An answer that may hold bytes of the budget until it is sent."""

    def __init__(
        self, content: bytes, media_type: str, headers: dict[str, str], held: contextlib.ExitStack
    ) -> None:
        super().__init__(content, media_type=media_type, headers={"Vary": "Accept", **headers})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)
