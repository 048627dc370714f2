"""Open Inference Protocol V2 over HTTP: the network itself, for clients that speak tensors.

It serves the protocol's "required API" (health, metadata and inference), the binary tensor
extension and Triton's model configuration; `server.http.openinference.repository` has its model
repository. An unmodified `tritonclient` works:
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md

The tensors are the network's own: `image`, uint8 [n, 128, 128, 3] RGB, and `probability`, float32
[n, 128, 128]. Each image enters the queue by itself, with the limits and deadlines of a photo sent
to `/segment`. Errors have the protocol's shape (`problems.answer`).
"""

import zlib
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, params
from starlette.responses import Response

from server.backends import BackendInfo
from server.http.errors import BadRequest, NotFound
from server.http.openinference.codec import answer, json_length, parse
from server.http.openinference.protocol import (
    HEADER_LENGTH,
    IMAGE_BYTES,
    INFER_ANSWERS,
    INFER_BODY,
    INPUT,
    MODEL_PATH,
    OUTPUT,
    SIDE,
    VERSION,
    VERSION_PATH,
    ConfigTensor,
    LiveAnswer,
    ModelConfig,
    ModelMetadata,
    ModelReadyAnswer,
    ReadyAnswer,
    ServerMetadata,
    TensorMetadata,
    errors,
)
from server.http.parameters import Priority, TimeoutMs, is_bulk
from server.http.uploads import read_body
from server.inference.errors import TooLarge, UnsupportedType
from server.inference.served import Served
from server.inference.service import Service
from server.inference.submission import Body, submitted
from server.observe.stages import Stages
from server.settings import DEFAULT_NETWORK

__all__ = ["openinference_router"]

# The most bytes that one step of decompression reads, and writes.
_DEFLATED_BYTES = 2**18
_INFLATED_BYTES = 2**20

_TAGS: list[str | Enum] = ["open inference protocol"]


_Model = Annotated[str, Path(description="of the model", examples=[DEFAULT_NETWORK])]


async def _known_version(
    model: _Model, version: Annotated[str, Path(description="of the model", examples=[VERSION])]
) -> None:
    if version != VERSION:
        raise NotFound(
            f"There is no version {version[:80]!r} of {model[:80]!r}: there is {VERSION!r}."
        )


def openinference_router(service: Service, server_version: str) -> APIRouter:
    """The routes under `/v2`."""
    router = APIRouter(prefix="/v2", tags=_TAGS)

    @router.get("", summary="The server, and the extensions it has")
    async def server_metadata() -> ServerMetadata:
        return ServerMetadata(
            name="slsnet-server",
            version=server_version,
            extensions=["binary_tensor_data", "model_configuration", "model_repository"],
        )

    @router.get("/health/live", summary="Whether the process works")
    async def live() -> LiveAnswer:
        return LiveAnswer()

    @router.get("/health/ready", summary="Whether to send requests here", responses=errors(503))
    async def ready() -> ReadyAnswer:
        service.check_server_ready()
        return ReadyAnswer()

    every = APIRouter()
    every.include_router(router)
    every.include_router(_model_router(service, MODEL_PATH, []))
    every.include_router(_model_router(service, VERSION_PATH, [Depends(_known_version)]))
    return every


def _model_router(service: Service, prefix: str, known: list[params.Depends]) -> APIRouter:
    # The prefix is the router's own. A prefix given on inclusion would be missing from the route's
    # path, by which requests are counted.
    router = APIRouter(prefix=prefix, tags=_TAGS, dependencies=known)
    settings = service.settings

    async def named(model: _Model) -> Served:
        return service.networks.named(model)

    @router.get("", summary="The model's tensors", responses=errors(404, 503))
    async def metadata(served: Annotated[Served, Depends(named)]) -> ModelMetadata:
        return ModelMetadata(
            name=served.name,
            versions=[VERSION],
            platform=_platform(served.current.info),
            inputs=[TensorMetadata(name=INPUT, datatype="UINT8", shape=[-1, SIDE, SIDE, 3])],
            outputs=[TensorMetadata(name=OUTPUT, datatype="FP32", shape=[-1, SIDE, SIDE])],
        )

    @router.get("/ready", summary="Whether the model is ready", responses=errors(404, 503))
    async def ready(served: Annotated[Served, Depends(named)]) -> ModelReadyAnswer:
        service.check_ready(served.name)
        return ModelReadyAnswer(name=served.name)

    @router.get(
        "/config",
        summary="The model's configuration, as Triton has it",
        responses=errors(404, 503),
    )
    async def config(served: Annotated[Served, Depends(named)]) -> ModelConfig:
        return ModelConfig(
            name=served.name,
            platform=_platform(served.current.info),
            max_batch_size=settings.bulk_queue,
            input=[ConfigTensor(name=INPUT, data_type="TYPE_UINT8", dims=[SIDE, SIDE, 3])],
            output=[ConfigTensor(name=OUTPUT, data_type="TYPE_FP32", dims=[SIDE, SIDE])],
        )

    @router.post(
        "/infer",
        summary="Run the network on tensors",
        response_class=Response,
        responses=INFER_ANSWERS,
        openapi_extra=INFER_BODY,
    )
    async def infer(
        request: Request,
        served: Annotated[Served, Depends(named)],
        x_request_timeout_ms: TimeoutMs = None,
        priority: Priority = "",
    ) -> Response:
        return await _infer(service, served.name, request, x_request_timeout_ms, priority)

    return router


async def _infer(
    service: Service, network: str, request: Request, timeout_ms: float | None, priority: str
) -> Response:
    settings = service.settings
    stages: Stages = request.state.stages
    async with submitted(
        service,
        request.receive,
        stages,
        settings.timeout_s(timeout_ms),
        partial(_read, request, service),
        bulk=is_bulk(priority),
        network=network,
    ) as received:
        length = json_length(received.body.data, request.headers)
        asked, images = await received.parse(
            parse,
            length,
            settings.bulk_queue,
            # Parsed images take many times the bytes that they count for. A shorter JSON
            # has no images in it, and need not wait for others.
            alone=length > IMAGE_BYTES,
        )
        wishes = asked.parameters
        async with received.work(
            len(images),
            places=len(images),
            timeout_us=wishes.timeout,
            bulk=wishes.priority > 1,
        ) as work:
            results, _ = await work.infer(images)
            stages.notes["batch"] = str(max(result.batch_size for result in results))
            content, header_length = await work.encode(
                lambda: answer(network, asked, [result.probability for result in results])
            )
    if header_length is None:
        return Response(content, media_type="application/json")
    return Response(
        content,
        media_type="application/octet-stream",
        headers={HEADER_LENGTH: str(header_length)},
    )


def _platform(backend: BackendInfo) -> str:
    return f"{backend.name}_{backend.precision}"


async def _read(request: Request, service: Service, take: Callable[[int], None]) -> Body:
    """The request's body, decompressed, with at most `max_body_bytes`."""
    most = service.settings.max_body_bytes
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "deflate"):
        raise UnsupportedType(
            f"Content-Encoding {encoding[:40]!r} is not served: send gzip, deflate or none."
        )
    received = await read_body(request.receive, request.headers, take, max_bytes=most)
    if encoding == "identity":
        return received
    body = received.take()
    # "deflate" is zlib's format (RFC 9110, 8.4.1.2).
    inflater = zlib.decompressobj(wbits=31 if encoding == "gzip" else 15)
    parts: list[bytes] = []
    size = 0
    for start in range(0, len(body), _DEFLATED_BYTES):
        piece = body[start : start + _DEFLATED_BYTES]
        while piece and not inflater.eof:
            try:
                part = await service.threads.run(inflater.decompress, piece, _INFLATED_BYTES)
            except zlib.error as error:
                raise BadRequest(f"The body is not {encoding}: {error}.") from error
            piece = inflater.unconsumed_tail
            size += len(part)
            if size > most:
                raise TooLarge(f"The decompressed body has more than the {most} bytes allowed.")
            take(len(part))
            parts.append(part)
    if not inflater.eof:
        raise BadRequest(f"The {encoding} body ends too early.")
    return Body(b"".join(parts))
