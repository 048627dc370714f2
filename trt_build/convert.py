"""Rewrites the exported ONNX graph for TensorRT: first the form of attention, then the precision.

TensorRT 11 and TensorRT for RTX have only strongly typed networks: a tensor has the type that the
ONNX file gives it. So precision is set here, tensor by tensor, for every TensorRT alike. This is
hand-written because `onnxscript.rewriter` sets no types, and ModelOpt AutoCast chooses by operator
or range, where one attention here needs both types (docs/decisions.md).

In every precision these stay float32:

- everything before the first convolution (normalisation and the area averages of three channels);
- the channel attention's Gram matrix and softmax: its energies sum over up to 16,384 positions,
  which passes float16's 65,504 and leaves bfloat16 with two or three digits;
- the position attention's logits and softmax. The fused kernel sums in float16 unless its queries,
  keys and values are cast to float32 before it (TensorRT's release notes of 11.3). It absorbs those
  casts and reads 16 bits as before;
- the last sigmoid.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engines.plan import Precision

AttentionForm = Literal["fused", "chunked", "plain"]

OPSET = 23
"""The first opset with `Attention`; convolution and pooling take bfloat16 since 22."""

MMA_DEPTH = 16
"""Terms that a tensor core sums in one instruction on 16-bit types (PTX: mma.m16n8k16)."""

CHUNK_ELEMENTS = 1 << 19
"""Logits of an image that the chunked form holds at a time: 128 MiB in float32 at batch 64."""

INT8_MIN_CHANNELS = 32
"""Convolutions that read fewer channels stay in float16: the stem and the last stage are a small
part of the work and most of what int8 would do to a mask's border."""

_LOW_TYPES: dict[Precision, int] = {
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "int8": TensorProto.FLOAT16,
}
_MOVES = frozenset(
    {"Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze"}
    | {"Transpose", "Unsqueeze", "MaxPool", "Relu"}
)
"""Operators that return values they were given, so no rounding is needed after them."""


class ConversionError(ValueError):
    """The graph cannot be put into this form. The message says where, and what to do."""


def default_attention(precision: Precision) -> AttentionForm:
    """Return the form that avoids the [HW, HW] matrix at `precision`.

    TensorRT's fused attention kernels exist for 16-bit types. In float32 the queries are taken in
    chunks instead.
    """
    return "chunked" if precision in ("fp32", "tf32") else "fused"


def convert(
    model: onnx.ModelProto,
    precision: Precision,
    *,
    attention: AttentionForm | None = None,
    ranges: Mapping[str, float] | None = None,
    simulate: bool = False,
    half_sums: bool = False,
) -> onnx.ModelProto:
    """Return a copy of the exported float32 `model` in this precision and form of attention.

    `ranges`: largest magnitude of each convolution's input by tensor name, for `int8`
    (`trt_build.calibrate`).

    `simulate`: keep float32 arithmetic, and round every value that the engine would store in a
    16-bit type (int8 keeps its quantise/dequantise pairs). Such a graph runs on any ONNX Runtime
    and shows what the types do to the masks. It shows nothing of TensorRT's kernels, and its
    attention is the plain form. Run it without graph optimisation, which may remove the rounding.

    `half_sums`: simulate position attention in a kernel that sums in 16 bits. Logits, softmax
    and both products are rounded after every `MMA_DEPTH` terms. No engine is built so.

    Raises:
        ConversionError: the graph is not the exported one, or a range or weight does not fit.
    """
    if precision == "int8" and ranges is None:
        raise ConversionError("int8 needs activation ranges: run python -m trt_build.calibrate")
    form = attention or default_attention(precision)
    graph = _Graph(model)
    graph.cast_input_first()
    pams = graph.position_attentions()
    fragile = graph.fragile_nodes()
    if half_sums:
        graph.sum_in_steps(pams)
        fragile -= {name for pam in pams for name in (pam.energy, pam.softmax)}
    if simulate:
        form = "plain"
    elif form == "fused":
        graph.fuse(pams)
        fragile |= graph.attentions()
    elif form == "chunked":
        graph.chunk(pams)
        fragile = graph.fragile_nodes()
    if precision in _LOW_TYPES:
        low = _LOW_TYPES[precision]
        if precision == "bf16":
            # TensorRT for RTX 1.7 has no bfloat16 deconvolution. The three are 1 % of the work.
            fragile |= {n.output[0] for n in graph.nodes if n.op_type == "ConvTranspose"}
        quantised = graph.quantisable(pams) if precision == "int8" else frozenset[str]()
        graph.lower(low, fragile, quantised, ranges or {}, simulate=simulate)
    return graph.finish(f"{precision}, {form} attention" + (", simulated" if simulate else ""))


@dataclass(frozen=True)
class _PositionAttention:
    """One MatMul–Softmax–MatMul over positions. Nodes are named by their first output."""

    energy: str
    softmax: str
    output: str
    queries: str  # tensor [n, HW, C]
    keys: str  # tensor [n, C, HW], or [n, C, HW / p²] where they are averaged over p×p
    values: str  # tensor [n, HW, C], or [n, HW / p², C]


class _Graph:
    """The graph being rewritten: nodes in topological order, constants apart, types known."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        for imported in self.model.opset_import:
            if imported.domain in ("", "ai.onnx"):
                # From 20 to 23 no operator of this network changed its meaning. Types were added.
                if not 20 <= imported.version <= OPSET:
                    raise ConversionError(f"opset {imported.version}: export with 20 to {OPSET}")
                imported.version = OPSET
        self.model.ir_version = max(self.model.ir_version, 11)
        inferred = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        self.shapes: dict[str, list[int | None]] = {}
        self.floats: set[str] = set()
        for info in [*inferred.value_info, *inferred.input, *inferred.output]:
            dims = info.type.tensor_type.shape.dim
            self.shapes[info.name] = [
                d.dim_value if d.HasField("dim_value") else None for d in dims
            ]
            if info.type.tensor_type.elem_type == TensorProto.FLOAT:
                self.floats.add(info.name)
        self.constants: dict[str, NDArray[np.generic]] = {}
        self.nodes: list[onnx.NodeProto] = []
        for initializer in self.model.graph.initializer:
            self._constant(initializer.name, numpy_helper.to_array(initializer))
        for node in self.model.graph.node:
            if node.op_type == "Constant":
                value = next(a.t for a in node.attribute if a.name == "value")
                self._constant(node.output[0], numpy_helper.to_array(value))
            else:
                self.nodes.append(node)
        self.input = self.model.graph.input[0].name
        self.output = self.model.graph.output[0].name

    def _constant(self, name: str, value: NDArray[np.generic]) -> None:
        self.constants[name] = value
        self.shapes[name] = list(value.shape)
        if value.dtype == np.float32:
            self.floats.add(name)

    def _producers(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self.nodes for name in node.output}

    def _consumers(self, tensor: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if tensor in node.input]

    def cast_input_first(self) -> None:
        """Move the cast of the uint8 image to the front. TensorRT lets no other node read uint8."""
        movers: list[onnx.NodeProto] = []
        tensor = self.input
        while True:
            # A shape needs no values: it may be read from the cast's answer as well.
            consumers = [node for node in self._consumers(tensor) if node.op_type != "Shape"]
            if len(consumers) != 1:
                raise ConversionError(f"{tensor}: the uint8 image must go to one cast alone")
            node = consumers[0]
            if node.op_type == "Cast":
                break
            if node.op_type not in _MOVES:
                raise ConversionError(
                    f"{node.op_type} {node.name} reads uint8: cast the image first"
                )
            movers.append(node)
            tensor = node.output[0]
        self.nodes.remove(node)
        if not movers:
            self._put_first(node)
            return
        old = node.output[0]
        first = helper.make_node(
            "Cast", [self.input], [f"{self.input}_float"], to=TensorProto.FLOAT
        )
        movers[0].input[0] = first.output[0]
        self._put_first(first)
        for consumer in self._consumers(old):
            _rename_input(consumer, old, tensor)
        self.floats.update([first.output[0], *(mover.output[0] for mover in movers)])

    def _put_first(self, cast: onnx.NodeProto) -> None:
        for consumer in self._consumers(self.input):
            if consumer.op_type == "Shape":
                _rename_input(consumer, self.input, cast.output[0])
        self.nodes.insert(0, cast)

    def _root(self, tensor: str, producers: Mapping[str, onnx.NodeProto]) -> str:
        while (node := producers.get(tensor)) is not None and node.op_type in (
            "Cast", "Identity", "Reshape", "Transpose", "Unsqueeze",
        ):  # fmt: skip
            tensor = node.input[0]
        return tensor

    def _softmaxes(self) -> Iterable[tuple[onnx.NodeProto, onnx.NodeProto, list[onnx.NodeProto]]]:
        """Yield (softmax, energy MatMul, nodes between them) of every attention."""
        producers = self._producers()
        for softmax in [node for node in self.nodes if node.op_type == "Softmax"]:
            between: list[onnx.NodeProto] = []
            pending, energies = [softmax.input[0]], dict[str, onnx.NodeProto]()
            while pending:
                node = producers.get(pending.pop())
                if node is None:
                    continue
                if node.op_type in ("MatMul", "Gemm"):
                    energies[node.output[0]] = node
                elif node not in between:
                    between.append(node)
                    pending.extend(node.input)
            if len(energies) != 1:
                raise ConversionError(
                    f"Softmax {softmax.name}: no single MatMul gives its energies"
                )
            yield softmax, next(iter(energies.values())), between

    def position_attentions(self) -> list[_PositionAttention]:
        """Find SLSNet's attentions over positions. A Gram matrix (of one tensor) is none."""
        producers = self._producers()
        found = []
        for softmax, energy, between in self._softmaxes():
            queries, keys = energy.input
            if len(self.shapes.get(queries, [])) != 3:
                continue  # several heads, as other networks have them: they stay as they are
            if self._root(queries, producers) == self._root(keys, producers):
                continue
            consumers = self._consumers(softmax.output[0])
            axis = next((a.i for a in softmax.attribute if a.name == "axis"), -1)
            if (
                between
                or axis not in (-1, 2)
                or len(consumers) != 1
                or consumers[0].op_type != "MatMul"
                or consumers[0].input[0] != softmax.output[0]
            ):
                raise ConversionError(
                    f"Softmax {softmax.name}: not the MatMul–Softmax–MatMul of the exported model"
                )
            found.append(
                _PositionAttention(
                    energy=energy.output[0],
                    softmax=softmax.output[0],
                    output=consumers[0].output[0],
                    queries=queries,
                    keys=keys,
                    values=consumers[0].input[1],
                )
            )
        return found

    def fragile_nodes(self) -> frozenset[str]:
        """First outputs of the nodes that compute in float32 at every precision."""
        fragile: set[str] = set()
        for softmax, energy, between in self._softmaxes():
            fragile.update(node.output[0] for node in (softmax, energy, *between))
        last = self._producers()[self.output]
        while last.op_type in _MOVES:
            fragile.add(last.output[0])
            last = self._producers()[last.input[0]]
        fragile.add(last.output[0])
        before_convolution = {self.input}
        for node in self.nodes:
            variables = [name for name in node.input if name and name not in self.constants]
            if (
                variables
                and node.op_type not in ("Conv", "Shape")
                and before_convolution.issuperset(variables)
            ):
                before_convolution.update(node.output)
                fragile.add(node.output[0])
        return frozenset(fragile)

    def _replace(self, pam: _PositionAttention, new: list[onnx.NodeProto]) -> None:
        gone = (pam.energy, pam.softmax, pam.output)
        position = next(i for i, node in enumerate(self.nodes) if node.output[0] == pam.output)
        self.nodes[position:position] = new
        self.nodes = [n for n in self.nodes if n in new or n.output[0] not in gone]
        self.floats.update(name for node in new for name in node.output)

    def fuse(self, pams: Iterable[_PositionAttention]) -> None:
        """Use opset 23's `Attention`, with one head and scale 1. TensorRT has a kernel for it."""
        axis = "attention_head_axis"
        self._constant(axis, np.array([1], np.int64))
        for pam in pams:
            name = pam.output
            new = [helper.make_node("Transpose", [pam.keys], [f"{name}_k"], perm=[0, 2, 1])]
            for role, tensor in (("q", pam.queries), ("k", f"{name}_k"), ("v", pam.values)):
                new.append(helper.make_node("Unsqueeze", [tensor, axis], [f"{name}_{role}4"]))
            heads = [f"{name}_{role}4" for role in "qkv"]
            new.append(helper.make_node("Attention", heads, [f"{name}_o4"], scale=1.0))
            new.append(helper.make_node("Squeeze", [f"{name}_o4", axis], [name]))
            for node in new:
                node.name = node.output[0]
            self._replace(pam, new)

    def attentions(self) -> frozenset[str]:
        """First outputs of the fused attentions."""
        return frozenset(n.output[0] for n in self.nodes if n.op_type == "Attention")

    def sum_in_steps(self, pams: Iterable[_PositionAttention]) -> None:
        """Break the two products into sums of at most `MMA_DEPTH` terms, with a node for each."""
        for pam in pams:
            logits = self._stepwise(pam.queries, pam.keys, f"{pam.output}_qk")
            weights = helper.make_node("Softmax", [pam.energy], [pam.softmax], axis=-1)
            outputs = self._stepwise(pam.softmax, pam.values, f"{pam.output}_pv")
            logits[-1].output[0], outputs[-1].output[0] = pam.energy, pam.output
            self._replace(pam, [*logits, weights, *outputs])

    def _stepwise(self, left: str, right: str, name: str) -> list[onnx.NodeProto]:
        """`left` [n, a, k] @ `right` [n, k, b], summed over `k` in steps."""
        terms = self.shapes.get(right, [None, None])[1]
        if not terms:
            raise ConversionError(f"{right}: the number of terms is not in the graph")
        steps = -(-terms // MMA_DEPTH)
        sizes = f"{name}_steps"
        self._constant(
            sizes,
            np.array([MMA_DEPTH] * (steps - 1) + [terms - MMA_DEPTH * (steps - 1)], np.int64),
        )
        parts = [[f"{name}_{side}{i}" for i in range(steps)] for side in "lr"]
        nodes = [
            helper.make_node("Split", [left, sizes], parts[0], axis=2),
            helper.make_node("Split", [right, sizes], parts[1], axis=1),
        ]
        total = ""
        for i, (one, other) in enumerate(zip(*parts, strict=True)):
            nodes.append(helper.make_node("MatMul", [one, other], [f"{name}_product{i}"]))
            if total:
                nodes.append(
                    helper.make_node("Add", [total, f"{name}_product{i}"], [f"{name}_sum{i}"])
                )
            total = nodes[-1].output[0]
        for node in nodes:
            node.name = node.output[0]
        return nodes

    def chunk(self, pams: Iterable[_PositionAttention]) -> None:
        """Take the queries in equal chunks, so that only part of [HW, HW] exists at a time."""
        for pam in pams:
            positions = self.shapes.get(pam.queries, [None, None])[1]
            keys = self.shapes.get(pam.keys, [None, None, None])[2]
            if not positions or not keys:
                raise ConversionError(f"{pam.queries}: the number of positions is not in the graph")
            chunks = 1
            while positions % (2 * chunks) == 0 and positions * keys // chunks > CHUNK_ELEMENTS:
                chunks *= 2
            if chunks == 1:
                continue
            name = pam.output
            parts = [f"{name}_q{i}" for i in range(chunks)]
            new = [helper.make_node("Split", [pam.queries], parts, axis=1, num_outputs=chunks)]
            for i, part in enumerate(parts):
                new += [
                    helper.make_node("MatMul", [part, pam.keys], [f"{name}_e{i}"]),
                    helper.make_node("Softmax", [f"{name}_e{i}"], [f"{name}_s{i}"], axis=-1),
                    helper.make_node("MatMul", [f"{name}_s{i}", pam.values], [f"{name}_o{i}"]),
                ]
            outputs = [f"{name}_o{i}" for i in range(chunks)]
            new.append(helper.make_node("Concat", outputs, [name], axis=1))
            for node in new:
                node.name = node.output[0]
            self._replace(pam, new)

    def quantisable(self, pams: Iterable[_PositionAttention]) -> frozenset[str]:
        """Convolutions (by output) to run in int8: those of many channels, except a PAM's three.

        Position attention's logits are unscaled products of queries and keys. An int8 step would
        be several units in the exponent, and the attention spreads its values over the whole map.
        Keeping the three in float16 takes a third off the difference in masks; they are only 1×1.
        """
        producers = self._producers()
        sensitive: set[str] = set()
        for pam in pams:
            for tensor in (pam.queries, pam.keys, pam.values):
                node = producers.get(tensor)
                while node is not None and node.op_type != "Conv":
                    node = producers.get(node.input[0])
                if node is not None:
                    sensitive.add(node.output[0])
        return frozenset(
            node.output[0]
            for node in self.nodes
            if node.op_type == "Conv"
            and node.output[0] not in sensitive
            and self.constants[node.input[1]].shape[1] >= INT8_MIN_CHANNELS
        )

    def lower(
        self,
        low: int,
        fragile: frozenset[str],
        quantised: frozenset[str],
        ranges: Mapping[str, float],
        *,
        simulate: bool,
    ) -> None:
        """Give every float tensor its type, with casts (or rounding) where two types meet."""
        typing = _Typing(self, low, simulate=simulate)
        for node in self.nodes:
            wanted = TensorProto.FLOAT if node.output[0] in fragile else low
            if node.op_type == "Cast" or not any(name in self.floats for name in node.output):
                typing.emit(node, TensorProto.FLOAT)  # a cast of uint8, or a shape
                continue
            for i, name in enumerate(node.input):
                if name in self.floats and not (node.op_type == "Resize" and i > 0):
                    node.input[i] = typing.typed(name, wanted)
            if node.output[0] in quantised:
                typing.quantise(node, ranges)
            typing.emit(node, wanted)
        self.nodes = typing.nodes

    def finish(self, how: str) -> onnx.ModelProto:
        """Put nodes and used constants back, drop stale shapes, check, and say what was done."""
        graph = self.model.graph
        used = {name for node in self.nodes for name in node.input}
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(
            _tensor(name, value) for name, value in self.constants.items() if name in used
        )
        entry = self.model.metadata_props.add()
        entry.key, entry.value = "converted", how
        onnx.checker.check_model(self.model, full_check=True)
        return self.model


class _Typing:
    """Emits nodes, with every float tensor in a known type."""

    def __init__(self, graph: _Graph, low: int, *, simulate: bool) -> None:
        self.graph = graph
        self.low = low
        self.simulate = simulate
        self.nodes: list[onnx.NodeProto] = []
        self.types: dict[str, int] = {}
        self.versions: dict[tuple[str, int], str] = {}
        self.quantised: dict[str, str] = {}

    def _suffix(self, kind: int) -> str:
        return str(TensorProto.DataType.Name(kind)).lower()

    def emit(self, node: onnx.NodeProto, kind: int) -> None:
        self.nodes.append(node)
        for i, name in enumerate(node.output):
            if name not in self.graph.floats:
                continue
            self.types[name] = kind
            if self.simulate and kind != TensorProto.FLOAT and node.op_type not in _MOVES:
                node.output[i] = f"{name}_exact"
                self._round(f"{name}_exact", name)

    def _round(self, source: str, target: str) -> None:
        stored = f"{target}_{self._suffix(self.low)}"
        self.nodes += [
            helper.make_node("Cast", [source], [stored], name=stored, to=self.low),
            helper.make_node(
                "Cast", [stored], [target], name=f"{stored}_back", to=TensorProto.FLOAT
            ),
        ]

    def typed(self, name: str, kind: int) -> str:
        """Return the name of tensor `name` in type `kind`, casting it at most once."""
        if name in self.graph.constants:
            return self._typed_constant(name, kind)
        if self.types[name] == kind or (self.simulate and kind == TensorProto.FLOAT):
            return name
        key = (name, kind)
        if key not in self.versions:
            version = self.versions[key] = f"{name}_to_{self._suffix(kind)}"
            if self.simulate:
                self._round(name, version)
            else:
                self.nodes.append(
                    helper.make_node("Cast", [name], [version], name=version, to=kind)
                )
        return self.versions[key]

    def _typed_constant(self, name: str, kind: int) -> str:
        if kind == TensorProto.FLOAT:
            return name
        key = (name, kind)
        if key not in self.versions:
            value = self.graph.constants[name]
            dtype = np.float16 if kind == TensorProto.FLOAT16 else ml_dtypes.bfloat16
            with np.errstate(over="ignore"):
                lowered = value.astype(dtype)
            if not np.isfinite(lowered.astype(np.float32)).all():
                raise ConversionError(
                    f"{name}: a weight does not fit {self._suffix(kind)}: use bf16"
                )
            stored = lowered.astype(np.float32) if self.simulate else lowered
            self.versions[key] = f"{name}_{self._suffix(kind)}"
            self.graph.constants[self.versions[key]] = stored
        return self.versions[key]

    def _scale(self, name: str, value: NDArray[np.float32]) -> str:
        """Store a scale in the type of the tensor after dequantisation."""
        kind = np.float32 if self.simulate else np.float16
        # The smallest normal float16: a channel of zeros would divide by zero.
        self.graph.constants[name] = np.maximum(value, 6.2e-5).astype(kind)
        return name

    def quantise(self, node: onnx.NodeProto, ranges: Mapping[str, float]) -> None:
        """Quantise and dequantise a convolution's input (per tensor) and weights (per channel)."""
        source, weights = node.input[0], node.input[1]
        original = source.removesuffix(f"_to_{self._suffix(self.low)}")
        if original not in ranges:
            raise ConversionError(f"no range for {original}: calibrate with this ONNX file")
        if source not in self.quantised:
            scale = self._scale(f"{source}_scale", np.array(ranges[original] / 127, np.float32))
            zero = f"{source}_zero"
            self.graph.constants[zero] = np.array(0, np.int8)
            q, dq = f"{source}_q", f"{source}_dq"
            self.nodes += [
                helper.make_node("QuantizeLinear", [source, scale, zero], [q], name=q),
                helper.make_node("DequantizeLinear", [q, scale, zero], [dq], name=dq),
            ]
            self.quantised[source] = dq
        node.input[0] = self.quantised[source]
        exact = self.graph.constants[weights.removesuffix(f"_{self._suffix(self.low)}")].astype(
            np.float32
        )
        steps = np.abs(exact).max(axis=(1, 2, 3)) / 127
        scale = self._scale(f"{weights}_scale", steps)
        steps = self.graph.constants[scale].astype(np.float32)
        levels = np.clip(np.rint(exact / steps[:, None, None, None]), -127, 127)
        self.graph.constants[f"{weights}_q"] = levels.astype(np.int8)
        zero = f"{weights}_zero"
        self.graph.constants[zero] = np.zeros(len(steps), np.int8)
        dq = f"{weights}_dq"
        self.nodes.append(
            helper.make_node(
                "DequantizeLinear", [f"{weights}_q", scale, zero], [dq], name=dq, axis=0
            )
        )
        node.input[1] = dq


def _rename_input(node: onnx.NodeProto, old: str, new: str) -> None:
    for i, name in enumerate(node.input):
        if name == old:
            node.input[i] = new


def _tensor(name: str, value: NDArray[np.generic]) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)
