"""Reads TensorRT's report of a built engine, and compares it with the types that were asked for.

TensorRT 10 writes a tensor's type as `"Format/Datatype"`, 11 and RTX as `"Datatype"`. Where no
GPU can load the engine, the inspector cannot be used. But the builder logs its text: the same
fields, one layer on each line.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import onnx
from onnx import TensorProto

from engines.plan import Layer

_TYPES = (
    ("bf16", r"BFloat16|BF16"),
    ("fp16", r"Half|FP16|Float16"),
    ("fp8", r"FP8"),
    ("fp32", r"Float|FP32"),
    ("int8", r"Int8|INT8"),
    ("uint8", r"UInt8|UINT8"),
    ("int32", r"Int32|INT32"),
    ("int64", r"Int64|INT64"),
    ("bool", r"Bool|BOOL"),
)
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_TENSOR_TYPE = re.compile(r"Datatype: (\w+)")
_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\]"
    r"(?:, Constants: .*?)?"
    r", Outputs: \[(?P<outputs>.*?)\], (?P<rest>(?:Tactic|StreamId|Metadata|Parameter).*)$"
)
_ARITHMETIC = frozenset({"Attention", "Conv", "ConvTranspose", "MatMul"})
_ELEMENT_TYPES = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
}


def type_name(text: str) -> str:
    """Return `fp16` for `Half`, `Row major linear FP16 format` and the like."""
    for name, pattern in _TYPES:
        if re.search(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", text):
            return name
    return text


def from_inspector(text: str) -> tuple[Layer, ...]:
    """Read `EngineInspector.get_engine_information` in JSON, of TensorRT 10 or 11.

    Raises:
        ValueError: it holds no details: the engine was built without `ProfilingVerbosity.DETAILED`.
    """
    layers = json.loads(text)["Layers"]
    if any(isinstance(layer, str) for layer in layers):
        raise ValueError("the engine carries layer names only: build it with detailed verbosity")
    return tuple(
        Layer(
            name=layer["Name"],
            kind=str(layer.get("LayerType", "")),
            reads=tuple(_tensor_type(tensor) for tensor in layer.get("Inputs", [])),
            writes=tuple(_tensor_type(tensor) for tensor in layer.get("Outputs", [])),
            nodes=tuple(_ONNX_NODE.findall(str(layer.get("Metadata", "")))),
        )
        for layer in layers
    )


def _tensor_type(tensor: Mapping[str, Any]) -> str:
    return type_name(str(tensor.get("Datatype") or tensor.get("Format/Datatype") or ""))


def from_build_log(messages: Iterable[str]) -> tuple[Layer, ...]:
    """Read the layers that a verbose builder logs when it has finished an engine."""
    layers = []
    for message in messages:
        for line in message.splitlines():
            match = _LINE.match(line)
            if match is not None:
                layers.append(
                    Layer(
                        name=match["name"],
                        kind=match["kind"],
                        reads=tuple(map(type_name, _TENSOR_TYPE.findall(match["inputs"]))),
                        writes=tuple(map(type_name, _TENSOR_TYPE.findall(match["outputs"]))),
                        nodes=tuple(_ONNX_NODE.findall(match["rest"])),
                    )
                )
    return tuple(layers)


def scratch_from_build_log(messages: Iterable[str]) -> list[int]:
    """Read activation memory in bytes, by optimisation profile, as the builder logs it."""
    found = (re.search(r"Total Activation Memory: (\d+) bytes", message) for message in messages)
    return [int(match[1]) for match in found if match]


def expected_types(model: onnx.ModelProto) -> dict[str, frozenset[str]]:
    """By name, the types in which every convolution, product and attention of `model` may read.

    A convolution after a dequantisation is expected in int8, since TensorRT merges the pair into
    it. A deconvolution or an attention between casts may have absorbed them, and then reads the
    type before them.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*inferred.value_info, *inferred.input]}
    types.update({i.name: i.data_type for i in inferred.initializer})
    producers = {name: node for node in model.graph.node for name in node.output}
    expected = {}
    for node in model.graph.node:
        if node.op_type not in _ARITHMETIC:
            continue
        names = {node.input[0]}
        before = producers.get(node.input[0])
        takes_casts_in = node.op_type in ("Attention", "ConvTranspose")
        if before is not None and before.op_type == "Cast" and takes_casts_in:
            names.add(before.input[0])
        allowed = {_ELEMENT_TYPES.get(types.get(name, 0), "?") for name in names}
        if before is not None and before.op_type == "DequantizeLinear":
            allowed = {"int8"}
        expected[node.name] = frozenset(allowed)
    return expected


def disagreements(expected: Mapping[str, frozenset[str]], layers: Iterable[Layer]) -> list[str]:
    """Name the nodes that the engine computes in another type than the graph gives them.

    A node agrees where one of the layers made of it reads that type. A node that TensorRT merged
    away, so that no layer names it, cannot be judged. It is an error only if most nodes are such.
    """
    reads: dict[str, set[str]] = {}
    for layer in layers:
        for node in layer.nodes:
            reads.setdefault(node, set()).update(layer.reads)
    known = [name for name in expected if name in reads]
    problems = [
        f"{name} reads {_either(reads[name])}, asked for {_either(expected[name])}"
        for name in known
        if reads[name].isdisjoint(expected[name])
    ]
    if 2 * len(known) < len(expected):
        problems.append(
            f"only {len(known)} of {len(expected)} convolutions, products and attentions are named"
            " by the engine: its precision cannot be read back"
        )
    return problems


def _either(types: Iterable[str]) -> str:
    return "/".join(sorted(types))
