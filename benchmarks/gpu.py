"""Images a second and latency on a GPU, by batch size: `python -m benchmarks.gpu`.

It measures PyTorch eager, PyTorch with CUDA graphs, `torch.compile`, ONNX Runtime's CUDA provider
and TensorRT, one after another in one process, each from bytes in host memory to probabilities in
host memory. Each is first compared with float32 ONNX Runtime on the CPU. A candidate that is not
installed or does not run is skipped, with the reason printed.

It writes Markdown to standard output and, with `--output NAME`, NAME.json and NAME.md. "Share of
the roofline" is images/s × GFLOP an image (`FLOP_PER_IMAGE`) over the GPU's dense peak in that
precision.
"""

import argparse
import json
import platform
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from common.files import write_atomically
from common.onnx import onnx_runner
from common.program import Help
from engines.device import Gpu, NoGpuError, current_gpu
from engines.plan import BUCKETS, Precision, parse_buckets
from photos.image import MODEL_SIZE
from server.backends import Backend, BackendError
from trt_build.parity import compare
from trt_build.samples import REFERENCE, load_samples

MODEL = Path(__file__).parent.parent / "model/weights/slsnet.onnx"

FLOP_PER_IMAGE = {"exact": 2 * 2.97e9, "pooled": 2 * 1.38e9}
"""FLOP by the graph's attention: two for each multiplication in convolutions and products."""

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    # NVIDIA's data sheets have these dense tensor-core peaks (H100 and H200: SXM). Float32 is that
    # outside the tensor cores.
    "H100": {"fp32": 67, "tf32": 495, "fp16": 989, "bf16": 989, "int8": 1979},
    "H200": {"fp32": 67, "tf32": 495, "fp16": 989, "bf16": 989, "int8": 1979},
    "A100": {"fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312, "int8": 624},
    "L40S": {"fp32": 91.6, "tf32": 183, "fp16": 362, "bf16": 362, "int8": 733},
    "L4": {"fp32": 30.3, "tf32": 60, "fp16": 121, "bf16": 121, "int8": 242},
    "T4": {"fp32": 8.1, "fp16": 65, "int8": 130},
}

PAPER = "The paper: 110 images/s (8 ms) at 128×128 on a GTX 1080 Ti."


@dataclass(frozen=True)
class Figure:
    """The figures of one candidate at one batch size."""

    batch: int
    images_per_s: float
    """Throughput with as many batches in flight as the candidate takes."""
    p50_ms: float
    """Median latency of a lone batch, from host memory to host memory."""
    p99_ms: float
    roofline_share: float | None
    """Share of the GPU's peak; None where `PEAK_TFLOPS` does not have it."""


@dataclass
class Result:
    """A candidate with its figures, or the reason why there are none."""

    name: str
    precision: str
    skipped: str = ""
    ready_s: float = 0.0
    """Seconds from nothing to warm on every batch size, building or compiling included."""
    mask_iou: float | None = None
    """Mean overlap with float32's masks, on the shipped generated lesions."""
    figures: list[Figure] = field(default_factory=list)


Open = Callable[[], Backend]


def candidates(model: Path, work: Path, buckets: tuple[int, ...]) -> Iterator[tuple[Result, Open]]:
    """Yield every candidate, with a function that opens it."""
    for precision in ("fp32", "fp16"):
        for run, name in (
            ("eager", "PyTorch eager"),
            ("graph", "PyTorch CUDA graphs"),
            ("compile", "torch.compile"),
        ):
            yield Result(name, precision), _torch(model, precision, run)
    yield Result("ONNX Runtime CUDA", "fp32"), lambda: _onnxruntime(model)
    for precision in ("tf32", "fp16", "bf16", "int8"):
        yield (
            Result("TensorRT", precision),
            _tensorrt(model, work, buckets, cast("Precision", precision)),
        )


def _torch(model: Path, precision: str, run: str) -> Open:
    def opened() -> Backend:
        try:
            import torch

            from server.backends.torch import TorchBackend
        except ImportError as error:
            raise BackendError(f"not installed: {error}") from error
        if not torch.cuda.is_available():
            raise BackendError("this PyTorch sees no GPU")
        return TorchBackend(model, precision=precision, run=run)  # type: ignore[arg-type]

    return opened


def _onnxruntime(model: Path) -> Backend:
    from server.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

    return OnnxRuntimeCudaBackend(model)


def _tensorrt(model: Path, work: Path, buckets: tuple[int, ...], precision: Precision) -> Open:
    def opened() -> Backend:
        from engines.tensorrt_api import TensorRTError, find_tensorrt
        from server.backends.engine_cache import CORES_TO_SPIN
        from server.backends.tensorrt import TensorRtBackend
        from server.cores import available_cores
        from trt_build.build import BuildError, BuildOptions, build
        from trt_build.calibrate import CalibrationError, measure_ranges, read_ranges

        engine = work / f"{precision}.engine"
        ranges = None
        if precision == "int8":
            try:
                ranges = read_ranges(model)
            except CalibrationError:
                ranges = measure_ranges(model, load_samples(REFERENCE))
        options = BuildOptions(precision=precision, buckets=buckets)
        try:
            if find_tensorrt().is_rtx:
                # A portable engine does not run on every data-centre GPU. One built for it may.
                options = replace(options, compute_capability="current")
            build(model, engine, options, ranges=ranges, gated=True)
        except (BuildError, TensorRTError) as error:
            raise BackendError(str(error)) from error
        return TensorRtBackend(engine, spin=available_cores() >= CORES_TO_SPIN)

    return opened


@contextmanager
def _closing(backend: Backend) -> Iterator[Backend]:
    try:
        yield backend
    finally:
        backend.close()


def measure(
    result: Result,
    opened: Open,
    buckets: Sequence[int],
    seconds: float,
    gpu: Gpu,
    model: Path,
    note: Callable[[], None],
) -> None:
    """Fill `result` in, or record why it is skipped. `note` is called after each figure."""
    started = time.perf_counter()
    try:
        with _closing(opened()) as backend:
            samples = load_samples(REFERENCE)
            for bucket in buckets:
                for _ in range(3):
                    backend.infer(_pixels(bucket))
            result.ready_s = time.perf_counter() - started
            parity = compare(
                onnx_runner(model),
                backend.infer,
                samples,
                name=result.name,
                precision="fp16",
                source="generated",
            )
            result.mask_iou = parity.mask_iou_mean
            slots = backend.describe().slots
            for bucket in buckets:
                result.figures.append(_figure(backend, bucket, slots, seconds, gpu, result))
                note()
    except Exception as error:  # noqa: BLE001  # the other candidates are still to be measured
        result.skipped = " ".join(str(error).split()) or type(error).__name__
    note()


def _pixels(batch: int) -> NDArray[np.uint8]:
    size = (batch, MODEL_SIZE, MODEL_SIZE, 3)
    return np.random.default_rng(batch).integers(0, 256, size, np.uint8)


def _figure(
    backend: Backend, batch: int, slots: int, seconds: float, gpu: Gpu, result: Result
) -> Figure:
    pixels = _pixels(batch)
    latencies: list[float] = []
    until = time.perf_counter() + seconds
    while (now := time.perf_counter()) < until or len(latencies) < 20:
        backend.infer(pixels)
        latencies.append(time.perf_counter() - now)
    images_per_s = batch / statistics.fmean(latencies)
    if slots > 1:
        images_per_s = max(images_per_s, _together(backend, pixels, slots, seconds))
    peak = peak_tflops(gpu).get(result.precision)
    flop = FLOP_PER_IMAGE.get(backend.describe().model.get("attention", ""))
    ordered = sorted(latencies)
    return Figure(
        batch=batch,
        images_per_s=images_per_s,
        p50_ms=1e3 * statistics.median(ordered),
        p99_ms=1e3 * ordered[int(0.99 * len(ordered))],
        roofline_share=images_per_s * flop / (peak * 1e12) if peak and flop else None,
    )


def peak_tflops(gpu: Gpu) -> dict[str, float]:
    """Dense TFLOPS by precision; empty for a card, or part of a card, that the table lacks."""
    words = re.split(r"[\s-]+", gpu.name)  # such as NVIDIA A100-SXM4-80GB
    if {"MIG", "NVL", "PCIe"}.intersection(words):
        return {}
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in words), {})


def _together(backend: Backend, pixels: NDArray[np.uint8], slots: int, seconds: float) -> float:
    """Images a second, with one thread for each slot."""
    counts = [0] * slots
    until = time.perf_counter() + seconds

    def work(i: int) -> None:
        while time.perf_counter() < until:
            backend.infer(pixels)
            counts[i] += 1

    started = time.perf_counter()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) * len(pixels) / (time.perf_counter() - started)


def report(results: Sequence[Result], environment: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"{name}: {value}  " for name, value in environment.items()]
    lines += [
        PAPER,
        "",
        "| backend | precision | ready, s | mask IoU | batch | images/s | p50, ms | p99, ms "
        "| share of the roofline |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        for f in r.figures:
            share = "–" if f.roofline_share is None else f"{f.roofline_share:.1%}"
            lines.append(
                f"| {r.name} | {r.precision} | {r.ready_s:.1f} | {r.mask_iou:.4f} | {f.batch} "
                f"| {f.images_per_s:,.0f} | {f.p50_ms:.2f} | {f.p99_ms:.2f} | {share} |"
            )
    lines += ["", *(f"- {r.name} {r.precision} skipped: {r.skipped}" for r in results if r.skipped)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("--onnx", type=Path, default=MODEL, help="the network")
    parser.add_argument(
        "--buckets",
        type=parse_buckets,
        default=BUCKETS,
        help=f"batch sizes, with commas between (default: {','.join(map(str, BUCKETS))})",
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="measured for each figure")
    parser.add_argument("--only", nargs="+", help="words that a candidate's name must contain")
    parser.add_argument("--output", type=Path, metavar="NAME", help="write NAME.json and NAME.md")
    args = parser.parse_args(arguments)
    try:
        gpu = current_gpu()
    except NoGpuError as error:
        print(f"nothing to measure: {error}", file=sys.stderr)
        return 1
    environment = {
        "GPU": f"{gpu.name}, compute capability {gpu.compute_capability}",
        "Python": platform.python_version(),
        "Date": time.strftime("%Y-%m-%d"),
    }
    results: list[Result] = []

    def save() -> None:
        # Written after each figure, so that an interrupted run keeps what it has measured.
        if args.output:
            payload = {"environment": environment, "results": [asdict(r) for r in results]}
            text = json.dumps(payload, indent=1)
            write_atomically(args.output.with_suffix(".json"), text.encode())
            markdown = report(results, environment) + "\n"
            write_atomically(args.output.with_suffix(".md"), markdown.encode())

    with tempfile.TemporaryDirectory() as work:
        for result, opened in candidates(args.onnx, Path(work), args.buckets):
            if args.only and not any(word in result.name for word in args.only):
                continue
            results.append(result)
            measure(result, opened, args.buckets, args.seconds, gpu, args.onnx, save)
            last = result.figures[-1] if result.figures else None
            speed = f"{last.images_per_s:,.0f} images/s at {last.batch}" if last else result.skipped
            print(f"{result.name} {result.precision}: {speed}", file=sys.stderr, flush=True)
    print(report(results, environment))
    return 0


if __name__ == "__main__":
    sys.exit(main())
