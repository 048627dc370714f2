"""Backends, which run the network: one small interface, and the choice of an implementation.

A backend is loaded by its constructor. All its methods block, so the server calls them in threads,
`infer` from at most `BackendInfo.slots` threads at a time.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from photos.fitness import Detector
from photos.quality import QualityTable

__all__ = ["Backend", "BackendError", "BackendInfo", "Images", "open_backend"]

log = logging.getLogger("slsnet.backends")

# The library reads it when it is loaded; its switch at run time comes after the first events.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# OpenVINO tells an analytics service of every import, unless this package of its own is not there.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


Images = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]
"""The images of a batch, in one array or each in its own."""


class BackendError(RuntimeError):
    """A backend that cannot be loaded, or an inference that failed."""


@dataclass(frozen=True)
class BackendInfo:
    """A backend's description; `GET /model` shows all of it."""

    name: str
    """Name of the backend in the setting `backend`, such as `onnxruntime`."""
    version: str
    """Version of the runtime."""
    device: str
    """`cpu`, or the name of the GPU."""
    precision: str
    """The type of the network's weights and most of its arithmetic: `fp32`, `fp16`, …"""
    max_batch: int
    """The largest batch that is worth forming for this backend."""
    slots: int = 1
    """How many `infer` calls may run at the same time."""
    buckets: tuple[int, ...] = ()
    """Batch sizes that the backend is built for, ascending: it pads a batch to the next one.
    Empty where any size runs as well as another, so that padding would be wasted work."""
    model: Mapping[str, str] = field(default_factory=dict)
    """The ONNX file's metadata: `name`, `version`, `weights_sha256`, `training_data`, …"""
    file_sha256: str = ""
    """SHA-256 of the bytes that were loaded: it tells the network, whatever its metadata says."""
    quality: QualityTable | None = None
    """What turns its probabilities into a mask's quality; None if nothing is known of that."""
    detector: Detector | None = None
    """What tells pictures that are no dermoscopic photos; None if that is not known."""


class Backend(Protocol):
    """Runs the exported graph: uint8 pixels in, lesion probability out."""

    def describe(self) -> BackendInfo:
        """Describe the backend, and the batches that it takes."""

    def warm_up(self) -> None:
        """Make the first request as fast as any: run every bucket once.

        Raises:
            BackendError: the network does not run.
        """

    def infer(self, batch: Images) -> NDArray[np.float32]:
        """N images, each uint8 `[128, 128, 3]` RGB → lesion probability, float32 `[n, 128, 128]`.

        Images may be in separate arrays; each is copied straight to where the backend needs it.

        Raises:
            BackendError: the inference failed; the backend may be asked again.
        """

    def close(self) -> None:
        """Free what the backend holds; it is not used afterwards."""


def open_backend(name: str, model: Path, *, threads: int) -> Backend:
    """Load `model` (an ONNX file) into the backend called `name`.

    Args:
        name: `torch`, `openvino` or `onnxruntime`. For `auto` and `tensorrt` this loads ONNX
            Runtime, on CUDA or else on the CPU. It serves until an engine does
            (`server.backends.engine_cache`).
        model: the ONNX file.
        threads: number of CPU threads of a lone photo, and of photos that run at the same time.

    Raises:
        BackendError: the backend is unknown or cannot be loaded.
    """
    # Imported here, so that only the runtime that is used is loaded.
    if name == "torch":
        try:
            from server.backends.torch import TorchBackend
        except ImportError as error:
            raise BackendError(
                f"PyTorch cannot be loaded, install requirements-train.txt: {error}"
            ) from error
        return TorchBackend(model)
    if name == "openvino":
        try:
            from server.backends.openvino import OpenVinoBackend
        except ImportError as error:
            raise BackendError(
                f"OpenVINO cannot be loaded, install requirements-openvino.txt: {error}"
            ) from error
        return OpenVinoBackend(model, threads=threads)
    if name not in ("auto", "onnxruntime", "tensorrt"):
        raise BackendError(f"There is no backend called {name!r}.")
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        from server.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        try:
            return OnnxRuntimeCudaBackend(model)
        except BackendError as error:
            log.warning("serving on the CPU: %s", error)
    from server.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(model, threads=threads)
