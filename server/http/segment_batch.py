"""`POST /segment/batch`: many photos in one request, each answered as soon as it is done.

Photos are worked on a few at a time and answered in the order in which they get done. What is wrong
with one is its own answer and nobody else's. All of it is bulk: whoever sends a single photo goes
first.
"""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.http.answers import (
    BatchItemAnswer,
    MaskFormat,
    json_answer,
    png_answer,
    probability_bytes,
)
from server.http.parameters import (
    Clean,
    FileNames,
    MaskForm,
    MaskSize,
    Threshold,
    TimeoutMs,
    answer_type,
    deadline,
    is_original,
    only_known,
    parameter_names,
    with_fields,
)
from server.http.problems import PROBLEM_JSON, document
from server.http.reference import BINARY, HEADERS, problem_responses
from server.http.uploads import MULTIPART, Fields, Part, hang_up, has_hung_up, read_parts
from server.inference.admission import Place
from server.inference.errors import ClientGone, InferenceFailed, Problem
from server.inference.service import Service
from server.observe.stages import Stages

__all__ = ["bulk_router"]

log = logging.getLogger("slsnet.server")

NDJSON = "application/x-ndjson"
MIXED = "multipart/mixed"
JSON = "application/json"

# The last is lines as well, for clients that take bytes under this name alone.
_FORMS = (NDJSON, MIXED, "application/octet-stream")

# Photos of one request that are worked on, or wait to be sent, at the same time.
_MAX_AT_WORK = 32

# Who has not read the answers so long after the deadline is not waited for.
_FAREWELL_S = 30


@dataclass(frozen=True)
class _Options:
    threshold: float
    original: bool
    clean: bool
    mask: MaskFormat
    file_names: bool
    media_type: str
    timeout_s: float


def bulk_router(service: Service) -> APIRouter:
    """The path, for the application to include."""
    router = APIRouter(tags=["segmentation"])
    settings = service.settings

    def add(
        path: str,
        summary: str,
        forms: Sequence[str],
        responses: dict[int | str, dict[str, Any]],
    ) -> None:
        @router.post(
            path,
            summary=summary,
            dependencies=[Depends(only_known)],
            response_class=Response,
            responses=responses,
            openapi_extra=_BODY,
        )
        async def segment_batch(
            threshold: Threshold = 0.5,
            size: MaskSize = None,
            clean: Clean = False,
            mask: MaskForm = MaskFormat.PNG,
            file_names: FileNames = False,
            x_request_timeout_ms: TimeoutMs = None,
        ) -> Response:
            return _Answers(
                service,
                forms,
                {
                    "threshold": threshold,
                    "size": size,
                    "clean": clean,
                    "mask": mask,
                    "file_names": file_names,
                },
                settings.bulk_timeout_s(x_request_timeout_ms),
            )

    add("/segment/batch", "Segment the lesions in many photos", _FORMS, _RESPONSES)
    # Generated clients know one form of an answer for each path, and of JSON one value in it.
    add("/segment/batch/json", "The same, as one JSON array", (JSON,), _JSON_RESPONSES)
    return router


class _Answers(Response):
    """Reads the photos, and sends what comes of each."""

    def __init__(
        self, service: Service, forms: Sequence[str], asked: dict[str, Any], timeout_s: float
    ) -> None:
        super().__init__()
        self._service = service
        self._forms = forms
        self._asked = asked
        self._timeout_s = timeout_s
        self._options: _Options
        self._boundary = uuid.uuid4().hex

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        stages: Stages = request.state.stages
        settings = self._service.settings
        until = stages.started + self._timeout_s
        with (
            self._service.admission(deadline=until, bulk=True) as place,
            self._service.networks.pinned() as network,
        ):
            async with deadline(self._timeout_s):
                photos, fields = await read_parts(
                    receive,
                    request.headers,
                    max_bytes=min(settings.bulk_max_bytes, settings.bulk_bytes),
                    max_parts=settings.bulk_max_photos,
                    max_part_bytes=settings.max_body_bytes,
                    parameters=parameter_names(request),
                    take=place.take,
                )
            stages.end("read")
            self._options = self._read_options(request, fields)
            place.check(len(photos))
            media_type = self._options.media_type
            if media_type == MIXED:
                media_type += f"; boundary={self._boundary}"
            headers = {"Content-Type": media_type, "Vary": "Accept", "X-Accel-Buffering": "no"}
            await send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
                }
            )
            with hang_up(receive) as gone:
                await self._send_all(request, photos, gone, place, network, send)

    def _read_options(self, request: Request, fields: Fields) -> _Options:
        asked = with_fields(request, self._asked, fields)
        return _Options(
            asked["threshold"],
            is_original(asked["size"], asked["mask"]),
            asked["clean"],
            asked["mask"],
            asked["file_names"],
            answer_type(request.headers, self._forms, asked["mask"]),
            self._timeout_s,
        )

    async def _send_all(
        self,
        request: Request,
        photos: list[Part],
        gone: asyncio.Future[Message],
        place: Place,
        network: str,
        send: Send,
    ) -> None:
        waiting = deque(enumerate(photos))
        photos.clear()
        sending = asyncio.Lock()
        opening, between, ending = b"", b"", b""
        if self._options.media_type == MIXED:
            ending = f"--{self._boundary}--\r\n".encode()
        elif self._options.media_type == JSON:
            opening, between, ending = b"[", b",", b"]\n"

        async def work() -> None:
            nonlocal opening
            while waiting:
                index, part = waiting.popleft()
                place.begin()
                with contextlib.ExitStack() as held:
                    status, answer = await self._answer(request, index, part, gone, network, held)
                    place.end(served=status == 200)
                    place.take(-part.size)
                    del part
                    async with sending:
                        body, opening = opening + answer, between
                        await send({"type": "http.response.body", "body": body, "more_body": True})

        info = self._service.backend
        at_work = min(len(waiting), 2 * info.max_batch * info.slots, _MAX_AT_WORK)
        if self._options.original and self._options.mask is MaskFormat.PROBABILITIES:
            # As large as photos, and larger: one is held at a time.
            at_work = min(at_work, 1)
        workers = asyncio.gather(*(work() for _ in range(at_work)))
        stages: Stages = request.state.stages
        timeout_s = stages.started + self._options.timeout_s - time.perf_counter() + _FAREWELL_S
        try:
            await asyncio.wait(
                (workers, gone), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if workers.done():
                with contextlib.suppress(ClientGone):
                    await workers
                await send({"type": "http.response.body", "body": ending})
        finally:
            workers.cancel()

    async def _answer(
        self,
        request: Request,
        index: int,
        part: Part,
        gone: asyncio.Future[Message],
        network: str,
        held: contextlib.ExitStack,
    ) -> tuple[int, bytes]:
        """A photo's status, and its line, or part, of the answer."""
        status, content = 200, b""
        media_type = "image/png" if self._options.media_type == MIXED else "application/json"
        try:
            content = await self._service.unless_closing(
                self._segment(request, part, gone, network, held)
            )
        except ClientGone:
            raise
        except Exception as error:
            if isinstance(error, Problem):
                problem = error
            else:
                log.exception("request %s failed on photo %d", request.state.request_id, index)
                problem = InferenceFailed("The server failed on this photo.")
            status, media_type = problem.status, PROBLEM_JSON
            members = document(
                problem.status, problem.detail, request.url.path, request.state.request_id
            )
            content = json.dumps(members).encode()
            # Its traceback has this frame: they would keep each other, and the photo.
            del problem
        self._service.metrics.bulk_photos.labels(str(int(status))).inc()
        if self._options.media_type != MIXED:
            head: dict[str, Any] = {"index": index, "name": part.name, "status": int(status)}
            if self._options.file_names:
                head["file_name"] = part.file_name
            member = "result" if status == 200 else "error"
            # The photo's own answer is JSON already. Both are ASCII: some readers of lines take
            # U+2028 and U+0085 for an end of line.
            start = json.dumps(head).removesuffix("}")
            return status, f'{start}, "{member}": '.encode() + content + b"}\n"
        file_name: tuple[str, ...] = ()
        if self._options.file_names and part.file_name is not None:
            file_name = (f"Item-File-Name: {quote(part.file_name, safe='')}",)
        lines = (
            f"--{self._boundary}",
            f"Content-Type: {media_type}",
            f"Content-Length: {len(content)}",
            f"Item-Index: {index}",
            f"Item-Name: {quote(part.name, safe='')}",
            f"Item-Status: {int(status)}",
            *file_name,
            "\r\n",
        )
        return status, "\r\n".join(lines).encode() + content + b"\r\n"

    async def _segment(
        self,
        request: Request,
        part: Part,
        gone: asyncio.Future[Message],
        network: str,
        held: contextlib.ExitStack,
    ) -> bytes:
        if isinstance(part.photo, Problem):
            raise part.photo
        options = self._options
        started: float = request.state.stages.started
        stages = Stages()
        spent_s = time.perf_counter() - started
        async with deadline(options.timeout_s, spent_s=spent_s), self._service.bulk_photos:
            # Also where no thread has taken it.
            held.callback(part.photo.clear)
            segmentation = await self._service.segment(
                part.photo.pop,
                stages=stages,
                deadline=started + options.timeout_s,
                is_gone=lambda: has_hung_up(gone),
                bulk=True,
                network=network,
            )
            if options.media_type == MIXED:
                content = await self._service.threads.run(
                    lambda: png_answer(
                        segmentation, options.threshold, options.original, clean=options.clean
                    ),
                    bulk=True,
                )
            else:
                size_bytes = probability_bytes(segmentation, options.original, options.mask)
                held.enter_context(self._service.gate.answer_bytes(size_bytes, bulk=True))
                content = await self._service.threads.run(
                    lambda: json_answer(
                        segmentation,
                        options.threshold,
                        options.original,
                        options.mask,
                        clean=options.clean,
                        request_id=request.state.request_id,
                        timings_ms=stages.milliseconds(),
                        room=self._service.pixels.room,
                    ),
                    bulk=True,
                )
        stages.end("encode")
        for stage, seconds in stages.seconds.items():
            self._service.metrics.stage_seconds.labels(stage).observe(seconds)
        return content


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A form with a photo in every field, whatever the fields are called; names"
        " may repeat. A field without a file name and with a short text is one of the parameters,"
        " as in the query.",
        "content": {
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "photos",
                        }
                    },
                }
            }
        },
    }
}

_PROBLEMS = problem_responses(400, 406, 413, 415, 422, 429, 503, 504)

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One answer for each photo, in the order in which they get done: a line of"
        " JSON, such as the items of what `POST /segment/batch/json` answers, or, if `Accept`"
        " prefers multipart/mixed, a part with the mask as PNG (or a problem document) and the"
        " headers Item-Index, Item-Name (percent-encoded) and Item-Status; with file_names,"
        " Item-File-Name (percent-encoded) too.",
        "headers": HEADERS,
        "content": {
            # Not one JSON value but many, of which a schema cannot speak.
            NDJSON: BINARY,
            MIXED: BINARY,
            # Lines too, if `Accept` prefers it, for clients that know of no lines.
            "application/octet-stream": BINARY,
        },
    },
    **_PROBLEMS,
}

_JSON_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One answer for each photo, in the order in which they get done.",
        "headers": HEADERS,
        "model": list[BatchItemAnswer],
    },
    **_PROBLEMS,
}
