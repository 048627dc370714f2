"""The description of an engine file: its key, and the JSON file beside it."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from common.files import write_atomically

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes that an engine is built for, with one optimisation profile each."""


class PlanError(ValueError):
    """An engine file or its sidecar cannot be used. The message says why, and what to do."""


@dataclass(frozen=True)
class PlanKey:
    """All that an engine depends on. Another value in any field needs another engine."""

    onnx_sha256: str
    library: str
    """`tensorrt` or `tensorrt_rtx` with its version, such as `tensorrt 11.4.0.106`."""
    compute_capability: str
    """Such as `9.0`; `any` for an engine that TensorRT for RTX compiles where it runs."""
    device: str
    """`engines.device.Gpu.model`; `any` where only the compute capability counts, as for
    hardware-compatible engines and those of TensorRT for RTX."""
    precision: Precision
    buckets: tuple[int, ...]

    def digest(self) -> str:
        """Return a name for the engine's file. A key gives the same name on every machine."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def differences(self, other: "PlanKey") -> list[str]:
        """Describe, field by field, how `other` (the wanted key) differs from this key."""
        return [
            f"{f.name} is {getattr(self, f.name)}, wanted {getattr(other, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]


@dataclass(frozen=True)
class Layer:
    """One layer of the built engine, as TensorRT's inspector reports it."""

    name: str
    kind: str
    """TensorRT's word for the layer: `correlation` (a convolution), `gemm`, `kgen`, …"""
    reads: tuple[str, ...]
    """Types of the layer's inputs: `fp32`, `fp16`, `bf16`, `int8`, …"""
    writes: tuple[str, ...]
    nodes: tuple[str, ...] = ()
    """The ONNX nodes that the layer was made of."""


@dataclass(frozen=True)
class PlanInfo:
    """The sidecar of an engine file."""

    key: PlanKey
    gpu: str | None
    """Name of the GPU that the engine was built on; None if the builder had none."""
    attention: str
    """The form of attention: `fused`, `chunked` or `plain`."""
    hardware_compatible: bool
    version_compatible: bool
    build_seconds: float
    engine_sha256: str
    engine_bytes: int
    scratch_bytes: Mapping[int, int]
    """Activation memory of one execution context, by bucket."""
    layers: tuple[Layer, ...]
    layers_from: str
    """`inspector`, or `build log` where no GPU can load the engine: the builder logs the same
    text."""
    disagreements: tuple[str, ...] = ()
    """Nodes that the engine computes in another type than asked. The parity gate judges them."""
    model: Mapping[str, str] = field(default_factory=dict)
    """Metadata of the ONNX file: name, version, weights' sha256, training data, …"""
    beside_serving: bool = False
    """Whether the kernels were chosen by their times on a GPU that served meanwhile."""
    parity: Mapping[str, Any] | None = None
    """Result of the parity gate once it has run: `trt_build.parity.Parity`, and `failures`,
    which is empty where the engine may be served."""

    def precisions(self) -> dict[str, int]:
        """Count the layers by the type that they read."""
        return dict(Counter(layer.reads[0] for layer in self.layers if layer.reads).most_common())

    def write(self, engine: Path) -> None:
        """Write the sidecar beside `engine` atomically."""
        payload = dataclasses.asdict(self)
        payload["precisions"] = self.precisions()
        write_atomically(sidecar_path(engine), json.dumps(payload, indent=1).encode())


def sidecar_path(engine: Path) -> Path:
    """Return the path of the sidecar of `engine`."""
    return engine.with_name(engine.name + ".json")


def read_plan_info(engine: Path) -> PlanInfo:
    """Read the sidecar of `engine`.

    Raises:
        PlanError: it is missing or malformed.
    """
    path = sidecar_path(engine)
    try:
        payload: dict[str, Any] = json.loads(path.read_bytes())
        payload.pop("precisions")
        key = payload.pop("key")
        layers = payload.pop("layers")
        scratch = payload.pop("scratch_bytes")
        disagreements = payload.pop("disagreements")
        return PlanInfo(
            key=PlanKey(**{**key, "buckets": tuple(key["buckets"])}),
            layers=tuple(
                Layer(
                    layer["name"],
                    layer["kind"],
                    tuple(layer["reads"]),
                    tuple(layer["writes"]),
                    tuple(layer["nodes"]),
                )
                for layer in layers
            ),
            scratch_bytes={int(bucket): size for bucket, size in scratch.items()},
            disagreements=tuple(disagreements),
            **payload,
        )
    except FileNotFoundError as error:
        raise PlanError(f"{path} is missing: build the engine with python -m trt_build") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{path} is not the sidecar of an engine: {error!r}") from error


def read_engine(engine: Path, info: PlanInfo) -> bytes:
    """Return the engine file's bytes.

    Raises:
        PlanError: they are not the built ones.
    """
    try:
        data = engine.read_bytes()
    except OSError as error:
        raise PlanError(f"{engine} cannot be read: {error.strerror}") from error
    if len(data) != info.engine_bytes:
        raise PlanError(f"{engine} is truncated: {len(data)} of {info.engine_bytes} bytes")
    if hashlib.sha256(data).hexdigest() != info.engine_sha256:
        raise PlanError(f"{engine} is corrupt: its bytes are not those that were built")
    return data


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_buckets(text: str) -> tuple[int, ...]:
    """Read text such as `1,2,4,8`.

    Raises:
        ValueError: the sizes are not positive, or do not ascend.
    """
    buckets = tuple(int(part) for part in text.split(","))
    check_buckets(buckets)
    return buckets


def check_buckets(buckets: Sequence[int]) -> None:
    """Raise ValueError unless `buckets` are positive and ascend."""
    if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
        raise ValueError(f"buckets must be positive and ascend, such as 1,2,4,8: {list(buckets)}")
