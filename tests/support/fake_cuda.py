"""CUDA's runtime and an engine, on the host: what is queued runs at once or goes into a graph.

Keeps count of what is allocated, and fails on what would be an error on a GPU: an address that is
none, a copy beyond a buffer, a run on scratch memory that is too small, a capture that does work.

Its rules of capture are those of `cudaThreadExchangeStreamCaptureMode`: what allocates, frees or
waits is refused, and voids the capture, where this thread captures, or any thread in global mode. A
sticky error is every later call's answer, as an illegal address is.
"""

# ruff: noqa: N802, N815 - CUDA's own names

import ctypes
import inspect
import threading
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np

SIDE = 8


class Status(Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureWrongThread = 908
    cudaErrorInvalidValue = 1


OK = Status.cudaSuccess
Queued = Callable[[], None]


class FakeStream:
    def __init__(self, number: int) -> None:
        self.number = number
        self.recording: list[Queued] | None = None
        self.captured_by: tuple[int, int] = (0, 0)
        """Mode and thread of its capture."""
        self.is_void = False
        self.launches = 0

    def __int__(self) -> int:
        return self.number

    def queue(self, work: Queued) -> None:
        if self.recording is not None:
            self.recording.append(work)
        else:
            work()


class FakeCuda:
    """Stands for `cuda.bindings.runtime`."""

    cudaError_t = Status
    cudaStreamNonBlocking = 1
    cudaDeviceScheduleSpin = 1
    cudaDeviceScheduleBlockingSync = 4
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
    cudaStreamCaptureMode = SimpleNamespace(
        cudaStreamCaptureModeGlobal=0, cudaStreamCaptureModeThreadLocal=1
    )

    def __init__(self, capacity: int = 1 << 30, *, captures: bool = True) -> None:
        self.capacity = capacity
        self.captures = captures
        self.memory: dict[int, Any] = {}
        self.streams: dict[int, FakeStream] = {}
        self.graphs = 0
        self.copies = 0
        self.flags = 0
        self.modes: dict[int, int] = {}
        """Of the threads that have changed theirs: the capture mode that holds for their calls."""
        self.sticky: Status | None = None
        """An error that outlives the call that met it."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cuda") or not inspect.ismethod(found) or self.sticky is None:
            return found
        if name == "cudaGetErrorString":
            return found
        results = len(get_args(get_type_hints(found)["return"])) - 1
        return lambda *_: (self.sticky, *[None] * results)

    def used(self) -> int:
        return sum(ctypes.sizeof(buffer) for buffer in self.memory.values())

    def held(self) -> int:
        """Allocations, streams and graphs that nobody has given back."""
        return len(self.memory) + len(self.streams) + self.graphs

    def view(self, address: int, size: int) -> Any:
        base = max((a for a in self.memory if a <= address), default=-1)
        assert base >= 0
        assert address + size <= base + ctypes.sizeof(self.memory[base]), "beyond the buffer"
        return (ctypes.c_uint8 * size).from_address(address)

    def may_be_unsafe(self) -> bool:
        """Whether a call that may be unsafe is refused now; the captures in its way are void."""
        me = threading.get_ident()
        heeds_others = self.modes.get(me, 0) == 0
        captures = [
            stream
            for stream in self.streams.values()
            if stream.recording is not None
            and ((heeds_others and stream.captured_by[0] == 0) or stream.captured_by[1] == me)
        ]
        for stream in captures:
            stream.is_void = True
        return bool(captures)

    def allocate(self, size: int) -> tuple[Status, int]:
        if self.may_be_unsafe():
            return Status.cudaErrorStreamCaptureUnsupported, 0
        if self.used() + size > self.capacity:
            return Status.cudaErrorMemoryAllocation, 0
        buffer = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(buffer)] = buffer
        return OK, ctypes.addressof(buffer)

    def _free(self, address: int) -> tuple[Status]:
        if self.may_be_unsafe():
            return (Status.cudaErrorStreamCaptureUnsupported,)
        del self.memory[address]
        return (OK,)

    cudaMalloc = cudaMallocHost = allocate
    cudaFree = cudaFreeHost = _free

    def cudaSetDeviceFlags(self, flags: int) -> tuple[Status]:
        self.flags = flags
        return (OK,)

    def cudaMemGetInfo(self) -> tuple[Status, int, int]:
        return OK, self.capacity - self.used(), self.capacity

    def cudaGetLastError(self) -> tuple[Status]:
        return (OK,)

    def cudaGetErrorString(self, status: Status) -> tuple[Status, bytes]:
        return OK, status.name.encode()

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Status, FakeStream]:
        assert flags == self.cudaStreamNonBlocking
        stream = FakeStream(1000 + len(self.streams))
        self.streams[stream.number] = stream
        return OK, stream

    def cudaStreamDestroy(self, stream: FakeStream) -> tuple[Status]:
        del self.streams[stream.number]
        return (OK,)

    def cudaStreamSynchronize(self, stream: FakeStream) -> tuple[Status]:
        if stream.recording is not None:
            stream.is_void = True
            return (Status.cudaErrorStreamCaptureUnsupported,)
        return (OK,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: int, stream: FakeStream
    ) -> tuple[Status]:
        assert kind == 4
        to, of = self.view(target, size), self.view(source, size)

        def copy() -> None:
            self.copies += 1
            ctypes.memmove(to, of, size)

        stream.queue(copy)
        return (OK,)

    def cudaStreamBeginCapture(self, stream: FakeStream, mode: int) -> tuple[Status]:
        if not self.captures:
            return (Status.cudaErrorStreamCaptureUnsupported,)
        stream.recording, stream.is_void = [], False
        stream.captured_by = (mode, threading.get_ident())
        return (OK,)

    def cudaThreadExchangeStreamCaptureMode(self, mode: int) -> tuple[Status, int]:
        before = self.modes.get(threading.get_ident(), 0)
        self.modes[threading.get_ident()] = mode
        return OK, before

    def cudaStreamEndCapture(self, stream: FakeStream) -> tuple[Status, Any]:
        if stream.captured_by[0] != 2 and stream.captured_by[1] != threading.get_ident():
            return Status.cudaErrorStreamCaptureWrongThread, None
        recorded, stream.recording = stream.recording, None
        return (
            (Status.cudaErrorStreamCaptureInvalidated, None) if stream.is_void else (OK, recorded)
        )

    def cudaGraphInstantiate(self, graph: list[Queued], flags: int) -> tuple[Status, Any]:
        assert flags == 0
        self.graphs += 1
        return OK, list(graph)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Status]:
        return (OK,)

    def cudaGraphLaunch(self, executable: list[Queued], stream: FakeStream) -> tuple[Status]:
        stream.launches += 1
        for work in executable:
            work()
        return (OK,)

    def cudaGraphExecDestroy(self, executable: Any) -> tuple[Status]:
        self.graphs -= 1
        return (OK,)


class FakeContext:
    """Gives the red channel as probability; refuses what TensorRT would refuse."""

    spoils_graphs = False
    """Recorded, its work does something else."""

    def __init__(self, engine: "FakeEngine") -> None:
        self.engine = engine
        self.profile: int | None = None
        self.batch = 0
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.runs = 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.engine.cuda.view(address, size)
        self.scratch = (address, size)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream in self.engine.cuda.streams
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        self.batch = shape[0]
        return name == "image" and self.engine.buckets[self.profile] == shape[0]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.scratch[0]
        self.runs += 1
        pixels = self.batch * SIDE * SIDE
        cuda = self.engine.cuda

        def work() -> None:
            with self.engine.using(self.scratch[0]):
                source = cuda.view(self.addresses["image"], 3 * pixels)
                target = cuda.view(self.addresses["probability"], 4 * pixels)
                red = np.ctypeslib.as_array(source).reshape(-1, 3)[:, 0]
                np.ctypeslib.as_array(target).view(np.float32)[:] = red / np.float32(255)

        recorded = cuda.streams[stream].recording is not None
        cuda.streams[stream].queue((lambda: None) if recorded and self.spoils_graphs else work)
        return True


class FakeRtxContext(FakeContext):
    """Allocates while it runs, unless its engine was built to require the user's memory."""

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream in self.engine.cuda.streams
        return self.engine.user_allocation

    def execute_async_v3(self, stream: int) -> bool:
        if not self.engine.user_allocation and self.engine.cuda.may_be_unsafe():
            return False
        return super().execute_async_v3(stream)


class FakeEngine:
    num_io_tensors = 2

    def __init__(self, cuda: FakeCuda, buckets: tuple[int, ...], scratch: int) -> None:
        self.cuda = cuda
        self.buckets = buckets
        self.device_memory_size_v2 = scratch
        self.user_allocation = True
        self.contexts: list[FakeContext] = []
        self._locks: dict[int, threading.Lock] = {}

    def using(self, scratch: int) -> threading.Lock:
        lock = self._locks.setdefault(scratch, threading.Lock())
        assert not lock.locked(), "two contexts run on the same scratch memory"
        return lock

    def create_execution_context(self, how: "str | FakeRtxConfig") -> FakeContext:
        if isinstance(how, FakeRtxConfig):
            assert how.dynamic_shapes_kernel_specialization_strategy == "EAGER"
            self.contexts.append(FakeRtxContext(self))
            how = how.strategy
        else:
            self.contexts.append(FakeContext(self))
        assert how == "USER_MANAGED"
        return self.contexts[-1]

    def create_runtime_config(self) -> "FakeRtxConfig":
        return FakeRtxConfig()

    def get_tensor_name(self, i: int) -> str:
        return ("image", "probability")[i]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name == "image" else "OUTPUT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, SIDE, SIDE, 3) if name == "image" else (-1, SIDE, SIDE)


class FakeRtxConfig:
    """How TensorRT for RTX makes a context."""

    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = "LAZY"
        self.strategy = "STATIC"

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: b"kernels", deserialize=lambda _: True)

    def set_runtime_cache(self, cache: SimpleNamespace) -> bool:
        return True
