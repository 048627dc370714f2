"""The calls of V2 over gRPC: health, metadata, configuration, repository, and inference.

Each is a request to the application of this process (`server.rpc.bridge`). The deadline of a call
is gRPC's own. A client that cancels, or whose deadline passes, counts as one that hung up.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import grpc
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from server.http.errors import BadRequest
from server.http.openinference.protocol import HEADER_LENGTH
from server.rpc.bridge import Answer, Bridge
from server.rpc.codec import request_body, response

__all__ = ["NO_MESSAGE", "OpenInference"]

# Requests of one stream that are worked on at the same time. The stream is not read further while
# so many of its answers are missing.
_AT_ONCE = 8

NO_MESSAGE = "The request is no message of this call: it does not parse as protobuf."
"""What a client is told whose message cannot be read."""

# Metadata that the application knows as headers.
_HEADERS = ("authorization", "x-api-key", "x-request-id", "priority", "traceparent", "tracestate")

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Codes for the statuses of HTTP; all others are INTERNAL."""


class OpenInference(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The service; its methods have the names of the protocol."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    async def ServerLive(self, _: Any, context: Any) -> Any:  # noqa: N802
        """Whether the process works."""
        return pb.ServerLiveResponse(live=await self._is("/v2/health/live", context))

    async def ServerReady(self, _: Any, context: Any) -> Any:  # noqa: N802
        """Whether requests are welcome."""
        return pb.ServerReadyResponse(ready=await self._is("/v2/health/ready", context))

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Whether the model is ready; false for one that is not served."""
        path = f"{_model(request.name, request.version)}/ready"
        return pb.ModelReadyResponse(ready=await self._is(path, context))

    async def ServerMetadata(self, _: Any, context: Any) -> Any:  # noqa: N802
        """The server, and the extensions it has."""
        return _message(pb.ServerMetadataResponse, await self._get("/v2", context))

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The model's tensors."""
        told = await self._get(_model(request.name, request.version), context)
        return _message(pb.ModelMetadataResponse, told)

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The model's configuration, as Triton has it."""
        told = await self._get(f"{_model(request.name, request.version)}/config", context)
        return _message(pb.ModelConfigResponse, {"config": told})

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The networks that serve, and those that may be loaded."""
        told = await self._post("/v2/repository/index", {"ready": request.ready}, context)
        return _message(pb.RepositoryIndexResponse, {"models": told})

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Load a network, or load it again."""
        await self._post(f"{_in_repository(request)}/load", _named(request), context)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Retire a network."""
        await self._post(f"{_in_repository(request)}/unload", _named(request), context)
        return pb.RepositoryModelUnloadResponse()

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Run the network on tensors."""
        answer = await self._infer(request, context)
        if answer.status != 200:
            await _abort(answer, context)
        context.set_trailing_metadata(_trailing(answer))
        return response(answer)

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        """Run the network on each request of a stream, and answer in their order.

        An error is told in place of its answer; the stream goes on.
        """
        answers: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(_AT_ONCE - 1)
        started: set[asyncio.Task[Any]] = set()

        async def read() -> bool:
            """Start what comes; return whether all of it could be read."""
            try:
                async for request in requests:
                    task = asyncio.create_task(self._in_stream(request, context))
                    started.add(task)
                    task.add_done_callback(started.discard)
                    await answers.put(task)
            except DecodeError:
                is_read = False
            else:
                is_read = True
            await answers.put(None)
            return is_read

        reading = asyncio.create_task(read())
        try:
            while (task := await answers.get()) is not None:
                yield await task
            if not await reading:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
        finally:
            for unfinished in (reading, *started):
                unfinished.cancel()

    async def _not_served(self, _: Any, context: Any) -> None:
        """Without it gRPC's library logs a fault for each such call."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "This server does not serve this call.")

    ModelStatistics = TraceSetting = LogSettings = _not_served
    SystemSharedMemoryStatus = SystemSharedMemoryRegister = _not_served
    SystemSharedMemoryUnregister = CudaSharedMemoryStatus = _not_served
    CudaSharedMemoryRegister = CudaSharedMemoryUnregister = _not_served

    async def _in_stream(self, request: Any, context: Any) -> Any:
        answer = await self._infer(request, context)
        if answer.status == 200:
            return pb.ModelStreamInferResponse(infer_response=response(answer))
        failed = pb.ModelStreamInferResponse(error_message=_detail(answer))
        # By it the client knows which request failed.
        failed.infer_response.id = request.id
        return failed

    async def _infer(self, request: Any, context: Any) -> Answer:
        try:
            body, json_bytes = request_body(request)
        except BadRequest as problem:
            return Answer(400, {}, json.dumps({"error": problem.detail}).encode())
        headers = [
            *_headers(context),
            ("content-type", "application/octet-stream"),
            (HEADER_LENGTH.lower(), str(json_bytes)),
        ]
        left_s = context.time_remaining()
        if left_s is not None:
            headers.append(("x-request-timeout-ms", str(max(left_s * 1000, 0.001))))
        path = f"{_model(request.model_name, request.model_version)}/infer"
        return await self._bridge.ask("POST", path, headers, body)

    async def _is(self, path: str, context: Any) -> bool:
        answer = await self._bridge.ask("GET", path, _headers(context))
        if answer.status in (401, 403):
            await _abort(answer, context)
        return answer.status == 200

    async def _get(self, path: str, context: Any) -> Any:
        answer = await self._bridge.ask("GET", path, _headers(context))
        if answer.status != 200:
            await _abort(answer, context)
        return json.loads(answer.body)

    async def _post(self, path: str, body: dict[str, Any], context: Any) -> Any:
        content = json.dumps(body).encode()
        answer = await self._bridge.ask("POST", path, _headers(context), content)
        if answer.status != 200:
            await _abort(answer, context)
        return json.loads(answer.body or b"null")


def _model(name: str, version: str) -> str:
    path = f"/v2/models/{quote(name, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def _in_repository(request: Any) -> str:
    return f"/v2/repository/models/{quote(request.model_name, safe='')}"


def _named(request: Any) -> dict[str, Any]:
    """The names of a call's parameters, none of which have an effect."""
    return {"parameters": dict.fromkeys(request.parameters)}


def _headers(context: Any) -> list[tuple[str, str]]:
    return [
        (name, value)
        for name, value in context.invocation_metadata() or ()
        if name in _HEADERS and isinstance(value, str)
    ]


def _message(kind: Any, told: Any) -> Any:
    return json_format.ParseDict(told, kind(), ignore_unknown_fields=True)


def _detail(answer: Answer) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(answer.body)["error"])
    return f"The server answered with status {answer.status}."


def _trailing(answer: Answer) -> tuple[tuple[str, str], ...]:
    told: list[tuple[str, str]] = [
        (name, answer.headers[name])
        for name in ("x-request-id", "server-timing", "retry-after")
        if name in answer.headers
    ]
    if "retry-after" in answer.headers:
        # gRPC's own retries wait so long (gRFC A6).
        told.append(("grpc-retry-pushback-ms", str(int(answer.headers["retry-after"]) * 1000)))
    return tuple(told)


async def _abort(answer: Answer, context: Any) -> None:
    code = _CODES.get(answer.status, grpc.StatusCode.INTERNAL)
    await context.abort(code, _detail(answer), _trailing(answer))
