"""Building with TensorRT 10, 11 and for RTX as they are (`surface`), with a made-up engine."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from engines.device import Gpu
from engines.plan import read_plan_info
from engines.tensorrt_api import TensorRT, TensorRTError, plan_key
from tests.support import MODEL
from tests.support import surface as surfaces
from trt_build import __main__ as command
from trt_build import build as build_module
from trt_build.build import BuildOptions, build
from trt_build.convert import convert
from trt_build.layers import expected_types

GPU = Gpu("NVIDIA H100 80GB HBM3", "9.0", 80 << 30, 132)


class Recorded:
    """An object of one recorded class: its attributes, and the behaviour given; nothing else."""

    def __init__(
        self, members: frozenset[str], behaviour: dict[str, Any], calls: list[Any]
    ) -> None:
        unknown = behaviour.keys() - members
        assert not unknown, f"the real class has no {unknown}"
        object.__setattr__(self, "_members", members)
        object.__setattr__(self, "_behaviour", behaviour)
        object.__setattr__(self, "_calls", calls)

    def __getattr__(self, name: str) -> Any:
        if name not in self._members:
            raise AttributeError(name)
        if name in self._behaviour:
            return self._behaviour[name]

        def call(*arguments: Any) -> bool:
            self._calls.append((name, arguments))
            return True

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._members:
            raise AttributeError(name)
        self._calls.append((name, value))


class FakeTensorRT:
    """A TensorRT module of one version, whose builder gives a made-up engine."""

    def __init__(self, surface: str, layers: str) -> None:
        self.classes = surfaces.classes(surface)
        self.calls: list[Any] = []
        self.layers = layers
        self.timing_cache: bytes = b""
        self.log: Any = None
        self.module = surfaces.module(surface)
        self.module.Builder = self._builder
        self.has_fused_attention = True
        self.parsed = b""
        self.module.OnnxParser = lambda *_: self._object("OnnxParser", parse=self._parse)
        self.module.Runtime = self._runtime

    def _object(self, name: str, /, **behaviour: Any) -> Recorded:
        return Recorded(self.classes[name], behaviour, self.calls)

    def _parse(self, model: bytes) -> bool:
        self.parsed = model
        return True

    def _builder(self, logger: Any) -> Recorded:
        image = self._object("ITensor", name="image", shape=(-1, 128, 128, 3))
        network = self._object("INetworkDefinition", get_input=lambda _: image, num_layers=600)
        config = self._object(
            "IBuilderConfig",
            add_optimization_profile=lambda _: 0,
            create_timing_cache=self._timing_cache,
            set_timing_cache=lambda cache, **_: cache.serialize() != b"mismatch",
        )

        def serialise(_network: Any, _config: Any) -> bytes | None:
            nodes = onnx.load_from_string(self.parsed).graph.node
            if not self.has_fused_attention and any(n.op_type == "Attention" for n in nodes):
                words = "Attention operation was not supported by a dedicated kernel."
                logger.log(self.module.ILogger.ERROR, words)
                return None
            self.timing_cache += b"timed"
            return b"an engine"

        return self._object(
            "Builder",
            create_network=self._network(network),
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: self._object("IOptimizationProfile"),
            build_serialized_network=serialise,
        )

    def _network(self, network: Recorded) -> Any:
        def create(flags: int) -> Recorded:
            strongly = self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            assert flags == 1 << strongly
            return network

        return create

    def _timing_cache(self, data: bytes) -> Recorded:
        self.timing_cache = data
        return self._object("ITimingCache", serialize=lambda: self.timing_cache)

    def _runtime(self, logger: Any) -> Recorded:
        inspector = self._object("EngineInspector", get_engine_information=lambda _: self.layers)
        engine = self._object(
            "ICudaEngine",
            create_engine_inspector=lambda: inspector,
            num_optimization_profiles=2,
            get_device_memory_size_for_profile_v2=lambda i: 1000 * (i + 1),
        )

        def deserialize(_: bytes) -> Recorded | None:
            # Version-compatible engines carry a lean runtime, which is code for the host.
            flag = getattr(self.module.BuilderFlag, "VERSION_COMPATIBLE", None)
            has_host_code = ("set_flag", (flag,)) in self.calls
            allowed = ("engine_host_code_allowed", True) in self.calls
            return None if has_host_code and not allowed else engine

        return self._object("Runtime", deserialize_cuda_engine=deserialize)


def _inspector_json(
    surface: str, expected: dict[str, frozenset[str]] | None = None, wrong: str | None = None
) -> str:
    """What the inspector says of a faithful fp16 engine, in that version's words."""
    names = {"fp16": "Half", "fp32": "Float"}
    layers = []
    for node, types in (expected or expected_types(convert(onnx.load(MODEL), "fp16"))).items():
        kind = min(types)  # fp16 of an attention that took its casts in
        kind = "fp32" if node == wrong else kind
        tensor: dict[str, Any] = {"Name": node, "Dimensions": [1, 16, 64, 64]}
        if surface.startswith("tensorrt-10"):
            tensor["Format/Datatype"] = names[kind]
        else:
            tensor |= {"Datatype": names[kind], "Format": "(NHWC) Channel major format"}
        layers.append(
            {
                "Name": f"{node}_myl0_1",
                "LayerType": "gemm",
                "Inputs": [tensor],
                "Outputs": [tensor],
                "Metadata": f"[ONNX Layer: {node}]",
            }
        )
    return json.dumps({"Layers": layers, "Bindings": []})


@pytest.fixture(params=["tensorrt-10.16", "tensorrt-11.4"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    monkeypatch.setattr(build_module, "current_gpu", lambda: GPU)
    monkeypatch.setattr("engines.tensorrt_api.current_gpu", lambda: GPU)
    return FakeTensorRT(request.param, _inspector_json(request.param))


def test_an_engine_is_built_with_what_the_version_has(fake: FakeTensorRT, tmp_path: Path) -> None:
    output = tmp_path / "x.engine"
    options = BuildOptions(buckets=(1, 64), hardware_compatible=True, version_compatible=True)
    info = build(MODEL, output, options, trt=TensorRT(fake.module))

    assert info.layers_from == "inspector"
    assert info.gpu == GPU.name
    assert info.scratch_bytes == {1: 1000, 64: 2000}
    assert info.key.library == f"tensorrt {fake.module.__version__}"
    assert info.key.compute_capability == "8.0+"
    assert output.read_bytes() == b"an engine"
    assert ("hardware_compatibility_level", "AMPERE_PLUS") in fake.calls
    flags = fake.module.BuilderFlag
    assert ("set_flag", (flags.VERSION_COMPATIBLE,)) in fake.calls
    assert ("set_flag", (flags.TF32,)) in fake.calls
    shapes = [arguments[1:] for name, arguments in fake.calls if name == "set_shape"]
    assert [shape[1][0] for shape in shapes] == [1, 64]


def test_float32_turns_tf32_off(fake: FakeTensorRT, tmp_path: Path) -> None:
    options = BuildOptions(precision="fp32", buckets=(1, 2))
    with pytest.raises(build_module.BuildError, match="asked for fp32"):  # the fake says fp16
        build(MODEL, tmp_path / "x.engine", options, trt=TensorRT(fake.module))
    assert ("clear_flag", (fake.module.BuilderFlag.TF32,)) in fake.calls


def test_a_node_in_another_precision_fails_the_build(fake: FakeTensorRT, tmp_path: Path) -> None:
    victim = next(iter(expected_types(convert(onnx.load(MODEL), "fp16"))))
    fake.layers = _inspector_json("tensorrt-11.4", wrong=victim)
    with pytest.raises(build_module.BuildError, match=f"{victim} reads fp32, asked for fp16"):
        build(MODEL, tmp_path / "x.engine", BuildOptions(buckets=(1, 2)), trt=TensorRT(fake.module))
    assert not list(tmp_path.iterdir())


def test_attention_that_cannot_be_fused_is_taken_in_chunks(
    fake: FakeTensorRT, tmp_path: Path
) -> None:
    fake.has_fused_attention = False
    chunked = expected_types(convert(onnx.load(MODEL), "fp16", attention="chunked"))
    fake.layers = _inspector_json("tensorrt-11.4", chunked)
    trt, said = TensorRT(fake.module), list[str]()
    output = tmp_path / "x.engine"
    build(MODEL, output, BuildOptions(buckets=(1, 2)), trt=trt, progress=said.append)
    assert read_plan_info(output).attention == "chunked"
    assert any("no fused attention" in line and "dedicated kernel" in line for line in said)

    asked = BuildOptions(buckets=(1, 2), attention="fused")
    with pytest.raises(build_module.BuildError, match="not supported by a dedicated kernel"):
        build(MODEL, tmp_path / "y.engine", asked, trt=trt)


def test_an_absorbed_cast_is_left_to_the_parity_gate(fake: FakeTensorRT, tmp_path: Path) -> None:
    victim = next(iter(expected_types(convert(onnx.load(MODEL), "fp16"))))
    fake.layers = _inspector_json("tensorrt-11.4", wrong=victim)
    said: list[str] = []
    output = tmp_path / "x.engine"
    options = BuildOptions(buckets=(1, 2))
    trt = TensorRT(fake.module)
    build(MODEL, output, options, trt=trt, progress=said.append, gated=True)
    (problem,) = read_plan_info(output).disagreements
    assert problem == f"{victim} reads fp32, asked for fp16"
    assert any(line.startswith("warning: ") and problem in line for line in said)


def test_engine_of_another_precision_fails_even_when_gated(
    fake: FakeTensorRT, tmp_path: Path
) -> None:
    """Float32 passes any gate, and is not what was asked."""
    fake.layers = _inspector_json("tensorrt-11.4").replace("Half", "Float")
    options, trt = BuildOptions(buckets=(1, 2)), TensorRT(fake.module)
    with pytest.raises(build_module.BuildError, match="asked for fp16, but the engine differs"):
        build(MODEL, tmp_path / "x.engine", options, trt=trt, gated=True)
    assert not list(tmp_path.iterdir())


def test_an_engine_with_layer_names_only_is_refused(fake: FakeTensorRT, tmp_path: Path) -> None:
    fake.layers = json.dumps({"Layers": ["conv1", "conv2"]})
    with pytest.raises(ValueError, match="layer names only"):
        build(MODEL, tmp_path / "x.engine", BuildOptions(buckets=(1, 2)), trt=TensorRT(fake.module))


def test_the_timing_cache_is_kept_reused_and_replaced(fake: FakeTensorRT, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    options = BuildOptions(buckets=(1, 2), timing_cache=cache)
    for expected in (b"timed", b"timedtimed"):
        build(MODEL, tmp_path / "x.engine", options, trt=TensorRT(fake.module))
        assert cache.read_bytes() == expected
    cache.write_bytes(b"mismatch")
    build(MODEL, tmp_path / "x.engine", options, trt=TensorRT(fake.module))
    assert cache.read_bytes() == b"timed", "one of another version is started anew"


def test_timings_beside_serving_are_marked_and_not_cached(
    fake: FakeTensorRT, tmp_path: Path
) -> None:
    cache, output = tmp_path / "timing.cache", tmp_path / "x.engine"
    cache.write_bytes(b"of an idle GPU")
    options = BuildOptions(buckets=(1, 2), timing_cache=cache, beside_serving=True)
    build(MODEL, output, options, trt=TensorRT(fake.module))
    assert cache.read_bytes() == b"of an idle GPU"
    assert read_plan_info(output).beside_serving


def test_a_key_names_this_gpu_and_version(fake: FakeTensorRT) -> None:
    key = plan_key("0" * 64, "fp16", (1, 2), TensorRT(fake.module))
    assert key.compute_capability == "9.0"
    assert key.device == GPU.model == "NVIDIA H100 80GB HBM3, 132 multiprocessors"
    assert key.library == f"tensorrt {fake.module.__version__}"


def test_a_version_without_attention_is_refused_by_name() -> None:
    old = FakeTensorRT("tensorrt-10.13", "")
    with pytest.raises(
        TensorRTError, match=r"tensorrt 10\.13.* has no IAttention\.decomposable.*10\.14 or newer"
    ):
        TensorRT(old.module)


def test_cards_of_one_compute_capability_share_no_engine(
    fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = TensorRT(fake.module)
    keys = []
    for name, multiprocessors in [("NVIDIA L4", 58), ("NVIDIA L40S", 142), ("NVIDIA L40S", 36)]:
        gpu = Gpu(name, "8.9", 24 << 30, multiprocessors)
        monkeypatch.setattr("engines.tensorrt_api.current_gpu", lambda gpu=gpu: gpu)
        keys.append(plan_key("0" * 64, "fp16", (1, 2), trt))
        portable = plan_key("0" * 64, "fp16", (1, 2), trt, hardware_compatible=True)
        assert portable.device == "any"
    assert len({key.digest() for key in keys}) == 3


@pytest.mark.parametrize(
    ("surface", "asks"), [("tensorrt-11.4", False), ("tensorrt-rtx-1.7", True)]
)
def test_rtx_is_told_to_allocate_nothing_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, surface: str, asks: bool
) -> None:
    """Or its work cannot be recorded in a CUDA graph (its release notes of 1.2)."""
    monkeypatch.setattr(build_module, "current_gpu", lambda: GPU)
    monkeypatch.setattr("engines.tensorrt_api.current_gpu", lambda: GPU)
    fake = FakeTensorRT(surface, _inspector_json(surface))
    build(MODEL, tmp_path / "x.engine", BuildOptions(buckets=(1, 2)), trt=TensorRT(fake.module))
    flags = fake.module.BuilderFlag
    told = {arguments[0] for name, arguments in fake.calls if name == "set_flag"}
    assert (getattr(flags, "REQUIRE_USER_ALLOCATION", None) in told) is asks


def test_an_rtx_that_cannot_be_told_is_refused_by_name() -> None:
    module = surfaces.module("tensorrt-rtx-1.7")
    del module.BuilderFlag.REQUIRE_USER_ALLOCATION
    with pytest.raises(
        TensorRTError,
        match=r"no BuilderFlag\.REQUIRE_USER_ALLOCATION: .* RTX 1\.2 or newer",
    ):
        TensorRT(module)


def test_the_lean_runtime_runs_engines_and_builds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not surfaces.classes("tensorrt-lean-11.4").keys() & {"Builder", "OnnxParser"}
    trt = TensorRT(surfaces.module("tensorrt-lean-11.4"))
    assert (trt.is_lean, trt.is_rtx, trt.library) == (True, False, "tensorrt_lean 11.4.0.106")
    refusal = r"tensorrt_lean 11\.4\.0\.106 builds no engines: install tensorrt-cu13"
    with pytest.raises(TensorRTError, match=refusal):
        build(MODEL, tmp_path / "x.engine", BuildOptions(), trt=trt)
    monkeypatch.setattr(command, "find_tensorrt", lambda: trt)
    assert command.main(["--onnx", str(MODEL), "--output", "x.engine", "--parity"]) == 1
    assert "builds no engines" in capsys.readouterr().err


def test_interfaces_that_version_11_removed_are_missing() -> None:
    """The fake would not notice a use of what 11 removed if its record were incomplete."""
    classes = surfaces.classes("tensorrt-11.4")
    assert "FP16" not in classes["BuilderFlag"]
    assert "EXPLICIT_BATCH" not in classes["NetworkDefinitionCreationFlag"]
    assert "device_memory_size" not in classes["ICudaEngine"]
    assert "execute_async_v3" in classes["IExecutionContext"]
