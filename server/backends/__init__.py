"""
What runs the network: one small interface, and the choice of who implements it.

A backend is loaded by its constructor. All its methods block, so the server calls them in threads,
`infer` from at most `BackendInfo.slots` threads at a time.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Backend", "BackendError", "BackendInfo", "Images", "open_backend"]

log = logging.getLogger("slsnet.backends")

# Read when the library is loaded: its switch at run time comes after the first events.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


Images = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]
"""Of a batch: in one array, or each in its own."""


class BackendError(RuntimeError):
    """A backend that cannot be loaded, or an inference that failed."""


@dataclass(frozen=True)
class BackendInfo:
    """What a backend says of itself; `GET /model` shows all of it."""

    name: str
    """As the setting `backend` has it, such as `onnxruntime`."""
    version: str
    """The runtime's."""
    device: str
    """Such as `cpu`, or the GPU's name."""
    precision: str
    """Of the network's weights and most of its arithmetic: `fp32`, `fp16`, …"""
    max_batch: int
    """Largest batch worth forming here."""
    slots: int = 1
    """How many `infer` calls may run at the same time."""
    buckets: tuple[int, ...] = ()
    """Batch sizes that the backend is built for, ascending: it pads a batch to the next one.
    Empty where any size runs as well as another, so that padding would be wasted work."""
    model: Mapping[str, str] = field(default_factory=dict)
    """The ONNX file's metadata: `name`, `version`, `weights_sha256`, `training_data`, …"""
    file_sha256: str = ""
    """Of the bytes that were loaded: which network it is, whatever its metadata says."""


class Backend(Protocol):
    """Runs the exported graph: uint8 pixels in, lesion probability out."""

    def describe(self) -> BackendInfo:
        """What runs, and how it wants to be fed."""

    def warm_up(self) -> None:
        """
        Make the first request as fast as any: run every bucket once.

        Raises:
            BackendError: the network does not run.
        """

    def infer(self, batch: Images) -> NDArray[np.float32]:
        """
        N images, each uint8 `[128, 128, 3]` RGB → lesion probability, float32 `[n, 128, 128]`.

        Images that were never put together are taken as they are, each straight to where this
        backend needs it.

        Raises:
            BackendError: the inference failed; the backend may be asked again.
        """

    def close(self) -> None:
        """Give back what the backend holds; nothing is asked of it afterwards."""


def open_backend(name: str, model: Path, *, threads: int) -> Backend:
    """
    Load `model` (an ONNX file) into the backend called `name`.

    Args:
        name: `torch` or `onnxruntime`; for `auto` and `tensorrt` this is what serves until an
            engine does (`server.backends.engine_cache`): ONNX Runtime on CUDA, else on the CPU.
        model: the ONNX file.
        threads: CPU threads of an image that comes alone, and images that run at the same time.

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
