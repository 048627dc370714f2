"""The GPU of this process, as CUDA describes it through cuda-python."""

from dataclasses import dataclass


class NoGpuError(RuntimeError):
    """No GPU can be used here. The message says what is missing."""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device."""

    name: str
    compute_capability: str
    """Such as `9.0`."""
    memory_bytes: int
    multiprocessors: int
    """Number of multiprocessors; on a MIG slice, those of the slice."""

    @property
    def model(self) -> str:
        """A name that equal cards share: an engine's kernels are chosen by their times on the card.

        Compute capability does not tell an L4 from an RTX 4090, or a MIG slice from its H100.
        """
        return f"{self.name}, {self.multiprocessors} multiprocessors"


def current_gpu() -> Gpu:
    """Return CUDA's current device.

    Raises:
        NoGpuError: there is none.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise NoGpuError("cuda-python is not installed: see requirements-gpu.txt") from error
    try:
        status, count = runtime.cudaGetDeviceCount()
    except RuntimeError as error:  # cuda-python found no CUDA library to load
        raise NoGpuError(f"no NVIDIA driver: {error}") from error
    if status != runtime.cudaError_t.cudaSuccess:
        reasons = {
            runtime.cudaError_t.cudaErrorInsufficientDriver: "no NVIDIA driver, or one older than "
            "this CUDA version needs",
            runtime.cudaError_t.cudaErrorNoDevice: "no NVIDIA GPU is visible to this process",
        }
        raise NoGpuError(reasons.get(status, f"CUDA: {status.name}"))
    if not count:
        raise NoGpuError("no NVIDIA GPU is visible to this process")
    status, device = runtime.cudaGetDevice()
    if status == runtime.cudaError_t.cudaSuccess:
        status, properties = runtime.cudaGetDeviceProperties(device)
    if status != runtime.cudaError_t.cudaSuccess:
        raise NoGpuError(f"CUDA: {status.name}")
    name = properties.name
    return Gpu(
        name=name.decode() if isinstance(name, bytes) else str(name),
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_bytes=int(properties.totalGlobalMem),
        multiprocessors=int(properties.multiProcessorCount),
    )
