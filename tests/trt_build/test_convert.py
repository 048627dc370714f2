"""The graph put into another precision and attention form: still the same network."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from common.onnx import onnx_runner
from engines.plan import Precision
from tests.support import MODEL
from trt_build.convert import ConversionError, convert
from trt_build.samples import REFERENCE, batches, load_samples


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    return onnx.load(MODEL)


@pytest.fixture(scope="module")
def ranges(exported: onnx.ModelProto) -> dict[str, float]:
    return {node.input[0]: 4.0 for node in exported.graph.node if node.op_type == "Conv"}


def _operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.input]}
    types.update({v.name: v.type.tensor_type.elem_type for v in graph.output})
    types.update({i.name: i.data_type for i in graph.initializer})
    return types


@pytest.mark.parametrize("attention", ["plain", "chunked", "fused"])
def test_every_attention_form_computes_the_same(exported: onnx.ModelProto, attention: str) -> None:
    batch = next(batches(load_samples(REFERENCE, limit=2)))
    expected = onnx_runner(MODEL)(batch)
    model = convert(exported, "fp32", attention=attention)  # type: ignore[arg-type]
    found = onnx_runner(model.SerializeToString())(batch)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_fusing_replaces_position_attention_alone(exported: onnx.ModelProto) -> None:
    before, after = _operators(exported), _operators(convert(exported, "fp16"))
    assert after["Attention"] == 6
    assert after["Softmax"] == before["Softmax"] - 6, "channel attention keeps its softmax"
    assert after["Conv"] == before["Conv"]


@pytest.mark.parametrize(("precision", "low"), [("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_fragile_layers_stay_in_float32(
    exported: onnx.ModelProto, precision: Precision, low: str
) -> None:
    model = convert(exported, precision)
    types = _types(model)
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        kind = TensorProto.DataType.Name(types[node.input[0]])
        if node.op_type == "Softmax":
            assert kind == "FLOAT"
            energy = producers[node.input[0]]
            while energy.op_type != "MatMul":
                energy = next(producers[name] for name in energy.input if name in producers)
            assert types[energy.input[0]] == TensorProto.FLOAT, "and so does the Gram matrix"
        elif node.op_type == "Sigmoid":
            assert kind == "FLOAT"
        elif node.op_type == "Attention":
            # Or its kernel sums in float16; it takes the casts in and reads 16 bits.
            assert kind == "FLOAT"
            casts = [producers[name] for name in node.input]
            assert {cast.op_type for cast in casts} == {"Cast"}
            stored = {TensorProto.DataType.Name(types[cast.input[0]]) for cast in casts}
            assert stored == {low}
        elif node.op_type in ("Conv", "Relu", "BatchNormalization"):
            assert kind == low
            assert len({types[name] for name in node.input}) == 1, "bias and weights alike"
    assert types["image"] == TensorProto.UINT8
    assert types["probability"] == TensorProto.FLOAT


def test_uint8_is_read_by_a_cast_alone(exported: onnx.ModelProto) -> None:
    model = convert(exported, "fp32")
    assert [n.op_type for n in model.graph.node if "image" in n.input] == ["Cast"]


def test_int8_quantises_the_convolutions_but_not_those_of_attention(
    exported: onnx.ModelProto, ranges: dict[str, float]
) -> None:
    model = convert(exported, "int8", ranges=ranges)
    producers = {name: node for node in model.graph.node for name in node.output}
    quantised = {
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and producers[node.input[0]].op_type == "DequantizeLinear"
    }
    weights = {i.name: i.dims for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.name not in quantised:
            few = weights[node.input[1]][1] < 32
            assert few or node.name in _of_attention(model)
    assert len(quantised) > 60
    assert quantised.isdisjoint(_of_attention(model))


def _of_attention(model: onnx.ModelProto) -> set[str]:
    producers = {name: node for node in model.graph.node for name in node.output}
    found = set()
    for node in model.graph.node:
        if node.op_type == "Attention":
            for tensor in node.input:
                source = producers[tensor]
                while source.op_type != "Conv":
                    source = producers[source.input[0]]
                found.add(source.name)
    assert len(found) == 18
    return found


def test_simulation_rounds_what_the_engine_would_store(exported: onnx.ModelProto) -> None:
    batch = next(batches(load_samples(REFERENCE, limit=2)))
    expected = onnx_runner(MODEL)(batch)
    errors = {}
    for precision in ("fp16", "bf16"):
        model = convert(exported, precision, simulate=True)
        found = onnx_runner(model.SerializeToString(), exact=True)(batch)
        errors[precision] = float(np.abs(found - expected).mean())
    assert 0 < errors["fp16"] < errors["bf16"] < 0.05


def test_sums_in_steps_are_the_same_sums_and_round_after_each(exported: onnx.ModelProto) -> None:
    batch = next(batches(load_samples(REFERENCE, limit=1)))
    expected = onnx_runner(MODEL)(batch)
    steps = convert(exported, "fp32", attention="plain", half_sums=True)
    found = onnx_runner(steps.SerializeToString())(batch)
    np.testing.assert_allclose(found, expected, atol=2e-4)

    whole = convert(exported, "fp16", simulate=True)
    steps = convert(exported, "fp16", simulate=True, half_sums=True)
    sums = [n for n in steps.graph.node if n.op_type == "Add" and "_sum" in n.name]
    assert len(sums) >= 2 * 6
    assert all(n.output[0].endswith("_exact") for n in sums), "each is rounded"
    answers = [onnx_runner(m.SerializeToString(), exact=True)(batch) for m in (whole, steps)]
    assert not np.array_equal(answers[0], answers[1])
    np.testing.assert_allclose(answers[1], expected, atol=0.05)


def test_a_weight_that_float16_cannot_hold_is_refused(exported: onnx.ModelProto) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    weight = next(i for i in model.graph.initializer if i.name.endswith("branches.0.0.weight"))
    value = onnx.numpy_helper.to_array(weight).copy()
    value[0] = 1e6
    weight.CopyFrom(onnx.numpy_helper.from_array(value, weight.name))
    with pytest.raises(ConversionError, match="does not fit float16: use bf16"):
        convert(model, "fp16")


def test_int8_without_ranges_says_how_to_get_them(exported: onnx.ModelProto) -> None:
    with pytest.raises(ConversionError, match=r"python -m trt_build\.calibrate"):
        convert(exported, "int8")
    with pytest.raises(ConversionError, match="no range for"):
        convert(exported, "int8", ranges={})


def test_a_graph_that_is_not_the_exported_one_is_refused(exported: onnx.ModelProto) -> None:
    old = onnx.ModelProto()
    old.CopyFrom(exported)
    old.opset_import[0].version = 17
    with pytest.raises(ConversionError, match="opset 17"):
        convert(old, "fp16")

    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 8, 8, 3])
    output = helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 8, 8])
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["x"], ["s"], name="lonely", axis=-1),
        helper.make_node("ReduceMax", ["s", "axes"], ["probability"], keepdims=0),
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [3])
    graph = helper.make_graph(nodes, "other", [image], [output], [axes])
    other = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(ConversionError, match="Softmax lonely: no single MatMul"):
        convert(other, "fp16")


def test_converting_leaves_the_exported_model_alone(exported: onnx.ModelProto) -> None:
    before = exported.SerializeToString(deterministic=True)
    convert(exported, "fp16")
    assert exported.SerializeToString(deterministic=True) == before


def test_the_file_is_still_the_contract(tmp_path: Path, exported: onnx.ModelProto) -> None:
    model = convert(exported, "bf16")
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["probability"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["name"] == "slsnet"
    assert metadata["converted"] == "bf16, fused attention"
