"""A request's body → images, and probabilities → the answer's body.

It is hand-written for its limits: a general parser makes Python objects of any JSON that comes.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import Headers

from server.http.errors import BadRequest
from server.http.openinference.protocol import (
    HEADER_LENGTH,
    IMAGE_BYTES,
    INPUT,
    OUTPUT,
    SIDE,
    VERSION,
    AnswerOutput,
    AnswerParameters,
    InferAnswer,
    InferRequest,
    RequestInput,
    RequestOutput,
)
from server.inference.errors import Problem, TooLarge
from server.inference.submission import Body

__all__ = ["answer", "json_length", "parse"]

_MAP_BYTES = SIDE * SIDE * 4

# Bytes of JSON. As Python's lists and numbers it takes many times the memory, and parsing it holds
# up all other requests.
_MAX_JSON_BYTES = 4 * 2**20

# An image that is nested like its shape has 1 + 128 + 128 * 128 lists, and 131,000 characters if
# all values have one digit: 31 images fit, with 512,000 lists. Without this limit there could be
# two million.
_MAX_LISTS = 2**19

# A request with one input and one output has five objects. Each takes over twice as much as a list.
_MAX_OBJECTS = 1000

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

# The JSON before binary tensors is shorter than this.
_LONGEST_HEADER = 2**16
_BINARY_SIZE = b'"binary_data_size"'


def _check_untold(body: bytes) -> None:
    """Refuse binary tensors if no header says where they begin."""
    start = body[:_LONGEST_HEADER]
    goes_on = body[-16:].rstrip()[-1:] != b"}"
    if start.lstrip()[:1] == b"{" and (b"\0" in start or (_BINARY_SIZE in start and goes_on)):
        raise BadRequest(
            f"Binary tensors follow the JSON, but the header {HEADER_LENGTH} is missing: send in"
            " it how many bytes of the body are JSON."
        )


def json_length(body: bytes, headers: Headers) -> int:
    """The number of bytes of a body that are JSON."""
    length = size = len(body)
    header_length = headers.get(HEADER_LENGTH)
    if header_length is None:
        _check_untold(body)
    else:
        if not (header_length.isascii() and header_length.isdigit()) or len(header_length) > 18:
            raise BadRequest(f"{HEADER_LENGTH} is not a number of bytes.")
        length = int(header_length)
        if length > size:
            raise BadRequest(f"{HEADER_LENGTH} says {length}, the body has {size} bytes.")
    if length > _MAX_JSON_BYTES:
        raise TooLarge(
            f"{length} bytes of JSON are more than the {_MAX_JSON_BYTES} allowed: send the tensor"
            " as binary data."
        )
    return length


def parse(body: Body, length: int, most: int) -> tuple[InferRequest, list[NDArray[np.uint8]]]:
    """A body → the request without its inputs, and its images, each uint8 [128, 128, 3].

    Args:
        body: the bytes are taken out of it.
        length: bytes of the JSON at its start.
        most: the most images.
    """
    try:
        return _parsed(body.take(), length, most)
    except Problem as problem:
        # Its traceback and its cause would hold all that was parsed.
        problem.__context__ = None
        raise problem.with_traceback(None) from None


def _parsed(body: bytes, length: int, most: int) -> tuple[InferRequest, list[NDArray[np.uint8]]]:
    for bracket, of_what, allowed in ((b"[", "lists", _MAX_LISTS), (b"{", "objects", _MAX_OBJECTS)):
        # Brackets within strings count too: no sound request has so many.
        count = body.count(bracket, 0, length)
        if count > allowed:
            raise TooLarge(
                f"{count} {of_what} in the JSON are more than the {allowed} allowed: send the"
                " tensor as binary data."
            )
    try:
        if _SURROGATE.search(body, 0, length):
            # This parser refuses half of a surrogate pair, Python's does not.
            from_json(body[:length])
        # Strict UTF-8: otherwise half a surrogate pair could come in, which no answer can repeat.
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
    if rest != [SIDE, SIDE, 3] or count < 1:
        raise BadRequest(
            f"The shape of {INPUT!r} is [n, {SIDE}, {SIDE}, 3], not {str(tensor.shape)[:80]}."
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
                f" ({HEADER_LENGTH} says where it ends)."
            )
        data = binary
    if len(data) != count * IMAGE_BYTES:
        raise BadRequest(
            f"The shape {tensor.shape} takes {count * IMAGE_BYTES} values, there are {len(data)}."
        )
    return list(np.frombuffer(data, np.uint8).reshape(count, SIDE, SIDE, 3))


def _values(data: list[Any]) -> bytes:
    """Integers 0 to 255, flat or nested, in row-major order."""
    try:
        # One level less than there are dimensions.
        for _ in range(3):
            if data and isinstance(data[0], list):
                data = list(chain.from_iterable(data))
        return bytes(data)
    except (TypeError, ValueError) as error:
        raise BadRequest(
            f"The data of {INPUT!r} must be integers from 0 to 255, flat or nested as the shape is."
        ) from error


def answer(
    network: str, asked: InferRequest, probabilities: Sequence[NDArray[np.float32]]
) -> tuple[bytes, int | None]:
    """The answer's body, and how much of it is JSON if binary data follows.

    Args:
        network: name of the one that ran.
        asked: the request.
        probabilities: of each image, float32 [128, 128].
    """
    binary = (
        asked.outputs[0].parameters.binary_data
        if asked.outputs
        else asked.parameters.binary_data_output
    )
    shape = [len(probabilities), SIDE, SIDE]
    output = AnswerOutput(name=OUTPUT, shape=shape, datatype="FP32")
    if binary:
        output.parameters = AnswerParameters(binary_data_size=len(probabilities) * _MAP_BYTES)
    answer = InferAnswer(model_name=network, model_version=VERSION, id=asked.id, outputs=[output])
    header = answer.model_dump_json(exclude_none=True).encode()
    if binary:
        # The extension's byte order is little-endian.
        return b"".join([header, *(p.astype("<f4").tobytes() for p in probabilities)]), len(header)
    # One map at a time: a single call would hold up all other threads until all maps are done.
    values = ",".join(json.dumps(p.ravel().tolist())[1:-1] for p in probabilities)
    return header.removesuffix(b"}]}") + b',"data":[' + values.encode() + b"]}]}", None
