r"""The CPU's backends beside stock ONNX Runtime, in one run: `python -m benchmarks.cpu_engine`.

Prints Markdown: milliseconds an image (median of the rounds) for each size of batch, with the ratio
to stock, which is ONNX Runtime in float32 as it comes, with as many threads; and how far each one's
masks are from stock's. The photos are those of `--data`, or generated. With

    --data ../shared/data/isic2017/ISIC-2017_Validation_Data \
    --masks ../shared/data/isic2017/ISIC-2017_Validation_Part1_GroundTruth

the table of masks has the Jaccard index, too. In every round each engine runs each size of batch
once, in an order that rotates, so that what else the machine does hits all alike.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.latency import machine
from model.program import Help
from server.backends import Backend, BackendError, BackendInfo, open_backend
from server.settings import SHIPPED_MODEL, available_cores
from trt_build.parity import GENERATED, Infer, compare, table
from trt_build.plan import Precision
from trt_build.samples import REFERENCE, load_samples

MODEL = Path(__file__).parent.parent / SHIPPED_MODEL
STOCK = "stock ONNX Runtime"
WARM_UP = 3

_REST_S = 0.02
"""Between two runs: stock's threads spin for a while after each, on the cores of the next."""


def stock(model: Path, threads: int) -> Infer:
    """ONNX Runtime with its own defaults."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def infer(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        probability: NDArray[np.float32] = session.run(["probability"], {"image": batch})[0]
        return probability

    return infer


def measure(
    engines: dict[str, Infer], pixels: NDArray[np.uint8], batches: Sequence[int], rounds: int
) -> dict[tuple[str, int], float]:
    """Median milliseconds an image by engine and size of batch.

    Args:
        engines: what runs a batch, by name.
        pixels: uint8 [count, 128, 128, 3], taken in turn.
        batches: sizes.
        rounds: measured, after `WARM_UP` that are not.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    names = list(engines)
    for turn in range(WARM_UP + rounds):
        for size in batches:
            batch = np.take(pixels, range(turn * size, (turn + 1) * size), axis=0, mode="wrap")
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                time.sleep(_REST_S)
                started = time.perf_counter()
                engines[name](batch)
                taken_s = time.perf_counter() - started
                if turn >= WARM_UP:
                    seconds.setdefault((name, size), []).append(taken_s / size)
    return {key: 1000 * statistics.median(times) for key, times in seconds.items()}


def speed_table(
    figures: dict[tuple[str, int], float], names: Sequence[str], batches: Sequence[int]
) -> str:
    """Milliseconds an image, and the ratio to stock, as Markdown."""
    heads = "".join(f" batch {size}, ms an image | × stock |" for size in batches)
    lines = [f"| engine |{heads}", "|---" + "|--:|--:" * len(batches) + "|"]
    for name in names:
        cells = (
            f" {figures[name, size]:.1f} | **{figures[STOCK, size] / figures[name, size]:.2f}** |"
            for size in batches
        )
        lines.append(f"| {name} |{''.join(cells)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where an engine's masks do not pass its gate."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_engine",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="the network, an ONNX file")
    parser.add_argument(
        "--stock", type=Path, help="the file that stock runs, such as the exact graph (--model)"
    )
    parser.add_argument("--backends", nargs="+", default=["onnxruntime"], metavar="NAME")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of each engine")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=20, help="measured")
    parser.add_argument("--data", type=Path, default=REFERENCE, help="folder of photos")
    parser.add_argument("--masks", type=Path, help="folder of their true masks")
    options = parser.parse_args(arguments)
    try:
        samples = load_samples(options.data, options.masks)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    pixels = np.stack([sample.pixels for sample in samples])
    with ExitStack() as stack:
        engines: dict[str, Infer] = {STOCK: stock(options.stock or options.model, options.threads)}
        infos: dict[str, BackendInfo] = {}
        for backend_name in options.backends:
            try:
                backend = open_backend(backend_name, options.model, threads=options.threads)
            except BackendError as error:
                print(f"{backend_name} is left out: {error}", file=sys.stderr)
                continue
            stack.callback(backend.close)
            info = backend.describe()
            name = f"{info.name} ({info.precision})"
            engines[name], infos[name] = _whole_batch(backend), info
        source = GENERATED if options.data == REFERENCE else options.data.name
        print(f"Machine: {machine()}. {options.threads} threads, {len(samples)} photos ({source}),")
        print(f"ONNX Runtime {onnxruntime.__version__}, medians of {options.rounds} rounds.\n")
        figures = measure(engines, pixels, options.batches, options.rounds)
        print(speed_table(figures, list(engines), options.batches), flush=True)
        results = [
            compare(
                engines[STOCK],
                engines[name],
                samples,
                name=name,
                precision=_precision(info),
                source=source,
            )
            for name, info in infos.items()
        ]
    print("\nMasks against stock's:\n")
    print(table(results))
    return int(any(result.failures() for result in results))


def _whole_batch(backend: Backend) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    backend.warm_up()
    return backend.infer


def _precision(info: BackendInfo) -> Precision:
    return "bf16" if info.precision == "bf16" else "fp32"


if __name__ == "__main__":
    sys.exit(main())
