"""Open Inference Protocol V2 over HTTP: the network itself, for clients that speak tensors.

Health, metadata and inference as in the protocol's "required API", with the binary tensor
extension and Triton's model configuration, so that an unmodified `tritonclient` works:
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md

Tensors are what the network takes and gives: `image`, uint8 [n, 128, 128, 3] RGB, and
`probability`, float32 [n, 128, 128]. Each image enters the queue for itself, under the same limits
and deadlines as a photo sent to `/segment`. Errors have the protocol's shape (`problems.answer`).
"""

import json
import re
import zlib
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Path, Request, params
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.responses import Response

from photos.image import MODEL_SIZE
from server.backends import BackendInfo
from server.http.parameters import Priority, TimeoutMs, is_bulk
from server.http.reference import HEADERS, error_content, error_headers, inlined
from server.http.uploads import read_body
from server.inference.errors import BadRequest, NotFound, Problem, TooLarge, UnsupportedType
from server.inference.service import Service
from server.inference.submission import Body, submitted
from server.observe.stages import Stages

__all__ = ["INFER_PATHS", "openinference_router"]

NAME = "slsnet"
VERSION = "1"
"""Of the contract (the two tensors); the weights' own version is in `GET /model`."""

_MODEL_PATH = "/v2/models/{model}"
_VERSION_PATH = f"{_MODEL_PATH}/versions/{{version}}"
INFER_PATHS = {
    f"{path}/infer".format(model=NAME, version=VERSION): f"{path}/infer"
    for path in (_MODEL_PATH, _VERSION_PATH)
}
"""Where tensors are sent, and the path of its route."""

INPUT = "image"
OUTPUT = "probability"
_SIDE = MODEL_SIZE
_IMAGE_BYTES = _SIDE * _SIDE * 3
_MAP_BYTES = _SIDE * _SIDE * 4

# Of JSON: as Python's lists and numbers it takes many times the memory, and whoever parses it holds
# up everyone else.
_MAX_JSON_BYTES = 4 * 2**20

# An image that is nested as its shape is has 1 + 128 + 128 * 128 lists, and 131,000 characters if
# all of its values have one digit: 31 images fit, with 512,000 lists. Without this limit
# there could be two million.
_MAX_LISTS = 2**19

# A request with one input and one output has five. Each takes more than twice as much as a list.
_MAX_OBJECTS = 1000

# Decompressed at a time, from so much and to so much at most.
_DEFLATED_BYTES = 2**18
_INFLATED_BYTES = 2**20

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_HEADER_LENGTH = "Inference-Header-Content-Length"

# Of a request with binary tensors, the JSON that comes first is shorter.
_LONGEST_HEADER = 2**16
_BINARY_SIZE = b'"binary_data_size"'


class _Message(BaseModel):
    # The protocol wants members that a server does not know ignored.
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class ServerMetadata(_Message):
    """The server."""

    name: str = Field(examples=["slsnet-server"])
    version: str = Field(examples=["0.1.0"])
    extensions: list[str] = Field(examples=[["binary_tensor_data", "model_configuration"]])


class LiveAnswer(_Message):
    """Whether the process works."""

    live: Literal[True] = True


class ReadyAnswer(_Message):
    """Whether requests are welcome."""

    ready: Literal[True] = True


class ModelReadyAnswer(_Message):
    """Whether the model is ready."""

    name: str = Field(examples=[NAME])
    ready: Literal[True] = True


class TensorMetadata(_Message):
    """A tensor that the model takes or gives; -1 is any size."""

    name: str = Field(examples=[INPUT])
    datatype: str = Field(examples=["UINT8"])
    shape: list[int] = Field(examples=[[-1, 128, 128, 3]])


class ModelMetadata(_Message):
    """The model's tensors."""

    name: str = Field(examples=[NAME])
    versions: list[str] = Field(examples=[[VERSION]])
    platform: str = Field(description="what runs it, and how", examples=["onnxruntime_fp32"])
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ConfigTensor(_Message):
    """A tensor in a model's configuration, without its batch dimension."""

    name: str = Field(examples=[INPUT])
    data_type: str = Field(examples=["TYPE_UINT8"])
    dims: list[int] = Field(examples=[[128, 128, 3]])


class ModelConfig(_Message):
    """The part of Triton's model configuration that clients read."""

    name: str = Field(examples=[NAME])
    platform: str = Field(examples=["onnxruntime_fp32"])
    max_batch_size: int = Field(description="most images in one request", examples=[128])
    input: list[ConfigTensor]
    output: list[ConfigTensor]


class RequestParameters(_Message):
    """Of a request as a whole."""

    binary_data_output: StrictBool = Field(
        False, description="all outputs as binary data, if none is asked for by name"
    )
    timeout: StrictInt | None = Field(None, ge=1, description="microseconds")
    priority: StrictInt = Field(
        0, ge=0, description="1 or 0 is the default; what is greater lets others go first"
    )


class InputParameters(_Message):
    """Of an input."""

    binary_data_size: StrictInt | None = Field(
        None, ge=0, description="bytes after the JSON that hold it"
    )
    shared_memory_region: str | None = Field(None, description="not served")


class RequestInput(_Message):
    """The images."""

    name: str = Field(examples=[INPUT])
    shape: list[StrictInt] = Field(examples=[[1, 128, 128, 3]])
    datatype: str = Field(examples=["UINT8"])
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = Field(
        None, description="values in row-major order, flat or nested; absent for binary data"
    )


class OutputParameters(_Message):
    """Of an output that is asked for."""

    binary_data: StrictBool = Field(False, description="as binary data, after the JSON")
    classification: StrictInt = Field(0, description="not served")
    shared_memory_region: str | None = Field(None, description="not served")


class RequestOutput(_Message):
    """An output that is asked for."""

    name: str = Field(examples=[OUTPUT])
    parameters: OutputParameters = OutputParameters()


class InferRequest(_Message):
    """A request for inference; binary tensors follow it in the body."""

    id: str | None = Field(None, description="comes back in the answer")
    parameters: RequestParameters = RequestParameters()
    inputs: list[RequestInput]
    outputs: list[RequestOutput] = []


class AnswerParameters(_Message):
    """Of an output."""

    binary_data_size: int = Field(description="bytes after the JSON that hold it")


class AnswerOutput(_Message):
    """The probabilities."""

    name: str = Field(examples=[OUTPUT])
    shape: list[int] = Field(examples=[[1, 128, 128]])
    datatype: str = Field(examples=["FP32"])
    parameters: AnswerParameters | None = None
    data: list[float] | None = Field(None, description="row-major; absent for binary data")


class InferAnswer(_Message):
    """The answer to a request for inference; binary tensors follow it in the body."""

    model_name: str = Field(examples=[NAME])
    model_version: str = Field(examples=[VERSION])
    id: str | None = Field(None, description="the request's")
    outputs: list[AnswerOutput]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {
            "description": _ERRORS[status][0],
            "headers": error_headers(status),
            "content": {"application/json": error_content(_ERRORS[status][1])},
        }
        for status in statuses
    }


_ERRORS = {
    400: (
        "Not a request of the protocol, or not for these tensors.",
        "The input is called 'image', not 'input_0'.",
    ),
    404: (
        "There is no such model, version or path.",
        "There is no model 'resnet': the one that is served is 'slsnet'.",
    ),
    413: (
        "More bytes, JSON or images than allowed.",
        "200 images are more than the 128 that one request may have.",
    ),
    415: (
        "A Content-Encoding that is not served.",
        "Content-Encoding 'br' is not served: send gzip, deflate or none.",
    ),
    422: (
        "A header whose value is out of range.",
        "header.x-request-timeout-ms: Input should be greater than 0, got '-1'.",
    ),
    429: (
        "The server is full, or a key is used faster than allowed; Retry-After says when to come"
        " back.",
        "The server is busy: the queue is full. Try again in about 3 s (Retry-After).",
    ),
    500: (
        "The network failed on an image, in its batch and once more alone.",
        "The network failed on this photo twice. Trying again later may work; if it does not,"
        " report the request_id.",
    ),
    503: (
        "Not ready, draining, failing, or out of connections.",
        "The network is still being loaded. Try again when GET /health/ready answers 200.",
    ),
    504: (
        "The request's deadline passed.",
        "The deadline passed before the photo reached the network. Send it again when the server"
        " is less busy, or allow more time with X-Request-Timeout-Ms.",
    ),
}

_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}

_INFER_BODY: dict[str, Any] = {
    "parameters": [
        {
            "name": _HEADER_LENGTH,
            "in": "header",
            "required": False,
            "description": "bytes of JSON at the start of the body; binary tensors follow",
            "example": 166,
            "schema": {"type": "integer", "minimum": 0},
        }
    ],
    "requestBody": {
        "required": True,
        "description": "JSON, or JSON with binary tensors behind it; may be compressed"
        " (`Content-Encoding: gzip` or `deflate`).",
        "content": {
            "application/json": {"schema": inlined(InferRequest.model_json_schema())},
            "application/octet-stream": _BINARY,
        },
    },
}

_INFER_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": InferAnswer,
        "description": "The lesion's probability for every pixel.",
        "headers": {
            **HEADERS,
            _HEADER_LENGTH: {
                "description": "bytes of JSON at the start of a body with binary tensors",
                "schema": {"type": "integer"},
            },
        },
        "content": {"application/octet-stream": _BINARY},
    },
    **_errors(400, 404, 413, 415, 422, 429, 500, 503, 504),
}


async def _known_model(
    model: Annotated[str, Path(description="of the model", examples=[NAME])],
) -> None:
    if model != NAME:
        raise NotFound(f"There is no model {model[:80]!r}: the one that is served is {NAME!r}.")


async def _known_version(
    version: Annotated[str, Path(description="of the model", examples=[VERSION])],
) -> None:
    if version != VERSION:
        raise NotFound(f"There is no version {version[:80]!r} of {NAME!r}: there is {VERSION!r}.")


_TAGS: list[str | Enum] = ["open inference protocol"]


def openinference_router(service: Service, server_version: str) -> APIRouter:
    """The paths under `/v2`."""
    router = APIRouter(prefix="/v2", tags=_TAGS)

    @router.get("", summary="The server, and the extensions it has")
    async def server_metadata() -> ServerMetadata:
        return ServerMetadata(
            name="slsnet-server",
            version=server_version,
            extensions=["binary_tensor_data", "model_configuration"],
        )

    @router.get("/health/live", summary="Whether the process works")
    async def live() -> LiveAnswer:
        return LiveAnswer()

    @router.get("/health/ready", summary="Whether to send requests here", responses=_errors(503))
    async def ready() -> ReadyAnswer:
        service.check_ready()
        return ReadyAnswer()

    every = APIRouter()
    every.include_router(router)
    is_model, is_version = Depends(_known_model), Depends(_known_version)
    every.include_router(_model_router(service, _MODEL_PATH, [is_model]))
    every.include_router(_model_router(service, _VERSION_PATH, [is_model, is_version]))
    return every


def _model_router(service: Service, prefix: str, known: list[params.Depends]) -> APIRouter:
    # Its own prefix, not that of an inclusion: a route's path, by which requests are counted, has
    # only the former.
    router = APIRouter(prefix=prefix, tags=_TAGS, dependencies=known)
    settings = service.settings

    @router.get("", summary="The model's tensors", responses=_errors(404, 503))
    async def metadata() -> ModelMetadata:
        return ModelMetadata(
            name=NAME,
            versions=[VERSION],
            platform=_platform(service.backend),
            inputs=[TensorMetadata(name=INPUT, datatype="UINT8", shape=[-1, _SIDE, _SIDE, 3])],
            outputs=[TensorMetadata(name=OUTPUT, datatype="FP32", shape=[-1, _SIDE, _SIDE])],
        )

    @router.get("/ready", summary="Whether the model is ready", responses=_errors(404, 503))
    async def ready() -> ModelReadyAnswer:
        service.check_ready()
        return ModelReadyAnswer(name=NAME)

    @router.get(
        "/config",
        summary="The model's configuration, as Triton has it",
        responses=_errors(404, 503),
    )
    async def config() -> ModelConfig:
        return ModelConfig(
            name=NAME,
            platform=_platform(service.backend),
            max_batch_size=settings.bulk_queue,
            input=[ConfigTensor(name=INPUT, data_type="TYPE_UINT8", dims=[_SIDE, _SIDE, 3])],
            output=[ConfigTensor(name=OUTPUT, data_type="TYPE_FP32", dims=[_SIDE, _SIDE])],
        )

    @router.post(
        "/infer",
        summary="Run the network on tensors",
        response_class=Response,
        responses=_INFER_ANSWERS,
        openapi_extra=_INFER_BODY,
    )
    async def infer(
        request: Request, x_request_timeout_ms: TimeoutMs = None, priority: Priority = ""
    ) -> Response:
        return await _infer(service, request, x_request_timeout_ms, priority)

    return router


async def _infer(
    service: Service, request: Request, timeout_ms: float | None, priority: str
) -> Response:
    settings = service.settings
    stages: Stages = request.state.stages
    with submitted(
        service,
        request.receive,
        stages,
        settings.timeout_s(timeout_ms),
        bulk=is_bulk(priority),
    ) as submission:
        body = Body(await submission.receive(partial(_read, request, service)))
        length = _json_length(body.data, request.headers)
        asked, images = await submission.parse(
            body,
            _parse,
            length,
            settings.bulk_queue,
            # Parsed, images take many times the bytes that they count for. What is shorter
            # than this has none in its JSON, and need not wait for others.
            alone=length > _IMAGE_BYTES,
        )
        wishes = asked.parameters
        submission.change(timeout_us=wishes.timeout, bulk=wishes.priority > 1)
        async with submission.work(len(images), places=len(images)) as work:
            results, _ = await work.infer(images)
            stages.notes["batch"] = str(max(result.batch_size for result in results))
            content, header_length = await work.encode(
                lambda: _answer(asked, [result.probability for result in results])
            )
    if header_length is None:
        return Response(content, media_type="application/json")
    return Response(
        content,
        media_type="application/octet-stream",
        headers={_HEADER_LENGTH: str(header_length)},
    )


def _platform(backend: BackendInfo) -> str:
    return f"{backend.name}_{backend.precision}"


async def _read(request: Request, service: Service, take: Callable[[int], None]) -> bytes:
    """The request's body, decompressed; never more than `max_body_bytes`."""
    most = service.settings.max_body_bytes
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "deflate"):
        raise UnsupportedType(
            f"Content-Encoding {encoding[:40]!r} is not served: send gzip, deflate or none."
        )
    body = await read_body(request.receive, request.headers, take, max_bytes=most)
    if encoding == "identity":
        return body
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
    return b"".join(parts)


def _check_untold(body: bytes) -> None:
    """Refuse binary tensors whose sender forgot to say where they begin."""
    start = body[:_LONGEST_HEADER]
    goes_on = body[-16:].rstrip()[-1:] != b"}"
    if start.lstrip()[:1] == b"{" and (b"\0" in start or (_BINARY_SIZE in start and goes_on)):
        raise BadRequest(
            f"Binary tensors follow the JSON, but the header {_HEADER_LENGTH} is missing: send in"
            " it how many bytes of the body are JSON."
        )


def _json_length(body: bytes, headers: Headers) -> int:
    """How many bytes of a body are JSON."""
    length = size = len(body)
    header_length = headers.get(_HEADER_LENGTH)
    if header_length is None:
        _check_untold(body)
    else:
        if not (header_length.isascii() and header_length.isdigit()) or len(header_length) > 18:
            raise BadRequest(f"{_HEADER_LENGTH} is not a number of bytes.")
        length = int(header_length)
        if length > size:
            raise BadRequest(f"{_HEADER_LENGTH} says {length}, the body has {size} bytes.")
    if length > _MAX_JSON_BYTES:
        raise TooLarge(
            f"{length} bytes of JSON are more than the {_MAX_JSON_BYTES} allowed: send the tensor"
            " as binary data."
        )
    return length


def _parse(body: Body, length: int, most: int) -> tuple[InferRequest, list[NDArray[np.uint8]]]:
    """A body → the request without its inputs, and its images, each uint8 [128, 128, 3].

    Args:
        body: is taken.
        length: of the JSON at its start.
        most: images.
    """
    try:
        return _parsed(body.take(), length, most)
    except Problem as problem:
        # Its traceback, and whatever it comes from, would hold all that was parsed.
        problem.__context__ = None
        raise problem.with_traceback(None) from None


def _parsed(body: bytes, length: int, most: int) -> tuple[InferRequest, list[NDArray[np.uint8]]]:
    for bracket, of_what, allowed in ((b"[", "lists", _MAX_LISTS), (b"{", "objects", _MAX_OBJECTS)):
        # Those in strings are counted too: nobody has so many.
        count = body.count(bracket, 0, length)
        if count > allowed:
            raise TooLarge(
                f"{count} {of_what} in the JSON are more than the {allowed} allowed: send the"
                " tensor as binary data."
            )
    try:
        if _SURROGATE.search(body, 0, length):
            # Unlike Python's, this parser refuses halves of them.
            from_json(body[:length])
        # UTF-8 alone, and strictly: else halves of surrogate pairs get in, which no answer can say.
        asked = InferRequest.model_validate(json.loads(str(body[:length], "utf-8-sig")))
    except ValidationError as error:
        details = (
            f"{'.'.join(map(str, item['loc'])) or 'the request'}: {item['msg']}"
            for item in error.errors(include_input=False, include_url=False)[:5]
        )
        raise BadRequest("; ".join(details) + ".") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The request is not JSON: {str(error)[:200]}.") from error
    _check_outputs(asked.outputs)
    images = _images(asked.inputs, memoryview(body)[length:], most)
    # The answer has no use for them.
    asked.inputs.clear()
    return asked, images


def _check_outputs(outputs: Sequence[RequestOutput]) -> None:
    if len(outputs) > 1:
        raise BadRequest(f"There is one output, {OUTPUT!r}: ask for it once.")
    for output in outputs:
        if output.name != OUTPUT:
            raise BadRequest(f"The output is called {OUTPUT!r}, not {output.name[:80]!r}.")
        if output.parameters.classification or output.parameters.shared_memory_region:
            raise BadRequest("Classification and shared memory are not served.")


def _images(
    inputs: Sequence[RequestInput], binary: memoryview, most: int
) -> list[NDArray[np.uint8]]:
    if len(inputs) != 1:
        raise BadRequest(f"There is one input, {INPUT!r}; the request has {len(inputs)}.")
    tensor = inputs[0]
    if tensor.name != INPUT:
        raise BadRequest(f"The input is called {INPUT!r}, not {tensor.name[:80]!r}.")
    if tensor.datatype != "UINT8":
        raise BadRequest(f"The datatype of {INPUT!r} is UINT8, not {tensor.datatype[:20]!r}.")
    count, *rest = tensor.shape or [0]
    if rest != [_SIDE, _SIDE, 3] or count < 1:
        raise BadRequest(
            f"The shape of {INPUT!r} is [n, {_SIDE}, {_SIDE}, 3], not {str(tensor.shape)[:80]}."
        )
    if count > most:
        raise TooLarge(f"{count} images are more than the {most} that one request may have.")
    if tensor.parameters.shared_memory_region:
        raise BadRequest("Shared memory is not served: send the tensor's bytes.")
    size = tensor.parameters.binary_data_size
    if size is None:
        if tensor.data is None:
            raise BadRequest(f"The input {INPUT!r} has neither data nor a binary_data_size.")
        if len(binary):
            raise BadRequest("Binary data follows the JSON, but no input has a binary_data_size.")
        data: bytes | memoryview = _values(tensor.data)
    else:
        if tensor.data is not None:
            raise BadRequest(f"The input {INPUT!r} has both data and a binary_data_size.")
        if size != len(binary):
            raise BadRequest(
                f"binary_data_size is {size}, but {len(binary)} bytes follow the JSON"
                f" ({_HEADER_LENGTH} says where it ends)."
            )
        data = binary
    if len(data) != count * _IMAGE_BYTES:
        raise BadRequest(
            f"The shape {tensor.shape} takes {count * _IMAGE_BYTES} values, there are {len(data)}."
        )
    return list(np.frombuffer(data, np.uint8).reshape(count, _SIDE, _SIDE, 3))


def _values(data: list[Any]) -> bytes:
    """Integers 0 to 255, flat or nested, in row-major order."""
    try:
        # Once less than there are dimensions.
        for _ in range(3):
            if data and isinstance(data[0], list):
                data = list(chain.from_iterable(data))
        return bytes(data)
    except (TypeError, ValueError) as error:
        raise BadRequest(
            f"The data of {INPUT!r} must be integers from 0 to 255, flat or nested as the shape is."
        ) from error


def _answer(
    asked: InferRequest, probabilities: Sequence[NDArray[np.float32]]
) -> tuple[bytes, int | None]:
    """The answer's body, and how much of it is JSON if binary data follows."""
    binary = (
        asked.outputs[0].parameters.binary_data
        if asked.outputs
        else asked.parameters.binary_data_output
    )
    shape = [len(probabilities), _SIDE, _SIDE]
    output = AnswerOutput(name=OUTPUT, shape=shape, datatype="FP32")
    if binary:
        output.parameters = AnswerParameters(binary_data_size=len(probabilities) * _MAP_BYTES)
    answer = InferAnswer(model_name=NAME, model_version=VERSION, id=asked.id, outputs=[output])
    header = answer.model_dump_json(exclude_none=True).encode()
    if binary:
        # Little-endian, as the extension has it.
        return b"".join([header, *(p.astype("<f4").tobytes() for p in probabilities)]), len(header)
    # Map by map: a single call would hold up all other threads for as long as all maps take.
    values = ",".join(json.dumps(p.ravel().tolist())[1:-1] for p in probabilities)
    return header.removesuffix(b"}]}") + b',"data":[' + values.encode() + b"]}]}", None
