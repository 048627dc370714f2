"""The network in a kernel of its own: the default on CPUs with AVX-512 and bfloat16 products.

`slsnet.c` says how it computes, docs/cpu-engine.md how fast and how near to float32. It is one
network's alone, so a file is served by it only after its answer agreed with ONNX Runtime's.
"""

import ctypes
import platform
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.image import MODEL_SIZE
from server.backends import BackendError, BackendInfo
from server.backends.native.weights import WeightsError, network_weights, read_constants
from server.backends.onnxruntime import OnnxRuntimeBackend

__all__ = ["LIBRARY", "NativeBackend", "missing_here"]

VERSION = "1"
"""Goes up whenever the kernel's answers change."""

LIBRARY = Path(__file__).parent / "slsnet-x86_64.so"
"""Built from slsnet.c by `python -m server.backends.native.build`."""

_CPU_FLAGS = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"})
"""As /proc/cpuinfo has them; Linux leaves out what it does not support itself."""

# As with ONNX Runtime: a large batch would make those who come next wait for all of it.
_MAX_BATCH = 8

_MOST_THREADS = 64
"""As slsnet.c has it."""

_MOST_DIFFERENCE = 0.03
"""In probability, on the trial image: bfloat16 changes it by up to 0.005 there."""


def missing_here(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What this machine lacks to run the kernel; empty where it runs."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"it is built for Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        return f"{cpuinfo} cannot be read: {error.strerror}"
    flags = next((line.partition(":")[2].split() for line in lines if line[:5] == "flags"), [])
    lacking = sorted(_CPU_FLAGS.difference(flags))
    return f"the processor has no {', '.join(lacking)}" if lacking else ""


class NativeBackend:
    """The shipped network's architecture, whatever its weights, in bfloat16.

    An image's answer is the same to the bit, whatever it runs with and on how many threads.

    Raises:
        BackendError: the processor cannot run it, the file is another network, or the answers
            differ from ONNX Runtime's.
    """

    def __init__(self, model: Path, *, threads: int) -> None:
        if missing := missing_here():
            raise BackendError(f"The native backend cannot run here: {missing}.")
        try:
            weights = network_weights(read_constants(model))
        except WeightsError as error:
            raise BackendError(f"The native backend cannot load {model}: {error}") from error
        self._threads = min(threads, _MOST_THREADS)
        self._library = _load()
        self._engine: int | None = self._library.slsnet_open(
            weights.ctypes.data, weights.size, self._threads
        )
        if self._engine is None:
            raise BackendError("The native backend has too little memory, or too few threads.")
        try:
            self._model = self._compare(model, threads)
        except BackendError:
            self.close()
            raise

    def describe(self) -> BackendInfo:
        return BackendInfo(
            name="native",
            version=VERSION,
            device="cpu",
            precision="bf16",
            max_batch=_MAX_BATCH,
            model=self._model,
        )

    def warm_up(self) -> None:
        # Each thread on an image of its own, then all on one: all the memory there will ever be.
        for size in (self._threads, 1):
            self.infer(np.zeros((size, MODEL_SIZE, MODEL_SIZE, 3), np.uint8))

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        if batch.dtype != np.uint8 or batch.shape[1:] != (MODEL_SIZE, MODEL_SIZE, 3):
            raise BackendError(f"{batch.dtype} {list(batch.shape)} is no batch of images")
        batch = np.ascontiguousarray(batch)
        probability = np.empty((len(batch), MODEL_SIZE, MODEL_SIZE), np.float32)
        self._library.slsnet_infer(
            self._engine, batch.ctypes.data, len(batch), probability.ctypes.data
        )
        return probability

    def close(self) -> None:
        if self._engine is not None:
            self._library.slsnet_close(self._engine)
            self._engine = None

    def _compare(self, model: Path, threads: int) -> dict[str, str]:
        """The file's metadata, once the answer on a trial image agreed with ONNX Runtime's."""
        reference = OnnxRuntimeBackend(model, threads=threads)
        try:
            image = trial_image()[None]
            difference = float(np.abs(reference.infer(image) - self.infer(image)).max())
            if not difference <= _MOST_DIFFERENCE:
                raise BackendError(
                    f"The native backend does not serve {model}: on the trial image its answer"
                    f" differs from ONNX Runtime's by {difference:.3f} in probability."
                )
            return dict(reference.describe().model)
        finally:
            reference.close()


def trial_image() -> NDArray[np.uint8]:
    """A dark, uneven spot on skin, uint8 [128, 128, 3]: it takes the network's whole range."""
    y, x = np.mgrid[:MODEL_SIZE, :MODEL_SIZE] / MODEL_SIZE
    edge = 0.27 + 0.04 * np.sin(5 * np.arctan2(y - 0.48, x - 0.53))
    lesion = 1 / (1 + np.exp((np.hypot(x - 0.53, 1.2 * (y - 0.48)) - edge) / 0.02))
    grain = 0.03 * np.sin(61 * x + 13 * np.sin(47 * y))
    skin, spot = np.array([0.78, 0.62, 0.56]), np.array([0.42, 0.26, 0.21])
    rgb = skin + (spot - skin) * lesion[..., None] + grain[..., None]
    pixels: NDArray[np.uint8] = (np.clip(rgb, 0, 1) * 255).astype(np.uint8)
    return pixels


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise BackendError(f"The native backend's library cannot be loaded: {error}") from error
    library.slsnet_open.restype = ctypes.c_void_p
    library.slsnet_open.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.slsnet_infer.restype = None
    library.slsnet_infer.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int, ctypes.c_void_p),
    ]
    library.slsnet_close.restype = None
    library.slsnet_close.argtypes = [ctypes.c_void_p]
    return library
