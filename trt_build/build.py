"""Builds one engine from the exported ONNX file, and refuses a result that was not asked for."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from common.files import write_atomically
from engines.device import NoGpuError, current_gpu
from engines.plan import (
    BUCKETS,
    PlanInfo,
    Precision,
    check_buckets,
    file_sha256,
)
from engines.tensorrt_api import TensorRT, TensorRTError, find_tensorrt, plan_key
from model.names import check_name, name_of
from trt_build import layers as layer_reports
from trt_build.convert import AttentionForm, ConversionError, convert, default_attention

_NO_KERNEL = "not supported by a dedicated kernel"
"""TensorRT says this of an attention that it cannot fuse."""

DEFAULT_WORKSPACE_BYTES = 4 << 30


class BuildError(RuntimeError):
    """No engine was made, or it is not the one that was asked for."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build. Some options are part of an engine's key; others only change how it is made."""

    network: str | None = None
    """The network that the file has to hold (`model.names`); None takes any."""
    precision: Precision = "fp16"
    buckets: tuple[int, ...] = BUCKETS
    attention: AttentionForm | None = None
    """Form of attention. None takes the form that needs the least memory at this precision."""
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    """The most scratch memory that a fused part of the network may use. A part that needs more does
    not build: the chunked float32 attention needs 2.1 GB at batch 64, the fused one 0.3 GB."""
    timing_cache: Path | None = None
    """File of kernel times: read where it exists, then rewritten (TensorRT; RTX times nothing)."""
    beside_serving: bool = False
    """The GPU serves meanwhile. So its times go into no cache, and the sidecar says so."""
    hardware_compatible: bool = False
    """The engine runs on any GPU from Ampere on, but slower (TensorRT only; RTX always does)."""
    version_compatible: bool = False
    """The engine runs under later TensorRT versions of the same major number, and their lean
    runtimes (TensorRT only)."""
    compute_capability: str | None = None
    """The one GPU to build for: `8.9`, or `current` for this machine's own (TensorRT for RTX;
    its engines run on any RTX GPU otherwise)."""

    def __post_init__(self) -> None:
        check_buckets(self.buckets)


def build(
    onnx_path: Path,
    output: Path,
    options: BuildOptions,
    *,
    ranges: Mapping[str, float] | None = None,
    progress: Callable[[str], None] = lambda _: None,
    trt: TensorRT | None = None,
    gated: bool = False,
) -> PlanInfo:
    """Build `output` and its sidecar from the exported `onnx_path`; both whole or not at all.

    `ranges` come from `trt_build.calibrate`, for int8. `progress` gets a line for each step.
    `gated`: the parity gate comes next. Then a few layers of another type than asked are noted
    and left to it: TensorRT takes a cast into the layer behind it, which reads what the cast read.

    Raises:
        BuildError: the engine is not the one asked for.
        ConversionError, OtherNetworkError: the graph is not the one exported of this network.
        TensorRTError, NoGpuError, OSError: nothing can be built here, or written.
    """
    started = time.monotonic()
    trt = trt or find_tensorrt()
    trt.check_builds()
    key = plan_key(
        file_sha256(onnx_path),
        options.precision,
        options.buckets,
        trt,
        compute_capability=options.compute_capability,
        hardware_compatible=options.hardware_compatible,
    )
    exported, metadata = _load(onnx_path, options.network)
    attention, model, made = _convert(trt, exported, options, ranges, progress)
    layers, layers_from, scratch = _read_back(trt, made, host_code=options.version_compatible)
    problems = _disagreements(model, layers, options.precision, progress, gated=gated)
    info = PlanInfo(
        key=key,
        gpu=_gpu_name(),
        attention=attention,
        hardware_compatible=options.hardware_compatible,
        version_compatible=options.version_compatible,
        build_seconds=round(time.monotonic() - started, 3),
        engine_sha256=hashlib.sha256(made.engine).hexdigest(),
        engine_bytes=len(made.engine),
        scratch_bytes=dict(zip(options.buckets, scratch, strict=True)),
        layers=layers,
        layers_from=layers_from,
        disagreements=tuple(problems),
        model=metadata,
        beside_serving=options.beside_serving and not trt.is_rtx,
    )
    write_atomically(output, made.engine)
    info.write(output)
    progress(
        f"{output}: {len(made.engine) / 1e6:.1f} MB in {info.build_seconds:.1f} s, scratch memory"
        f" {max(scratch) / 1e9:.2f} GB at batch {options.buckets[-1]}, layers by what they read:"
        f" {', '.join(f'{n} {name}' for name, n in info.precisions().items())} ({layers_from})"
    )
    return info


def _load(path: Path, network: str | None) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The graph and what it says of itself; it has to be of this network, if one is named."""
    try:
        exported = onnx.load(path)
    except DecodeError as error:
        raise ConversionError(f"{path} is not an ONNX file") from error
    metadata = {entry.key: entry.value for entry in exported.metadata_props}
    check_name(path, name_of(metadata), network)
    return exported, metadata


@dataclass(frozen=True)
class _Made:
    """The engine's bytes, and TensorRT's logger with what it said meanwhile."""

    engine: bytes
    logger: Any
    messages: list[tuple[str, str]]


def _convert(
    trt: TensorRT,
    exported: onnx.ModelProto,
    options: BuildOptions,
    ranges: Mapping[str, float] | None,
    progress: Callable[[str], None],
) -> tuple[AttentionForm, onnx.ModelProto, _Made]:
    """Convert and build, with chunked attention where the fused form has no kernel."""
    attention = options.attention or default_attention(options.precision)
    while True:
        progress(f"{trt.library}: {options.precision}, {attention} attention")
        model = convert(exported, options.precision, attention=attention, ranges=ranges)
        messages: list[tuple[str, str]] = []
        logger = _logger(trt, messages)
        try:
            engine = _serialise(trt, logger, messages, model, options, progress)
            return attention, model, _Made(engine, logger, messages)
        except BuildError as error:
            # The card and the version decide which shapes and types have a fused kernel. The ONNX
            # parser gives no access to IAttention, whose `decomposable` would tell.
            asked_for = options.attention is not None
            if asked_for or attention != "fused" or _NO_KERNEL not in str(error):
                raise
            progress(f"no fused attention: {error}")
            attention = "chunked"


def _disagreements(
    model: onnx.ModelProto,
    layers: tuple[Any, ...],
    precision: Precision,
    progress: Callable[[str], None],
    *,
    gated: bool,
) -> list[str]:
    """The layers of another type than asked for; see `build` for `gated`."""
    expected = layer_reports.expected_types(model)
    problems = layer_reports.disagreements(expected, layers)
    if problems:
        text = f"asked for {precision}, but the engine differs: " + "; ".join(problems[:8])
        if not gated or 2 * len(problems) > len(expected):
            raise BuildError(text)
        progress(f"warning: {text}")
    return problems


def _logger(trt: TensorRT, messages: list[tuple[str, str]]) -> Any:
    return trt.logger(lambda severity, message: messages.append((severity, message)))


def _serialise(
    trt: TensorRT,
    logger: Any,
    messages: list[tuple[str, str]],
    model: onnx.ModelProto,
    options: BuildOptions,
    progress: Callable[[str], None],
) -> bytes:
    module = trt.module
    builder = module.Builder(logger)
    network = trt.create_network(builder)
    parser = module.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise BuildError(f"{trt.library} cannot read the graph: {'; '.join(errors)}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    # In fp16 and bf16 the float32 parts read 16-bit values, which TF32 holds exactly.
    if options.precision == "fp32":
        config.clear_flag(module.BuilderFlag.TF32)
    else:
        config.set_flag(module.BuilderFlag.TF32)
    if trt.is_rtx:
        # Memory that RTX allocates while it runs cannot be recorded in a CUDA graph.
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.version_compatible:
        if trt.is_rtx:
            raise BuildError("TensorRT for RTX has no version-compatible engines")
        config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible and not trt.is_rtx:
        config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.compute_capability is not None:
        trt.target(config, options.compute_capability)
    _add_profiles(builder, network, config, options.buckets)
    # TensorRT for RTX times nothing during a build, and deprecates these calls.
    timing_cache = None if trt.is_rtx else options.timing_cache
    cache = _load_timing_cache(config, timing_cache)
    monitor = _progress_monitor(module, progress)
    config.progress_monitor = monitor

    progress(f"building {network.num_layers} layers for batches of {list(options.buckets)}")
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        errors = [text for severity, text in messages if severity in ("ERROR", "INTERNAL_ERROR")]
        # Without a driver every build logs this error, and it never stops one.
        errors = [e for e in errors if "cudaError 35" not in e] or ["it gives no reason"]
        hint = "; allow more --workspace-mib" if "OutOfMemory" in errors[-1] else ""
        raise BuildError(f"{trt.library} did not build the engine: {errors[-1]}{hint}")
    if timing_cache is not None and cache is not None and not options.beside_serving:
        write_atomically(timing_cache, bytes(memoryview(cache.serialize())))
    return bytes(memoryview(serialised))


def _add_profiles(builder: Any, network: Any, config: Any, buckets: tuple[int, ...]) -> None:
    image = network.get_input(0)
    rest = tuple(image.shape)[1:]
    for bucket in buckets:
        profile = builder.create_optimization_profile()
        # A profile of batch 1 alone makes every shape static. Then the fused attention kernel
        # refuses small maps ("not supported by a dedicated kernel"); with 1 to 2 it takes them.
        most = max(bucket, 2)
        profile.set_shape(image.name, (bucket, *rest), (bucket, *rest), (most, *rest))
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT refuses an optimisation profile of batch {bucket}")


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    data = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(data)
    # A cache of another TensorRT version or GPU is refused: then start an empty one.
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _progress_monitor(module: Any, progress: Callable[[str], None]) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """Reports the outermost phase only, since there are hundreds of inner ones."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                progress(f"{phase_name}: step {step + 1} of {self.steps[phase_name]}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _read_back(
    trt: TensorRT, made: _Made, *, host_code: bool
) -> tuple[tuple[Any, ...], str, list[int]]:
    """Return the engine's layers, where they were read, and its scratch memory by profile.

    `host_code`: the engine carries code for the host, as a version-compatible one does.
    """
    try:
        current_gpu()
    except NoGpuError:
        log = [message for _, message in made.messages]
        return (
            layer_reports.from_build_log(log),
            "build log",
            layer_reports.scratch_from_build_log(log),
        )
    module = trt.module
    runtime = module.Runtime(made.logger)
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(made.engine)
    if engine is None:
        raise TensorRTError(f"{trt.library} cannot load the engine that it has just built")
    text = engine.create_engine_inspector().get_engine_information(
        module.LayerInformationFormat.JSON
    )
    scratch = [
        int(engine.get_device_memory_size_for_profile_v2(i))
        for i in range(engine.num_optimization_profiles)
    ]
    return layer_reports.from_inspector(text), "inspector", scratch


def _gpu_name() -> str | None:
    try:
        return current_gpu().name
    except NoGpuError:
        return None
