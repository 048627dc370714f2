"""Runs a built engine: pinned buffers, one context and one captured CUDA graph for each bucket.

    python -m engines.runtime slsnet.engine

loads an engine and runs it once, in a process of its own, since a bad engine may end the process.

An engine has two slots, each with its own stream, buffers and contexts, so that the copies of one
batch hide behind the compute of the other. A slot's contexts never run at the same time, and share
its scratch memory.
"""

import logging
import queue
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.files import write_atomically
from engines.device import Gpu, NoGpuError, current_gpu
from engines.plan import PlanError, PlanInfo, read_engine, read_plan_info
from engines.tensorrt_api import RTX_PORTABLE, TensorRT, TensorRTError, find_tensorrt
from photos.image import MODEL_SIZE

SLOTS = 2

_MOST_GRAPH_DIFFERENCE = 1e-2
"""The largest difference in probability that a graph may make, since kernels sum in any order."""

log = logging.getLogger("slsnet.tensorrt")


class EngineError(RuntimeError):
    """The engine cannot run here, or an inference failed."""


def check_fits(info: PlanInfo, trt: TensorRT, gpu: Gpu) -> None:
    """Raise PlanError if the engine is for another TensorRT version or GPU.

    Raise TensorRTError if this TensorRT runs no engine on that GPU.
    """
    if not _same_library(info, trt):
        how = "with --version-compatible" if trt.is_lean else "again"
        raise PlanError(
            f"the engine was built by {info.key.library}, this is {trt.library}: build it {how}"
        )
    trt.check_runs_on(gpu)
    built_for = info.key.compute_capability
    here = gpu.compute_capability
    if built_for == "any" and here not in RTX_PORTABLE:
        raise PlanError(
            f"the engine was built for compute capabilities {', '.join(RTX_PORTABLE)},"
            f" {gpu.name} has {here}: build it with --compute-capability {here}"
        )
    portable = built_for == "any" or (
        built_for.endswith("+") and _version(here) >= _version(built_for[:-1])
    )
    if not portable and built_for == here and info.key.device not in ("any", gpu.model):
        raise PlanError(
            f"the engine was built for {info.key.device}, this is {gpu.model}: build it here"
        )
    if not portable and built_for != here:
        raise PlanError(
            f"the engine was built for compute capability {built_for}, {gpu.name} has {here}:"
            " build it here"
        )


def _same_library(info: PlanInfo, trt: TensorRT) -> bool:
    if info.key.library == trt.library:
        return True
    built_name, built_version = info.key.library.split(" ")
    name, version = trt.library.split(" ")
    return (
        info.version_compatible
        and built_name == name.removesuffix("_lean")
        and built_version.split(".")[0] == version.split(".")[0]
        and _version(version) >= _version(built_version)
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


class EngineRunner:
    """An engine file, loaded and ready. `infer` may be called from any number of threads.

    `spin`: threads wait for the GPU by asking it all the time, which takes a core for each slot.

    Raises:
        PlanError: the file is missing, truncated, or for another version or GPU.
        NoGpuError, TensorRTError: nothing can run here.
        EngineError: the memory does not suffice.
    """

    def __init__(self, engine: Path, *, spin: bool = False) -> None:
        self.info = read_plan_info(engine)
        self.gpu = current_gpu()
        trt = find_tensorrt()
        check_fits(self.info, trt, self.gpu)
        self.library = trt.library
        data = read_engine(engine, self.info)
        # cuda-python is installed: current_gpu() would have failed otherwise.
        from engines import cuda

        self._cuda = cuda
        free = cuda.free_memory()
        self._errors: list[str] = []
        self._logger = trt.logger(self._log)
        self._runtime = trt.module.Runtime(self._logger)
        if self.info.version_compatible:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise PlanError(f"{trt.library} cannot load {engine}: {self._last_error()}")
        self._slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        self._opened: list[_Slot] = []
        configure = _RtxRuntime(trt, engine) if trt.is_rtx else None
        try:
            cuda.wait_by_spinning(spin)
            for _ in range(SLOTS):
                slot = _Slot(trt, self._engine, self.info.key.buckets, configure)
                self._opened.append(slot)
                self._slots.put(slot)
        except cuda.CudaMemoryError as error:
            need = SLOTS * int(self._engine.device_memory_size_v2)
            self.close()
            raise EngineError(
                f"out of GPU memory: {SLOTS} contexts need {need / 1e9:.2f} GB of scratch memory,"
                f" {free / 1e9:.2f} GB were free on {self.gpu.name} before the engine ({error})"
            ) from error
        except (cuda.CudaError, TensorRTError) as error:
            self.close()
            raise EngineError(f"{error}; TensorRT says: {self._last_error()}") from error
        if configure is not None:
            configure.save()

    @property
    def graphs(self) -> int:
        """The number of contexts that run as a captured CUDA graph."""
        return sum(lane.graph is not None for slot in self._opened for lane in slot.lanes)

    def infer(self, batch: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """N × uint8 [128, 128, 3] → float32 [n, 128, 128]; any n, in steps of the largest bucket.

        Each image is copied once, to the place where the GPU reads it.

        Raises:
            EngineError: the GPU failed.
        """
        most = self.info.key.buckets[-1]
        if len(batch) > most:
            parts = [self.infer(batch[i : i + most]) for i in range(0, len(batch), most)]
            return np.concatenate(parts)
        slot = self._slots.get()
        try:
            return slot.infer(batch)
        except (self._cuda.CudaError, TensorRTError) as error:
            raise EngineError(f"a batch of {len(batch)} failed: {error}") from error
        finally:
            self._slots.put(slot)

    def close(self) -> None:
        """Free contexts, graphs and memory. No call of `infer` may be running or follow."""
        for slot in self._opened:
            slot.close()
        self._opened.clear()
        self._engine = None

    def _log(self, severity: str, message: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self._errors.append(message)
            log.error("%s", message)
        elif severity == "WARNING":
            log.warning("%s", message)

    def _last_error(self) -> str:
        return self._errors[-1] if self._errors else "nothing"


class _Lane:
    """One bucket of a slot: a context whose shapes never change, and its graph."""

    def __init__(
        self,
        trt: TensorRT,
        context: Any,
        bucket: int,
        slot: "_Slot",
        profile: int,
        image: str,
        probability: str,
    ) -> None:
        self.bucket = bucket
        self.graph: Any = None
        self._context = context
        self._slot = slot
        handle = slot.stream.handle
        done = context.set_optimization_profile_async(profile, handle)
        slot.stream.synchronize()
        done = done and context.set_input_shape(image, (bucket, *slot.image.array.shape[1:]))
        done = done and context.set_tensor_address(image, slot.device_image.address)
        done = done and context.set_tensor_address(probability, slot.device_probability.address)
        if not done:
            raise TensorRTError(f"TensorRT refuses a batch of {bucket}")
        # The first run allocates and, on RTX, compiles. So it must not be recorded.
        pixels = np.random.default_rng(0).integers(0, 256, slot.image.array.shape, np.uint8)
        expected = self._answer(pixels)
        self.graph = self._capture(trt)
        try:
            if self.graph is not None:
                self._prove(pixels, expected)
        except BaseException:
            self.close()
            raise

    def _answer(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        self._slot.image.array[...] = pixels
        self.run()
        probability: NDArray[np.float32] = self._slot.probability.array[: self.bucket].copy()
        return probability

    def _prove(self, pixels: NDArray[np.uint8], expected: NDArray[np.float32]) -> None:
        """Drop the graph unless it gives the same answer for `pixels` as the engine alone."""
        # Run another batch first: after it, a graph that does nothing gives the wrong answer.
        self._slot.image.array[...] = 0
        self._enqueue()
        self._slot.stream.synchronize()
        if not np.allclose(self._answer(pixels), expected, atol=_MOST_GRAPH_DIFFERENCE):
            log.warning(
                "no CUDA graph for batches of %d: its answers are not the engine's", self.bucket
            )
            self.graph.close()
            self.graph = None

    def _enqueue(self) -> None:
        slot = self._slot
        image, probability = slot.image.array[: self.bucket], slot.probability.array[: self.bucket]
        slot.stream.copy(slot.device_image.address, slot.image.address, image.nbytes)
        if not self._context.execute_async_v3(slot.stream.handle):
            raise TensorRTError(f"TensorRT did not run a batch of {self.bucket}")
        slot.stream.copy(
            slot.probability.address, slot.device_probability.address, probability.nbytes
        )

    def _capture(self, trt: TensorRT) -> Any:
        from engines import cuda

        try:
            if not trt.can_be_recorded(self._context, self._slot.stream.handle):
                raise TensorRTError("TensorRT for RTX says that it cannot be recorded")
            return self._slot.stream.capture(self._enqueue)
        except (cuda.CudaError, TensorRTError) as error:
            log.warning("no CUDA graph for batches of %d: %s", self.bucket, error)
            return None

    def run(self) -> None:
        if self.graph is not None:
            self.graph.launch()
        else:
            self._enqueue()
        self._slot.stream.synchronize()

    def close(self) -> None:
        if self.graph is not None:
            self.graph.close()
        self._context = None


class _Slot:
    """A stream with buffers for the largest bucket, and a lane for every bucket."""

    def __init__(
        self,
        trt: TensorRT,
        engine: Any,
        buckets: tuple[int, ...],
        configure: Callable[[Any], Any] | None,
    ) -> None:
        from engines import cuda

        image, probability = _tensor_names(trt, engine)
        self.lanes: list[_Lane] = []
        self._held: list[Any] = []
        try:
            self.stream = self._hold(cuda.Stream())
            most = buckets[-1]
            pixels = (most, *tuple(engine.get_tensor_shape(image))[1:])
            maps = (most, *pixels[1:3])
            self.image = self._hold(cuda.PinnedArray(pixels, np.dtype(np.uint8)))
            self.probability = self._hold(cuda.PinnedArray(maps, np.dtype(np.float32)))
            self.device_image = self._hold(cuda.DeviceMemory(self.image.array.nbytes))
            self.device_probability = self._hold(cuda.DeviceMemory(self.probability.array.nbytes))
            scratch = self._hold(cuda.DeviceMemory(int(engine.device_memory_size_v2)))
            for profile, bucket in enumerate(buckets):
                strategy = trt.module.ExecutionContextAllocationStrategy.USER_MANAGED
                context = (
                    configure(engine)
                    if configure is not None
                    else engine.create_execution_context(strategy)
                )
                if context is None:
                    raise TensorRTError(f"TensorRT gives no context for batches of {bucket}")
                context.set_device_memory(scratch.address, scratch.size)
                self.lanes.append(_Lane(trt, context, bucket, self, profile, image, probability))
        except BaseException:
            self.close()
            raise

    def _hold(self, resource: Any) -> Any:
        self._held.append(resource)
        return resource

    def infer(self, batch: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        lane = next(lane for lane in self.lanes if lane.bucket >= len(batch))
        for place, image in zip(self.image.array, batch, strict=False):
            place[...] = image
        lane.run()
        result: NDArray[np.float32] = self.probability.array[: len(batch)].copy()
        return result

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()
        self.lanes.clear()
        for resource in reversed(self._held):
            resource.close()
        self._held.clear()


def _tensor_names(trt: TensorRT, engine: Any) -> tuple[str, str]:
    inputs: list[str] = []
    outputs: list[str] = []
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        is_input = engine.get_tensor_mode(name) == trt.module.TensorIOMode.INPUT
        (inputs if is_input else outputs).append(name)
    if inputs != ["image"] or outputs != ["probability"]:
        raise TensorRTError(f"not an engine of the exported graph: it has {inputs} → {outputs}")
    return inputs[0], outputs[0]


class _RtxRuntime:
    """The contexts of TensorRT for RTX, which compiles its kernels here, at the first run.

    Kernels are compiled at once rather than lazily: one that is swapped in later would miss the
    recorded graph. They are kept beside the engine, so that the next start finds them.
    """

    def __init__(self, trt: TensorRT, engine_path: Path) -> None:
        self._module = trt.module
        self._path = engine_path.with_name(engine_path.name + ".kernels")
        self._cache: Any = None

    def __call__(self, engine: Any) -> Any:
        config = engine.create_runtime_config()
        strategies = self._module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        config.set_execution_context_allocation_strategy(
            self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            # If driver, GPU or version differ, the cache is refused and left empty.
            if self._path.exists() and not self._cache.deserialize(self._path.read_bytes()):
                log.info("%s is of another GPU or driver: compiling kernels again", self._path)
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    def save(self) -> None:
        if self._cache is None:
            return
        try:
            write_atomically(self._path, bytes(memoryview(self._cache.serialize())))
        except OSError as error:  # the kernels still run; the next start compiles again
            log.warning("%s could not be written: %s", self._path, error.strerror)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the engine once. Returns 1, with one line on stderr, if it does not run."""
    (engine,) = sys.argv[1:] if arguments is None else arguments
    try:
        runner = EngineRunner(Path(engine))
        runner.infer(np.zeros((1, MODEL_SIZE, MODEL_SIZE, 3), np.uint8))
        runner.close()
    except (EngineError, NoGpuError, PlanError, TensorRTError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
