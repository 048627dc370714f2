"""Messages of gRPC ↔ bodies of V2 over HTTP, with tensors as binary data in both.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

import json
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from server.http.errors import BadRequest
from server.http.openinference.protocol import HEADER_LENGTH
from server.rpc.bridge import Answer

__all__ = ["request_body", "response"]


def request_body(request: pb.ModelInferRequest) -> tuple[bytes, int]:
    """A request's body over HTTP, and how many of its bytes are JSON.

    Raises:
        BadRequest: its tensors are not where the protocol has them.
    """
    tensors = list(request.raw_input_contents) or [_contents(one) for one in request.inputs]
    if len(tensors) != len(request.inputs):
        raise BadRequest(
            f"raw_input_contents has {len(tensors)} tensors for {len(request.inputs)} inputs."
        )
    if request.raw_input_contents and any(one.HasField("contents") for one in request.inputs):
        raise BadRequest("An input has contents beside raw_input_contents: send one of them.")
    asked = {
        "id": request.id or None,
        "parameters": {**_parameters(request.parameters), "binary_data_output": True},
        "inputs": [
            {
                "name": one.name,
                "datatype": one.datatype,
                "shape": list(one.shape),
                "parameters": {**_parameters(one.parameters), "binary_data_size": len(tensor)},
            }
            for one, tensor in zip(request.inputs, tensors, strict=True)
        ],
        "outputs": [
            {"name": one.name, "parameters": {**_parameters(one.parameters), "binary_data": True}}
            for one in request.outputs
        ],
    }
    head = json.dumps(asked).encode()
    return b"".join([head, *tensors]), len(head)


def response(answer: Answer) -> pb.ModelInferResponse:
    """The message of an answer with status 200."""
    length = int(answer.headers[HEADER_LENGTH.lower()])
    told: dict[str, Any] = json.loads(answer.body[:length])
    message = pb.ModelInferResponse(
        model_name=told["model_name"],
        model_version=told["model_version"],
        id=told.get("id") or "",
        raw_output_contents=[answer.body[length:]],
    )
    # There is one output, so all of the binary data is its own.
    (output,) = told["outputs"]
    message.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
    return message


def _contents(tensor: pb.ModelInferRequest.InferInputTensor) -> bytes:
    """The values of a tensor that is not raw."""
    values = tensor.contents.uint_contents
    try:
        return bytes(values)
    except ValueError as error:
        raise BadRequest(f"A value of {tensor.name[:80]!r} is above 255.") from error


def _parameters(parameters: Any) -> dict[str, Any]:
    return {
        name: getattr(value, choice)
        for name, value in parameters.items()
        if (choice := value.WhichOneof("parameter_choice"))
    }
