"""The protocol's messages, and their description for `GET /docs`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from photos.image import MODEL_SIZE
from server.http.problems import EXAMPLES
from server.http.reference import HEADERS, error_content, error_headers, inlined
from server.settings import DEFAULT_NETWORK

__all__ = [
    "HEADER_LENGTH",
    "IMAGE_BYTES",
    "INFER_ANSWERS",
    "INFER_BODY",
    "INFER_PATHS",
    "INPUT",
    "MODEL_PATH",
    "OUTPUT",
    "SIDE",
    "VERSION",
    "VERSION_PATH",
    "AnswerOutput",
    "AnswerParameters",
    "ConfigTensor",
    "IndexEntry",
    "IndexRequest",
    "InferAnswer",
    "InferRequest",
    "InputParameters",
    "LiveAnswer",
    "LoadRequest",
    "ModelConfig",
    "ModelMetadata",
    "ModelReadyAnswer",
    "OutputParameters",
    "ReadyAnswer",
    "RequestInput",
    "RequestOutput",
    "RequestParameters",
    "ServerMetadata",
    "TensorMetadata",
    "errors",
]

VERSION = "1"
"""Version of the two tensors; the weights' own version is in `GET /model`."""

MODEL_PATH = "/v2/models/{model}"
VERSION_PATH = f"{MODEL_PATH}/versions/{{version}}"
INFER_PATHS = {
    f"{path}/infer".format(model=DEFAULT_NETWORK, version=VERSION): f"{path}/infer"
    for path in (MODEL_PATH, VERSION_PATH)
}
"""Each path that tensors for the default network are sent to, with the path of its route."""

INPUT = "image"
OUTPUT = "probability"
SIDE = MODEL_SIZE
IMAGE_BYTES = SIDE * SIDE * 3

HEADER_LENGTH = "Inference-Header-Content-Length"


class _Message(BaseModel):
    # The protocol asks servers to ignore unknown members.
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class ServerMetadata(_Message):
    """The server's name and version, and the extensions of the protocol that it serves."""

    name: str = Field(examples=["slsnet-server"])
    version: str = Field(examples=["0.1.0"])
    extensions: list[str] = Field(
        examples=[["binary_tensor_data", "model_configuration", "model_repository"]]
    )


class LiveAnswer(_Message):
    """Whether the process works."""

    live: Literal[True] = True


class ReadyAnswer(_Message):
    """Whether requests are welcome."""

    ready: Literal[True] = True


class ModelReadyAnswer(_Message):
    """Whether the model is ready."""

    name: str = Field(examples=[DEFAULT_NETWORK])
    ready: Literal[True] = True


class TensorMetadata(_Message):
    """A tensor that the model takes or gives; -1 is any size."""

    name: str = Field(examples=[INPUT])
    datatype: str = Field(examples=["UINT8"])
    shape: list[int] = Field(examples=[[-1, 128, 128, 3]])


class ModelMetadata(_Message):
    """The model's tensors."""

    name: str = Field(examples=[DEFAULT_NETWORK])
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

    name: str = Field(examples=[DEFAULT_NETWORK])
    platform: str = Field(examples=["onnxruntime_fp32"])
    max_batch_size: int = Field(description="most images in one request", examples=[128])
    input: list[ConfigTensor]
    output: list[ConfigTensor]


class RequestParameters(_Message):
    """What a client may ask of a request as a whole; none is needed."""

    binary_data_output: StrictBool = Field(
        False, description="all outputs as binary data, if none is asked for by name"
    )
    timeout: StrictInt | None = Field(None, ge=1, description="microseconds")
    priority: StrictInt = Field(
        0, ge=0, description="1 or 0 is the default; what is greater lets others go first"
    )


class InputParameters(_Message):
    """Where a client has put an input's values, if not in the JSON."""

    binary_data_size: StrictInt | None = Field(
        None, ge=0, description="bytes after the JSON that hold it"
    )
    shared_memory_region: str | None = Field(None, description="not served")


class RequestInput(_Message):
    """A client's images, uint8 RGB [images, 128, 128, 3]."""

    name: str = Field(examples=[INPUT])
    shape: list[StrictInt] = Field(examples=[[1, 128, 128, 3]])
    datatype: str = Field(examples=["UINT8"])
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = Field(
        None, description="values in row-major order, flat or nested; absent for binary data"
    )


class OutputParameters(_Message):
    """How a client wants an output to be sent."""

    binary_data: StrictBool = Field(False, description="as binary data, after the JSON")
    classification: StrictInt = Field(0, description="not served")
    shared_memory_region: str | None = Field(None, description="not served")


class RequestOutput(_Message):
    """An output that a client asks for; without any it gets them all."""

    name: str = Field(examples=[OUTPUT])
    parameters: OutputParameters = OutputParameters()


class InferRequest(_Message):
    """A request for inference; binary tensors follow it in the body."""

    id: str | None = Field(None, description="comes back in the answer")
    parameters: RequestParameters = RequestParameters()
    inputs: list[RequestInput]
    outputs: list[RequestOutput] = []


class AnswerParameters(_Message):
    """Parameters of an output."""

    binary_data_size: int = Field(description="bytes after the JSON that hold it")


class AnswerOutput(_Message):
    """The server's probabilities of lesion, 0 to 1, float32 [images, 128, 128]."""

    name: str = Field(examples=[OUTPUT])
    shape: list[int] = Field(examples=[[1, 128, 128]])
    datatype: str = Field(examples=["FP32"])
    parameters: AnswerParameters | None = None
    data: list[float] | None = Field(None, description="row-major; absent for binary data")


class InferAnswer(_Message):
    """The answer to a request for inference; binary tensors follow it in the body."""

    model_name: str = Field(examples=[DEFAULT_NETWORK])
    model_version: str = Field(examples=[VERSION])
    id: str | None = Field(None, description="the request's")
    outputs: list[AnswerOutput]


class IndexRequest(_Message):
    """What of the index is asked for."""

    ready: StrictBool = Field(False, description="only the networks that serve")


class IndexEntry(_Message):
    """A network that serves, or that may be loaded."""

    name: str = Field(examples=[DEFAULT_NETWORK])
    version: str = Field(examples=[VERSION])
    state: Literal["READY", "UNAVAILABLE"]
    reason: str = Field(description="why it is not ready", examples=["it is not loaded"])


class LoadRequest(_Message):
    """How a network is loaded, or retired."""

    parameters: dict[str, Any] = Field(
        {}, description="none is served but `unload_dependents`, which changes nothing"
    )


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a path, for `GET /docs`."""
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
        "It is no request of the protocol, or not for these tensors.",
        "The input is called 'image', not 'input_0'.",
    ),
    403: ("The key is no administrator's.", "This path needs an administrator's key: send one."),
    404: (
        "There is no such model, version or path.",
        "There is no network 'resnet': the one that serves is 'slsnet'.",
    ),
    413: (
        "There are more bytes, JSON or images than allowed.",
        "200 images are more than the 128 that one request may have.",
    ),
    415: (
        "The Content-Encoding is not served.",
        "Content-Encoding 'br' is not served: send gzip, deflate or none.",
    ),
    422: (
        "The value of a header is out of range, or a network cannot serve.",
        "header.x-request-timeout-ms: Input should be greater than 0, got '-1'.",
    ),
    429: (
        "The server is full, or a key is used faster than allowed; Retry-After says when to come"
        " back.",
        EXAMPLES[429],
    ),
    500: (
        "The network failed on an image, in its batch and once more alone.",
        EXAMPLES[500],
    ),
    503: (
        "The server is not ready, drains, fails, or has no connection left.",
        EXAMPLES[503],
    ),
    504: (
        "The request's deadline passed.",
        EXAMPLES[504],
    ),
}

_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}

INFER_BODY: dict[str, Any] = {
    "parameters": [
        {
            "name": HEADER_LENGTH,
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

INFER_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": InferAnswer,
        "description": "The lesion's probability for every pixel.",
        "headers": {
            **HEADERS,
            HEADER_LENGTH: {
                "description": "bytes of JSON at the start of a body with binary tensors",
                "schema": {"type": "integer"},
            },
        },
        "content": {"application/octet-stream": _BINARY},
    },
    **errors(400, 404, 413, 415, 422, 429, 500, 503, 504),
}
