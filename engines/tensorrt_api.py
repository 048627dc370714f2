"""TensorRT, its lean runtime or TensorRT for RTX, behind the few calls in which they differ."""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engines.device import Gpu, current_gpu
from engines.plan import PlanKey, Precision

MODULES = (
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    "tensorrt_lean",
    "tensorrt_lean_bindings",
)
"""Modules, tried in this order. The plain wheels of RTX and of the lean runtime install
`…_bindings`."""

_NEEDED = {
    "ICudaEngine": ("device_memory_size_v2", "get_device_memory_size_for_profile_v2"),
    "IExecutionContext": ("execute_async_v3", "set_optimization_profile_async"),
}
_NEEDED_TO_BUILD = {
    "BuilderFlag": ("TF32", "VERSION_COMPATIBLE"),
    "IAttention": ("decomposable",),  # the ONNX parser knows opset 23's Attention since 10.14
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
}
_NEEDED_RTX = {
    "BuilderFlag": ("REQUIRE_USER_ALLOCATION",),
    "IExecutionContext": ("is_stream_capturable",),
}
"""CUDA graphs of TensorRT for RTX need these (its release notes of 1.2)."""


RTX_PORTABLE = ("8.6", "8.9", "12.0")
"""An engine of TensorRT for RTX runs on these compute capabilities, unless it is built for one
alone (NVIDIA's support matrix of TensorRT for RTX, the same from 1.0 to 1.5)."""


class TensorRTError(RuntimeError):
    """TensorRT is missing, too old, or refused. The message quotes its own words."""


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT module. Its type is `Any`, since none of the modules ships types."""

    module: Any

    def __post_init__(self) -> None:
        missing = [
            f"{name}.{member}"
            for needed in (
                _NEEDED,
                {} if self.is_lean else _NEEDED_TO_BUILD,
                _NEEDED_RTX if self.is_rtx else {},
            )
            for name, members in needed.items()
            for member in members
            if not hasattr(getattr(self.module, name, None), member)
        ]
        if missing:
            raise TensorRTError(
                f"{self.module.__name__} {self.version} has no {', '.join(missing)}:"
                " TensorRT 10.14 or newer is needed, or TensorRT for RTX 1.2 or newer"
            )

    @property
    def version(self) -> str:
        """The version, such as `11.4.0.106`."""
        return str(self.module.__version__)

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT for RTX, which compiles kernels where the engine runs."""
        return "rtx" in str(self.module.__name__)

    @property
    def is_lean(self) -> bool:
        """Whether it is the lean runtime, which runs only version-compatible engines."""
        return "lean" in str(self.module.__name__)

    @property
    def library(self) -> str:
        """Name and version, in the form that an engine's key has."""
        kind = "_rtx" if self.is_rtx else "_lean" if self.is_lean else ""
        return f"tensorrt{kind} {self.version}"

    def logger(self, write: Callable[[str, str], None]) -> Any:
        """Return an ILogger that hands each message to `write(severity, message)`."""
        trt = self.module
        names = {
            getattr(trt.ILogger, name): name
            for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
        }

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                write(names.get(severity, "INFO"), message)

        return Logger()

    def check_builds(self) -> None:
        """Raise TensorRTError where this module runs engines but builds none."""
        if self.is_lean:
            raise TensorRTError(f"{self.library} builds no engines: install tensorrt-cu13 for that")

    def create_network(self, builder: Any) -> Any:
        """Return an empty strongly typed network: the only kind of TensorRT 11 and RTX. In it
        TensorRT 10, too, must keep the ONNX file's precision.
        """
        flag = self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return builder.create_network(1 << int(flag))

    def can_be_recorded(self, context: Any, stream: int) -> bool:
        """Whether the work of `context` may go into a CUDA graph. Only RTX has to be asked."""
        return not self.is_rtx or bool(context.is_stream_capturable(stream))

    def check_runs_on(self, gpu: Gpu) -> None:
        """Raise TensorRTError where no engine runs on `gpu`: RTX runs on RTX GPUs only."""
        if self.is_rtx and gpu.compute_capability not in self._targets():
            raise TensorRTError(
                f"{self.library} does not run on {gpu.name}, whose compute capability is"
                f" {gpu.compute_capability}, only on {', '.join(self._targets())}:"
                " install tensorrt-cu13 instead"
            )

    def _targets(self) -> list[str]:
        found = (re.fullmatch(r"SM(\d+)(\d)", name) for name in dir(self.module.ComputeCapability))
        versions = [(int(match[1]), int(match[2])) for match in found if match]
        return [f"{major}.{minor}" for major, minor in sorted(versions)]

    def target(self, config: Any, compute_capability: str) -> None:
        """Build for one GPU alone, this machine's (`current`) or another. Only RTX can do that.

        Raises:
            TensorRTError: this is not RTX, or cannot build for that GPU.
        """
        name = "CURRENT"
        if compute_capability != "current":
            name = "SM" + compute_capability.replace(".", "")
        kinds = getattr(self.module, "ComputeCapability", None)
        if kinds is None or not hasattr(config, "set_compute_capability"):
            raise TensorRTError("only TensorRT for RTX builds for another GPU than this machine's")
        if not hasattr(kinds, name):
            known = sorted(k for k in dir(kinds) if re.fullmatch(r"SM\d+", k))
            raise TensorRTError(f"{self.library} has no {name}; it has {', '.join(known)}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(kinds, name), 0)


def find_tensorrt() -> TensorRT:
    """Import the TensorRT that is installed.

    Raises:
        TensorRTError: none can be used.
    """
    reasons = []
    for name in MODULES:
        try:
            return TensorRT(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name != name:
                reasons.append(f"{name}: {error}")
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"{name}: {error}")
    raise TensorRTError(
        "no usable TensorRT: install one of those in requirements-gpu.txt, or requirements-lean.txt"
        + (f" ({'; '.join(reasons)})" if reasons else "")
    )


def plan_key(
    onnx_sha256: str,
    precision: Precision,
    buckets: tuple[int, ...],
    trt: TensorRT,
    *,
    compute_capability: str | None = None,
    hardware_compatible: bool = False,
) -> PlanKey:
    """Return the key of the engine that would be built here.

    `compute_capability` is that of another GPU to build for, or `current` for this GPU alone.

    Raises:
        NoGpuError: TensorRT needs a GPU to build for, and there is none.
    """
    device = "any"
    if compute_capability is not None and compute_capability != "current":
        capability = compute_capability
    elif trt.is_rtx and compute_capability is None:
        capability = "any"
    elif hardware_compatible:
        capability = "8.0+"
    else:
        gpu = current_gpu()
        trt.check_runs_on(gpu)
        capability = gpu.compute_capability
        device = device if trt.is_rtx else gpu.model
    return PlanKey(onnx_sha256, trt.library, capability, device, precision, buckets)
