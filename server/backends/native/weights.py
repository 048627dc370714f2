"""The network's weights, read from its ONNX file, in the order that the native engine takes them.

Reads just enough of ONNX's protobuf (onnx.proto) to find named constants: serving does not install
the onnx package.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["WeightsError", "network_weights", "read_constants"]

Array = NDArray[np.float32]

_EPSILON = 1e-3
"""Of the batch normalisations that the exporter could not fold."""

# Field numbers of ModelProto, GraphProto and TensorProto.
_GRAPH, _INITIALIZER = 7, 5
_DIMS, _TYPE, _FLOATS, _NAME, _RAW = 1, 2, 4, 8, 9
_FLOAT32 = 1


class WeightsError(ValueError):
    """The file is no ONNX file, or not one of this network."""


def read_constants(model: Path) -> dict[str, Array]:
    """The float32 constants of an ONNX file by name.

    Raises:
        WeightsError: the file cannot be read, or is no ONNX file.
    """
    try:
        data = memoryview(model.read_bytes())
        constants = {}
        for graph in _submessages(data, _GRAPH):
            for tensor in _submessages(graph, _INITIALIZER):
                named = _constant(tensor)
                if named is not None:
                    constants[named[0]] = named[1]
    except OSError as error:
        raise WeightsError(f"{model} cannot be read: {error.strerror}") from error
    except (ValueError, IndexError) as error:
        raise WeightsError(f"{model} is not an ONNX file: {error}") from error
    return constants


def network_weights(constants: Mapping[str, Array]) -> Array:
    """All weights in one array, float32 [count], as `slsnet_open` takes them.

    A convolution is [tap][input][output] and then its bias.

    Raises:
        WeightsError: a weight is missing or has another shape.
    """
    return np.concatenate([np.ravel(part) for part in _Order(constants).network()])


class _Order:
    def __init__(self, constants: Mapping[str, Array]) -> None:
        self._constants = constants

    def network(self) -> Iterator[Array]:
        for i in range(4):
            yield from self._conv(f"multiscale.branches.{i}.0", 3, 16, (3, 3))
            yield self._take(f"multiscale.branches.{i}.3.gamma", (1,))
        yield from self._down("down1", 16, 32)
        yield from self._down("down2", 32, 64)
        for i in range(4):
            yield from self._fcm(f"encoder1.{i}", 64)
        yield from self._down("down3", 64, 128)
        for i in range(8):
            yield from self._fcm(f"encoder2.{i}", 128)
        yield from self._factorised("bridge", 128)
        yield self._take("bridge_cam.gamma", (1,))
        yield from self._pam("bridge_pam", 128)
        for name, inputs, outputs in (("decoder1", 128, 64), ("decoder2", 64, 16)):
            yield from self._deconv(f"{name}.0.deconv", inputs, outputs)
            yield from self._pam(f"{name}.0.pam", outputs)
            yield from self._fcm(f"{name}.1", outputs)
            yield from self._fcm(f"{name}.2", outputs)
        yield from self._deconv("head", 16, 1)

    def _fcm(self, name: str, channels: int) -> Iterator[Array]:
        yield from self._factorised(f"{name}.0", channels)
        yield self._take(f"{name}.1.gamma", (1,))

    def _factorised(self, name: str, channels: int) -> Iterator[Array]:
        for part, kernel in (
            ("vertical", (3, 1)),
            ("horizontal", (1, 3)),
            ("dilated_vertical", (3, 1)),
            ("dilated_horizontal", (1, 3)),
        ):
            yield from self._conv(f"{name}.{part}", channels, channels, kernel)

    def _pam(self, name: str, channels: int) -> Iterator[Array]:
        for part in ("key", "query", "value"):
            yield from self._conv(f"{name}.{part}.0", channels, channels, (1, 1))
        yield self._take(f"{name}.eta", (1,))

    def _down(self, name: str, inputs: int, outputs: int) -> Iterator[Array]:
        """The normalisation of [convolution, pool] goes into the convolution's own weights."""
        weight, bias, mean, variance = (
            self._take(f"{name}.norm.{part}", (outputs,))
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + _EPSILON)
        shift = bias - mean * scale
        convolved = outputs - inputs
        kernel, offset = self._conv(f"{name}.conv", inputs, convolved, (3, 3))
        yield kernel * scale[:convolved]
        yield offset * scale[:convolved] + shift[:convolved]
        yield scale[convolved:]
        yield shift[convolved:]
        yield from self._pam(f"{name}.pam", outputs)

    def _conv(self, name: str, inputs: int, outputs: int, kernel: tuple[int, int]) -> list[Array]:
        weight = self._take(f"{name}.weight", (outputs, inputs, *kernel))
        return [weight.transpose(2, 3, 1, 0), self._take(f"{name}.bias", (outputs,))]

    def _deconv(self, name: str, inputs: int, outputs: int) -> list[Array]:
        weight = self._take(f"{name}.weight", (inputs, outputs, 3, 3))
        return [weight.transpose(2, 3, 0, 1), self._take(f"{name}.bias", (outputs,))]

    def _take(self, name: str, shape: tuple[int, ...]) -> Array:
        constant = self._constants.get(f"generator.{name}")
        if constant is None or constant.shape != shape:
            found = "none" if constant is None else list(constant.shape)
            raise WeightsError(f"not the shipped network: {name} is {found}, not {list(shape)}")
        return constant


def _constant(tensor: memoryview) -> tuple[str, Array] | None:
    dims: list[int] = []
    name, kind = "", 0
    values = np.empty(0, np.float32)
    for field, value in _fields(tensor):
        if field == _NAME and not isinstance(value, int):
            name = bytes(value).decode()
        elif field == _TYPE and isinstance(value, int):
            kind = value
        elif field == _DIMS:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif field in (_RAW, _FLOATS) and not isinstance(value, int) and len(value):
            values = np.frombuffer(value, "<f4") if len(value) % 4 == 0 else values
    if kind != _FLOAT32 or values.size != np.prod(dims, dtype=np.int64):
        return None
    return name, values.reshape(dims).astype(np.float32, copy=False)


def _submessages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    for field, value in _fields(message):
        if field == wanted and not isinstance(value, int):
            yield value


def _packed(data: memoryview) -> list[int]:
    numbers, at = [], 0
    while at < len(data):
        number, at = _varint(data, at)
        numbers.append(number)
    return numbers


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value; fixed-width numbers come as their bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, wire_type = key >> 3, key & 7
        if wire_type == 0:
            number, at = _varint(message, at)
            yield field, number
            continue
        if wire_type == 2:
            size, at = _varint(message, at)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if at + size > len(message):
            raise ValueError("it ends too early")
        yield field, message[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
        if shift > 63:
            raise ValueError("a number without end")
