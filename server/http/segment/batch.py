"""`POST /segment/batch`: many photos in one request, each answered as soon as it is done.

A few photos are worked on at a time, and each is answered when it is done. What is wrong with one
photo is in its own answer only. The whole request is bulk: single photos go first.
"""

import asyncio
import contextlib
import json
import logging
import uuid
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from photos.forms import sample_bytes
from server.http.admitted import BATCH, BATCH_JSON, Admitted
from server.http.answers import BatchItemAnswer, MaskFormat
from server.http.parameters import (
    Clean,
    Features,
    FileNames,
    MaskForm,
    MaskSize,
    Threshold,
    TimeoutMs,
    WithBorders,
    answer_type,
    is_original,
    json_for,
    only_known,
    parameter_names,
    with_fields,
)
from server.http.problems import PROBLEM_JSON, document, told
from server.http.reference import BINARY, HEADERS, problem_responses
from server.http.segment.masks import JSON, MEDIA_TYPES, PNG, Asked, Encoded, encoded
from server.http.uploads import MULTIPART, Fields, Part, read_parts
from server.inference.errors import ClientGone, Problem
from server.inference.service import Service
from server.inference.submission import Body, Many, submitted
from server.observe.stages import Stages

__all__ = ["bulk_router"]

log = logging.getLogger("slsnet.server")

NDJSON = "application/x-ndjson"
MIXED = "multipart/mixed"

# The last one is lines too, for clients that take bytes only under this name.
_FORMS = (NDJSON, MIXED, "application/octet-stream")

# So many photos of one request are at work, or wait to be sent, at the same time.
_MAX_AT_WORK = 32

# Seconds after the deadline in which the client may still read the answers.
_FAREWELL_S = 30


def bulk_router(service: Service) -> APIRouter:
    """The routes `/segment/batch` and `/segment/batch/json`."""
    router = APIRouter(tags=["segmentation"])

    def add(
        route: Admitted,
        summary: str,
        forms: Sequence[str],
        responses: dict[int | str, dict[str, Any]],
    ) -> None:
        @router.post(
            route.path,
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
            borders: WithBorders = False,
            features: Features = False,
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
                    "borders": borders,
                    "features": features,
                    "file_names": file_names,
                },
                route.timeout_s(service.settings, x_request_timeout_ms),
            )

    add(BATCH, "Segment the lesions in many photos", _FORMS, _RESPONSES)
    # Generated clients expect one form of answer for each path, and in JSON a single value.
    add(BATCH_JSON, "The same, as one JSON array", (JSON,), _JSON_RESPONSES)
    return router


class _Answers(Response):
    """Reads the photos, and sends the answer of each."""

    def __init__(
        self, service: Service, forms: Sequence[str], given: dict[str, Any], timeout_s: float
    ) -> None:
        super().__init__()
        self._service = service
        self._forms = forms
        self._given = given
        self._timeout_s = timeout_s
        self._boundary = uuid.uuid4().hex

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        service, settings = self._service, self._service.settings
        stages: Stages = request.state.stages
        read = partial(
            read_parts,
            receive,
            request.headers,
            max_bytes=min(settings.bulk_max_bytes, settings.bulk_bytes),
            max_parts=settings.bulk_max_photos,
            max_part_bytes=settings.max_body_bytes,
            parameters=parameter_names(request),
        )
        with service.networks.pinned() as network:
            async with submitted(
                service, receive, stages, self._timeout_s, read, bulk=True
            ) as received:
                photos, fields = received.body
                self._read_options(request, fields)
                many = received.work_on_many(len(photos))
                await send(self._start())
                await self._send_all(request, photos, many, network, send)

    def _start(self) -> Message:
        media_type = self._media_type
        if media_type == MIXED:
            media_type += f"; boundary={self._boundary}"
        headers = {"Content-Type": media_type, "Vary": "Accept", "X-Accel-Buffering": "no"}
        return {
            "type": "http.response.start",
            "status": 200,
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }

    def _read_options(self, request: Request, fields: Fields) -> None:
        given = with_fields(request, self._given, fields)
        self._file_names: bool = given["file_names"]
        mask = given["mask"]
        # A part may be a file of any form.
        is_file = mask in MEDIA_TYPES and not given["features"] and not given["borders"]
        needed_by = "" if is_file else json_for(given)
        self._media_type = answer_type(request.headers, self._forms, needed_by)
        form = str(mask) if self._media_type == MIXED else "json"
        self._part_type = MEDIA_TYPES.get(form, PNG)
        self._asked = Asked(
            given["threshold"],
            is_original(given["size"], mask),
            given["clean"],
            mask,
            given["features"],
            form,
            request.state.request_id,
            given["borders"],
        )

    async def _send_all(
        self,
        request: Request,
        photos: list[Part],
        many: Many,
        network: str,
        send: Send,
    ) -> None:
        waiting = deque(enumerate(photos))
        photos.clear()
        sending = asyncio.Lock()
        opening, between, ending = b"", b"", b""
        if self._media_type == MIXED:
            ending = f"--{self._boundary}--\r\n".encode()
        elif self._media_type == JSON:
            opening, between, ending = b"[", b",", b"]\n"

        async def work() -> None:
            nonlocal opening
            while waiting:
                index, part = waiting.popleft()
                with contextlib.ExitStack() as held:
                    answer = await self._answer(request, index, part, many, network, held)
                    many.give_back(part.size)
                    del part
                    async with sending:
                        body, opening = opening + answer, between
                        await send({"type": "http.response.body", "body": body, "more_body": True})

        info = self._service.backend
        # One more, since the batcher may begin one before a slot is free.
        at_work = min(len(waiting), 2 * info.max_batch * info.slots + 1, _MAX_AT_WORK)
        holds_samples = sample_bytes(self._asked.mask) > 0
        if self._asked.original and (holds_samples or self._asked.mask is MaskFormat.PROBABILITIES):
            # Such answers can be larger than photos, so only one is held at a time.
            at_work = min(at_work, 1)
        workers = asyncio.gather(*(work() for _ in range(at_work)))
        try:
            await asyncio.wait(
                (workers, many.gone),
                timeout=many.deadline.left_s + _FAREWELL_S,
                return_when=asyncio.FIRST_COMPLETED,
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
        many: Many,
        network: str,
        held: contextlib.ExitStack,
    ) -> bytes:
        """The line or part of the answer for one photo."""
        status, answer = 200, Encoded(b"", None)
        media_type = self._part_type if self._media_type == MIXED else JSON
        try:
            answer = await self._service.unless_closing(self._segment(part, many, network, held))
        except ClientGone:
            raise
        except Exception as error:
            if isinstance(error, Problem):
                problem = error
            else:
                log.exception("request %s failed on photo %d", request.state.request_id, index)
                problem = Problem("The server failed on this photo.")
            said = told(problem)
            status, media_type = said.status, PROBLEM_JSON
            members = document(said.status, said.detail, request.url.path, request.state.request_id)
            answer = Encoded(json.dumps(members).encode(), None)
            # Its traceback has this frame: the two would keep each other, and the photo.
            del problem
        self._service.metrics.bulk_photos.labels(str(int(status))).inc()
        if self._media_type == MIXED:
            return self._mixed_part(index, part, int(status), media_type, answer)
        return self._line(index, part, int(status), answer.content)

    def _line(self, index: int, part: Part, status: int, content: bytes) -> bytes:
        head: dict[str, Any] = {"index": index, "name": part.name, "status": status}
        if self._file_names:
            head["file_name"] = part.file_name
        member = "result" if status == 200 else "error"
        # The photo's own answer is JSON already. Both are ASCII, since some readers take U+2028
        # and U+0085 for the end of a line.
        start = json.dumps(head).removesuffix("}")
        return f'{start}, "{member}": '.encode() + content + b"}\n"

    def _mixed_part(
        self, index: int, part: Part, status: int, media_type: str, answer: Encoded
    ) -> bytes:
        file_name: tuple[str, ...] = ()
        if self._file_names and part.file_name is not None:
            file_name = (f"Item-File-Name: {quote(part.file_name, safe='')}",)
        lines = (
            f"--{self._boundary}",
            f"Content-Type: {media_type}",
            f"Content-Length: {len(answer.content)}",
            f"Item-Index: {index}",
            f"Item-Name: {quote(part.name, safe='')}",
            f"Item-Status: {status}",
            *file_name,
            *(f"{name}: {value}" for name, value in answer.headers.items()),
            "\r\n",
        )
        return "\r\n".join(lines).encode() + answer.content + b"\r\n"

    async def _segment(
        self, part: Part, many: Many, network: str, held: contextlib.ExitStack
    ) -> Encoded:
        if isinstance(part.photo, Problem):
            raise part.photo
        stages = Stages()
        with Body(part.photo.data if self._asked.draws_photo else b"") as drawn:
            async with many.work(part.photo, stages) as work, self._service.bulk_photos:
                segmentation = await work.segment(network=network)
                answer = await encoded(work, segmentation, self._asked, drawn, held)
        for stage, seconds in stages.seconds.items():
            self._service.metrics.stage_seconds.labels(stage).observe(seconds)
        return answer


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
        " prefers multipart/mixed, a part with the mask as PNG, or as another form of file that"
        " `mask` names (or a problem document), and the headers Item-Index, Item-Name"
        " (percent-encoded) and Item-Status; with file_names,"
        " Item-File-Name (percent-encoded) too, and Mask-Quality where it is known.",
        "headers": HEADERS,
        "content": {
            # There are many JSON values, which a schema cannot describe.
            NDJSON: BINARY,
            MIXED: BINARY,
            # These are lines too, if `Accept` prefers it, for clients that do not know lines.
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
