"""Streams, memory, graphs and kernels through cuda-python; errors are raised as exceptions.

Every call is one of CUDA's runtime API, except for kernels, which the driver's API loads and NVRTC
compiles. Addresses are integers, sizes are bytes. It is hand-written
because cuda-python returns an error beside each result, and PyTorch and CuPy, which raise it, take
gigabytes.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import driver, nvrtc, runtime
from numpy.typing import NDArray


class CudaError(RuntimeError):
    """CUDA refused a call."""


class CudaMemoryError(CudaError):
    """The GPU, or the host's page-locked memory, has not enough room left."""


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    status, *results = function(*arguments)
    if status != runtime.cudaError_t.cudaSuccess:
        # Clears an error that does not last, so that the next call does not report it.
        runtime.cudaGetLastError()
        kind = (
            CudaMemoryError
            if status == runtime.cudaError_t.cudaErrorMemoryAllocation
            else CudaError
        )
        text = runtime.cudaGetErrorString(status)[1]
        words = text.decode() if isinstance(text, bytes) else str(text)
        raise kind(f"{function.__name__}: {words} ({status.name})")
    return results[0] if results else None


def free_memory() -> int:
    """Return the bytes of GPU memory that nobody uses."""
    status, free, _ = runtime.cudaMemGetInfo()
    return int(free) if status == runtime.cudaError_t.cudaSuccess else 0


def wait_by_spinning(spin: bool) -> None:
    """Set how threads of this process wait for the GPU from now on: by spinning, or asleep.

    CUDA's own choice (`cudaDeviceScheduleAuto`) counts the machine's processors rather than
    those that a container may use, and so spins.
    """
    how = runtime.cudaDeviceScheduleSpin if spin else runtime.cudaDeviceScheduleBlockingSync
    _call(runtime.cudaSetDeviceFlags, how)


def pass_over_recordings() -> None:
    """Let this thread allocate and wait while another one records a graph, in whatever mode.

    In CUDA's global mode, which ONNX Runtime records in, it would be refused and void the
    recording.
    """
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    _call(runtime.cudaThreadExchangeStreamCaptureMode, mode)


class Stream:
    """A stream of its own. It is independent of the default stream, which cannot be captured."""

    def __init__(self) -> None:
        self._stream = _call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)

    @property
    def handle(self) -> int:
        """The value that TensorRT takes as `stream_handle`."""
        return int(self._stream)

    def synchronize(self) -> None:
        """Wait until all queued work is done. Other Python threads run meanwhile."""
        _call(runtime.cudaStreamSynchronize, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Queue a copy. CUDA tells host from device by the addresses."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
        _call(runtime.cudaMemcpyAsync, target, source, size, kind, self._stream)

    def capture(self, enqueue: Callable[[], None]) -> "Graph":
        """Record what `enqueue` queues on this stream, without running it.

        Raises:
            CudaError: some of the work cannot be recorded.
        """
        # Thread-local, so that another thread may allocate without breaking the capture.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call(runtime.cudaStreamBeginCapture, self._stream, mode)
        try:
            enqueue()
        except BaseException:
            # This leaves the stream usable; the broken recording is thrown away.
            _, broken = runtime.cudaStreamEndCapture(self._stream)
            if broken is not None and int(broken):
                runtime.cudaGraphDestroy(broken)
            runtime.cudaGetLastError()
            raise
        graph = _call(runtime.cudaStreamEndCapture, self._stream)
        try:
            return Graph(_call(runtime.cudaGraphInstantiate, graph, 0), self._stream)
        finally:
            runtime.cudaGraphDestroy(graph)

    def close(self) -> None:
        """Destroy the stream once its work is done."""
        runtime.cudaStreamDestroy(self._stream)


class Graph:
    """Recorded work that one call queues again."""

    def __init__(self, executable: Any, stream: Any) -> None:
        self._executable = executable
        self._stream = stream

    def launch(self) -> None:
        """Queue the work on the stream that it was recorded on."""
        _call(runtime.cudaGraphLaunch, self._executable, self._stream)

    def close(self) -> None:
        """Free the recording."""
        runtime.cudaGraphExecDestroy(self._executable)


class DeviceMemory:
    """GPU memory, aligned to 256 bytes at least."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(_call(runtime.cudaMalloc, max(size, 1)))

    def close(self) -> None:
        """Give the memory back."""
        runtime.cudaFree(self.address)


class PinnedArray:
    """A numpy array in page-locked memory: it copies to the GPU at full speed, also in a graph."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        size = int(np.prod(shape)) * dtype.itemsize
        self.address = int(_call(runtime.cudaMallocHost, size))
        memory = (ctypes.c_uint8 * size).from_address(self.address)
        self.array: NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
        self.array[...] = 0

    def close(self) -> None:
        """Give the memory back; `array` must not be touched afterwards."""
        runtime.cudaFreeHost(self.address)


class Kernel:
    """A function in CUDA C++, compiled for a GPU when it is made.

    Args:
        source: CUDA C++ that has it as `extern "C"`.
        name: of the function. Its parameters are `const unsigned char *`, 2 × `long long`,
            3 × `int` and `unsigned char *`.
        compute_capability: the GPU's, such as `9.0`.

    Raises:
        CudaError: it does not compile or load, or NVRTC is not installed.
    """

    PARAMETERS = (
        *(ctypes.c_void_p, ctypes.c_longlong, ctypes.c_longlong),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p),
    )

    def __init__(self, source: str, name: str, compute_capability: str) -> None:
        code = compiled(source, compute_capability)
        # The runtime makes the GPU's context on its first use, and the driver needs one.
        _call(runtime.cudaFree, 0)
        self._module = _call_driver(driver.cuModuleLoadData, code)
        self._function = _call_driver(driver.cuModuleGetFunction, self._module, name.encode())

    def launch(self, stream: Stream, grid: tuple[int, int], block: int, *arguments: int) -> None:
        """Queue one run on a stream.

        Args:
            stream: that it runs on.
            grid: number of blocks along x and y.
            block: threads of a block, along x.
            arguments: the function's; addresses are integers.
        """
        _call_driver(
            driver.cuLaunchKernel,
            self._function,
            *(*grid, 1),
            *(block, 1, 1),
            *(0, stream.handle),
            *((arguments, self.PARAMETERS), 0),
        )


def compiled(source: str, compute_capability: str) -> bytes:
    """Machine code of CUDA C++ for a GPU; needs NVRTC, and no GPU.

    Multiplications and additions are not contracted, so doubles round as on a CPU.

    Raises:
        CudaError: it does not compile (the message has the compiler's), or there is no NVRTC.
    """
    try:
        program = _call_driver(nvrtc.nvrtcCreateProgram, source.encode(), b"kernel.cu", 0, [], [])
    except RuntimeError as error:  # cuda-python found no library to load
        raise CudaError(f"NVRTC is not installed: {error}") from error
    target = f"--gpu-architecture=sm_{compute_capability.replace('.', '')}"
    options = [target.encode(), b"--fmad=false"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        said = bytes(_call_driver(nvrtc.nvrtcGetProgramLogSize, program))
        _call_driver(nvrtc.nvrtcGetProgramLog, program, said)
        raise CudaError(f"NVRTC does not compile it for {target}: {said.decode(errors='replace')}")
    code = bytes(_call_driver(nvrtc.nvrtcGetCUBINSize, program))
    _call_driver(nvrtc.nvrtcGetCUBIN, program, code)
    return code


def _call_driver(function: Callable[..., Any], *arguments: Any) -> Any:
    """As `_call`, for functions of the driver and of NVRTC."""
    status, *results = function(*arguments)
    if status.value:
        raise CudaError(f"{function.__name__}: {status.name}")
    return results[0] if results else None
