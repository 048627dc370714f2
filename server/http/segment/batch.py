"""`POST /segment/batch`: many photos in one request, each answered as soon as it is done.

A few photos are worked on at a time, and each is answered when it is done. What is wrong with one
photo is in its own answer only. The whole request is bulk: single photos go first.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from photos.forms import sample_bytes
from server.http.admitted import BATCH, BATCH_JSON
from server.http.answers import MaskFormat
from server.http.parameters import TimeoutMs, only_known
from server.http.problems import PROBLEM_JSON, document, told
from server.http.segment.items import Item, Lines, body_of
from server.http.segment.masks import JSON, Asked, Encoded, encoded
from server.http.segment.parameters import MIXED, BatchJsonParameters, BatchParameters
from server.http.segment.reference import BATCH_BODY, BATCH_JSON_RESPONSES, BATCH_RESPONSES
from server.http.uploads import Part, read_parts
from server.inference.errors import ClientGone, Problem
from server.inference.service import Service
from server.inference.submission import Body, Many, submitted
from server.observe.stages import Stages

__all__ = ["batch_router"]

log = logging.getLogger("slsnet.server")

# Photos of one request that are at work, or wait to be sent, at the same time.
_MAX_AT_WORK = 32

# Seconds after the deadline in which the client may still read the answers.
_FAREWELL_S = 30


def batch_router(service: Service) -> APIRouter:
    """The routes `/segment/batch` and `/segment/batch/json`."""
    router = APIRouter(tags=["segmentation"])

    @router.post(
        BATCH.path,
        summary="Segment the lesions in many photos",
        dependencies=[only_known(BatchParameters)],
        response_class=Response,
        responses=BATCH_RESPONSES,
        openapi_extra=BATCH_BODY,
    )
    async def segment_batch(
        request: Request,
        given: Annotated[BatchParameters, Query()],
        x_request_timeout_ms: TimeoutMs = None,
    ) -> Response:
        return await _answer(service, request, given, x_request_timeout_ms)

    # Generated clients expect one form of answer for each path, and in JSON a single value.
    @router.post(
        BATCH_JSON.path,
        summary="The same, as one JSON array",
        dependencies=[only_known(BatchJsonParameters)],
        response_class=Response,
        responses=BATCH_JSON_RESPONSES,
        openapi_extra=BATCH_BODY,
    )
    async def segment_batch_json(
        request: Request,
        given: Annotated[BatchJsonParameters, Query()],
        x_request_timeout_ms: TimeoutMs = None,
    ) -> Response:
        return await _answer(service, request, given, x_request_timeout_ms)

    return router


async def _answer(
    service: Service, request: Request, given: BatchJsonParameters, timeout_ms: float | None
) -> Response:
    settings = service.settings
    read = partial(
        read_parts,
        request.receive,
        request.headers,
        max_bytes=min(settings.bulk_max_bytes, settings.bulk_bytes),
        max_parts=settings.bulk_max_photos,
        max_part_bytes=settings.max_body_bytes,
        parameters=type(given).model_fields,
    )
    async with contextlib.AsyncExitStack() as held:
        received = await held.enter_async_context(
            submitted(
                service,
                request.receive,
                request.state.stages,
                settings.bulk_timeout_s(timeout_ms),
                read,
                bulk=True,
                network=given.model,
            )
        )
        photos, fields = received.body
        given = given.with_fields(request, fields)
        received.choose(given.model)
        asked = given.asked(request)
        many = received.work_on_many(len(photos))
        body = body_of(asked.media_type, file_names=given.file_names)
        answers = _Answers(service, request, asked, body, many).of(photos)
        await held.enter_async_context(contextlib.aclosing(answers))
        left_s = many.deadline.left_s + _FAREWELL_S
        return _Sent(answers, body.content_type, left_s, held.pop_all())


class _Sent(StreamingResponse):
    """An answer that holds the request's place until it is sent, or nobody reads it any more."""

    def __init__(
        self,
        content: AsyncIterator[bytes],
        media_type: str,
        left_s: float,
        held: contextlib.AsyncExitStack,
    ) -> None:
        headers = {"Vary": "Accept", "X-Accel-Buffering": "no"}
        super().__init__(content, headers=headers, media_type=media_type)
        self._left_s = left_s
        self._held = held

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        # `Many.gone` watches the client. An answer that is cut off has no end.
        with contextlib.suppress(ClientGone, TimeoutError):
            async with self._held, asyncio.timeout(self._left_s):
                await self.stream_response(send)


class _Answers:
    """The answers to the photos of a request."""

    def __init__(
        self,
        service: Service,
        request: Request,
        asked: Asked,
        body: Lines,
        many: Many,
    ) -> None:
        self._service = service
        self._request = request
        self._asked = asked
        self._body = body
        self._many = many

    async def of(self, photos: list[Part]) -> AsyncGenerator[bytes]:
        """The bytes of the body: each photo's as soon as it is done, in any order."""
        waiting = enumerate(photos)
        at_work: dict[asyncio.Future[Any], contextlib.ExitStack] = {}
        start = self._body.opening
        with contextlib.ExitStack() as unsent:

            def begin() -> None:
                if (photo := next(waiting, None)) is not None:
                    held = unsent.enter_context(contextlib.ExitStack())
                    at_work[asyncio.create_task(self._answer(*photo, held))] = held

            try:
                for _ in range(self._most_at_work()):
                    begin()
                while at_work:
                    done, _ = await asyncio.wait(
                        (*at_work, self._many.gone), return_when=asyncio.FIRST_COMPLETED
                    )
                    if self._many.gone in done:
                        raise ClientGone
                    for task in done & at_work.keys():
                        with at_work.pop(task):
                            yield start + task.result()
                        start = self._body.between
                        begin()
                yield self._body.ending
            finally:
                for task in at_work:
                    task.cancel()
                await asyncio.gather(*at_work, return_exceptions=True)

    def _most_at_work(self) -> int:
        asked, info = self._asked, self._many.network.current.info
        holds_samples = sample_bytes(asked.mask) > 0
        if "probability" in asked.objects or (
            asked.original and (holds_samples or asked.mask is MaskFormat.PROBABILITIES)
        ):
            # Such answers can be larger than photos, so only one is held at a time.
            return 1
        # One more, since the batcher may begin one before a slot is free.
        return min(2 * info.max_batch * info.slots + 1, _MAX_AT_WORK)

    async def _answer(self, index: int, part: Part, held: contextlib.ExitStack) -> bytes:
        """The bytes of the answer to one photo."""
        media_type = self._asked.file_type if self._asked.media_type == MIXED else JSON
        status = HTTPStatus.OK
        try:
            answer = await self._service.drain.unless_given_up(self._segment(part, held))
        except ClientGone:
            raise
        except Problem as problem:
            status, answer = self._told(problem)
        except Exception:
            log.exception("request %s failed on photo %d", self._asked.request_id, index)
            status, answer = self._told(Problem("The server failed on this photo."))
        if status is not HTTPStatus.OK:
            media_type = PROBLEM_JSON
        self._service.metrics.bulk_photos.labels(str(int(status))).inc()
        self._many.give_back(part.size)
        return self._body.encoded(
            Item(index, part.name, part.file_name, status, media_type, answer)
        )

    def _told(self, problem: Problem) -> tuple[HTTPStatus, Encoded]:
        said = told(problem)
        path = self._request.url.path
        members = document(said.status, said.detail, path, self._asked.request_id)
        return said.status, Encoded(json.dumps(members).encode(), None, None)

    async def _segment(self, part: Part, held: contextlib.ExitStack) -> Encoded:
        if isinstance(part.photo, Problem):
            raise part.photo
        stages = Stages()
        with part.photo, Body(part.photo.data if self._asked.needs_photo else b"") as drawn:
            self._asked.check(part.photo.data)
            async with self._many.work(part.photo, stages) as work, self._service.bulk_photos:
                segmentation = await work.segment(frame=lambda: self._asked.frame)
                answer = await encoded(work, segmentation, self._asked, drawn, held)
        for stage, seconds in stages.seconds.items():
            self._service.metrics.stage_seconds.labels(stage).observe(seconds)
        return answer
