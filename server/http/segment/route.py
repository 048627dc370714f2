"""`POST /segment` and `POST /segment/json`: one photo in, its mask out."""

import contextlib
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.http.admitted import SEGMENT, SEGMENT_JSON
from server.http.answers import MaskFormat
from server.http.parameters import (
    Clean,
    MaskForm,
    MaskSize,
    Priority,
    Threshold,
    TimeoutMs,
    answer_type,
    is_bulk,
    is_original,
    only_known,
    with_fields,
)
from server.http.reference import SEGMENT_BODY, SEGMENT_JSON_RESPONSES, SEGMENT_RESPONSES
from server.http.segment.masks import JSON, PNG, Asked, encoded
from server.http.uploads import Fields, check_type, image_in_body, is_form, read_body
from server.inference.service import Service
from server.inference.submission import submitted
from server.observe.stages import Stages

__all__ = ["segment_router"]

# The last one is PNG too, for clients that take bytes only under this name.
_FORMS = (PNG, JSON, "application/octet-stream")
_BY_FORMAT: dict[str | None, str] = {"png": PNG, "json": JSON}


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
            Literal["png", "json"] | None, Query(alias="format", include_in_schema=False)
        ] = None,
        mask: Annotated[MaskFormat, Query(include_in_schema=False)] = MaskFormat.PNG,
        x_request_timeout_ms: TimeoutMs = None,
        priority: Priority = "",
    ) -> Response:
        given = {
            "threshold": threshold,
            "size": size,
            "clean": clean,
            "format": answer_format,
            "mask": mask,
        }
        wishes = _Wishes(request, given, _FORMS)
        return await _answer(service, request, wishes, x_request_timeout_ms, priority)

    async def segment_json(
        request: Request,
        threshold: Threshold = 0.5,
        size: MaskSize = None,
        clean: Clean = False,
        mask: MaskForm = MaskFormat.PNG,
        x_request_timeout_ms: TimeoutMs = None,
        priority: Priority = "",
    ) -> Response:
        given = {"threshold": threshold, "size": size, "clean": clean, "mask": mask}
        wishes = _Wishes(request, given, (JSON,))
        return await _answer(service, request, wishes, x_request_timeout_ms, priority)

    router = APIRouter(route_class=_BriefRoute)
    for route, endpoint, summary, responses in (
        (SEGMENT, segment, "Segment the lesion in a photo", SEGMENT_RESPONSES),
        (SEGMENT_JSON, segment_json, "The same, with figures, as JSON", SEGMENT_JSON_RESPONSES),
    ):
        router.add_api_route(
            route.path,
            endpoint,
            methods=["POST"],
            tags=["segmentation"],
            summary=summary,
            dependencies=[Depends(only_known)],
            response_class=Response,
            responses=responses,
            openapi_extra=SEGMENT_BODY,
        )
    return router


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
        wishes.media_type()
    read = partial(read_body, request.receive, headers, max_bytes=settings.max_body_bytes)
    with contextlib.ExitStack() as held:
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
            segmentation = await work.segment(
                lambda data: image_in_body(data, content_type, wishes.take_fields),
                bare=bare,
            )
            stages.notes["batch"] = str(segmentation.batch_size)
            content = await encoded(work, segmentation, wishes.asked(), held)
        return _Answer(content, wishes.media_type(), held.pop_all())


class _Wishes:
    """What a request asks for, in its query, its form's fields and its headers."""

    def __init__(self, request: Request, given: dict[str, Any], forms: tuple[str, ...]) -> None:
        self._request = request
        self._given = given
        self._forms = forms

    def take_fields(self, fields: Fields) -> None:
        """Apply the form's fields, or raise what is wrong with them."""
        self._given = with_fields(self._request, self._given, fields)
        self.media_type()

    def media_type(self) -> str:
        """The media type of the answer; see `answer_type`."""
        by_name = _BY_FORMAT.get(self._given.get("format"))
        return answer_type(self._request.headers, self._forms, self._given["mask"], by_name)

    def asked(self) -> Asked:
        """The form of the answer."""
        given = self._given
        return Asked(
            given["threshold"],
            is_original(given["size"], given["mask"]),
            given["clean"],
            given["mask"],
            self.media_type() == JSON,
            self._request.state.request_id,
        )


class _BriefRoute(APIRoute):
    """A route that is called directly if the request sets no parameter, since all have defaults.

    Most photos come so. FastAPI would take as long to find that out as all else on the event loop.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        with_parameters = super().get_route_handler()
        headers = [field.alias for field in self.dependant.header_params]

        async def handle(request: Request) -> Response:
            if request.scope["query_string"] or any(name in request.headers for name in headers):
                return await with_parameters(request)
            response: Response = await self.endpoint(request)
            return response

        return handle


class _Answer(Response):
    """An answer that may hold bytes of the budget until it is sent."""

    def __init__(self, content: bytes, media_type: str, held: contextlib.ExitStack) -> None:
        super().__init__(content, media_type=media_type, headers={"Vary": "Accept"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)
