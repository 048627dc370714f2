r"""The CPU's backends beside stock ONNX Runtime: `python -m benchmarks.cpu_engine`.

It prints Markdown: milliseconds a photo for each size of batch, by the clock (least and median of
the rounds) and of CPU time, with the ratio to stock, and how far the masks are from stock's. Stock
is ONNX Runtime in float32 with its defaults and as many threads. The photos are those of `--data`,
or generated. With

    --data ../shared/data/isic2017/ISIC-2017_Validation_Data \
    --masks ../shared/data/isic2017/ISIC-2017_Validation_Part1_GroundTruth

the table of masks also has the Jaccard index. Each backend has a process of its own, and runs a
batch as the server does: as many runs at a time as it has slots. In every round each runs each size
of batch once, in an order that rotates, so that other work on the machine hits all alike. The
report says how much other work there was, and warns of too much. `--busy 1` takes a core away on
purpose.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.latency import machine
from common.program import Help
from common.stamp import Infer
from common.tables import markdown
from engines.plan import Precision
from server.backends import BackendError, BackendInfo, open_backend
from server.cores import available_cores
from server.settings import SHIPPED_MODEL
from trt_build.parity import GENERATED, compare, table
from trt_build.samples import REFERENCE, load_samples

MODEL = Path(__file__).parent.parent / SHIPPED_MODEL
STOCK = "stock ONNX Runtime"
WARM_UP = 3

_REST_S = 0.2
"""Pause between two runs: stock's threads spin for 30 ms after one, on the cores of the next."""
_QUIET = 0.1
"""The most of a core that other work may take, before the figures are of another machine."""
_PROC_STAT = Path("/proc/stat")


def stock(model: Path, threads: int) -> Infer:
    """Open ONNX Runtime with its own defaults."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def infer(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        probability: NDArray[np.float32] = session.run(["probability"], {"image": batch})[0]
        return probability

    return infer


def as_served(name: str, model: Path, threads: int) -> tuple[BackendInfo, Infer]:
    """Open and warm a backend; return it, and a function that runs a batch as the queue does."""
    backend = open_backend(name, model, threads=threads)
    backend.warm_up()
    info = backend.describe()
    slots = ThreadPoolExecutor(info.slots)

    def infer(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        most = info.max_batch
        runs = [batch[start : start + most] for start in range(0, len(batch), most)]
        return np.concatenate(list(slots.map(backend.infer, runs)))

    return info, infer


@dataclass(frozen=True)
class Run:
    """What a backend took for an image: seconds by the clock, and CPU seconds of its process."""

    wall_s: float
    cpu_s: float


class Contender:
    """A backend in a process of its own."""

    def __init__(self, backend: str | None, model: Path, threads: int) -> None:
        """Start the process, and wait until the backend is loaded.

        Args:
            backend: name of the backend; None for stock.

        Raises:
            BackendError: the backend does not run here.
        """
        spawning = multiprocessing.get_context("spawn")
        self._pipe, other = spawning.Pipe()
        arguments = (other, backend, model, threads)
        self._process = spawning.Process(target=_contend, args=arguments, daemon=True)
        self._process.start()
        other.close()
        try:
            self.info: BackendInfo | None = self._answer()
        except EOFError:
            raise BackendError("its process ended") from None

    @property
    def pid(self) -> int:
        """The id of its process."""
        assert self._process.pid is not None
        return self._process.pid

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The backend's answer for a batch."""
        probability: NDArray[np.float32] = self._ask(batch)[0]
        return probability

    def run(self, batch: NDArray[np.uint8]) -> Run:
        """The time that an image of a batch takes."""
        run: Run = self._ask(batch)[1]
        return run

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _ask(self, batch: NDArray[np.uint8]) -> Any:
        self._pipe.send(batch)
        return self._answer()

    def _answer(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, BackendError):
            raise answer
        return answer


def _contend(pipe: Connection, backend: str | None, model: Path, threads: int) -> None:
    info: BackendInfo | None = None
    try:
        if backend is None:
            infer = stock(model, threads)
        else:
            info, infer = as_served(backend, model, threads)
    except BackendError as error:
        pipe.send(error)
        return
    pipe.send(info)
    while True:
        try:
            batch = pipe.recv()
        except EOFError:
            return
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        probability = infer(batch)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        pipe.send((probability, Run(wall_s / len(batch), cpu_s / len(batch))))


class OtherWork:
    """The share of cores that other processes took, apart from those of the measurement."""

    def __init__(self, own: Sequence[int]) -> None:
        """`own` has the processes that count as the measurement's, besides this one."""
        self._own = [os.getpid(), *own]
        self._before = self._now()

    def cores(self) -> float | None:
        """Cores taken since the last call; None on systems other than Linux, which do not tell."""
        before, self._before = self._before, self._now()
        if before is None or self._before is None:
            return None
        (then_s, others_then_s), (now_s, others_now_s) = before, self._before
        return max(0.0, (others_now_s - others_then_s) / (now_s - then_s))

    def _now(self) -> tuple[float, float] | None:
        if not _PROC_STAT.exists():
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        # From user to steal (proc(5)). The fourth and fifth are idle, and waiting for a disk.
        times = [int(n) for n in _PROC_STAT.read_text(encoding="ascii").split("\n")[0].split()[1:9]]
        busy = sum(times) - times[3] - times[4]
        for pid in self._own:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
            busy -= sum(int(n) for n in text.rpartition(")")[2].split()[11:13])
        return time.perf_counter(), busy / ticks


@dataclass
class Figures:
    """The results of the measurement."""

    runs: dict[tuple[str, int], list[Run]] = field(default_factory=dict)
    """Runs by backend and size of batch."""
    others: list[float] = field(default_factory=list)
    """Cores that other work took, by round; empty where the system does not say."""

    def wall_ms(self, name: str, size: int) -> tuple[float, float]:
        """Least and median milliseconds for an image, by the clock."""
        times = [1000 * run.wall_s for run in self.runs[name, size]]
        return min(times), statistics.median(times)

    def cpu_ms(self, name: str, size: int) -> float:
        """Median milliseconds of CPU time for an image."""
        return 1000 * statistics.median(run.cpu_s for run in self.runs[name, size])


def measure(
    engines: dict[str, Contender],
    pixels: NDArray[np.uint8],
    batches: Sequence[int],
    rounds: int,
    other_work: OtherWork,
) -> Figures:
    """Time each backend on each size of batch.

    Args:
        pixels: uint8 [count, 128, 128, 3], taken in turn.
        batches: sizes of batch.
        rounds: number of measured rounds, after `WARM_UP` others.
        other_work: asked after each round how much other work there was.
    """
    figures = Figures()
    names = list(engines)
    for turn in range(WARM_UP + rounds):
        for size in batches:
            batch = np.take(pixels, range(turn * size, (turn + 1) * size), axis=0, mode="wrap")
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                time.sleep(_REST_S)
                run = engines[name].run(batch)
                if turn >= WARM_UP:
                    figures.runs.setdefault((name, size), []).append(run)
        cores = other_work.cores()
        if turn >= WARM_UP and cores is not None:
            figures.others.append(cores)
    return figures


def speed_table(figures: Figures, names: Sequence[str], batches: Sequence[int]) -> str:
    """Milliseconds for an image, and the ratio to stock, as Markdown."""
    head = (
        *("engine", "batch", "ms an image, least", "median", "× stock, least", "median"),
        "CPU, ms",
    )
    rows = []
    for size, name in itertools.product(batches, names):
        least, median = figures.wall_ms(name, size)
        stock_least, stock_median = figures.wall_ms(STOCK, size)
        ratios = f"{stock_least / least:.2f}", f"**{stock_median / median:.2f}**"
        cpu_ms = f"{figures.cpu_ms(name, size):.1f}"
        rows.append((name, str(size), f"{least:.1f}", f"{median:.1f}", *ratios, cpu_ms))
    return markdown(head, rows)


def disturbance(others: Sequence[float]) -> str:
    """A sentence about other work on the machine."""
    if not others:
        return "Other work on the machine: this system does not tell."
    median, most = statistics.median(others), max(others)
    said = f"Other work took {median:.2f} cores (median of the rounds), {most:.2f} at most."
    return said if median <= _QUIET else f"**Disturbed: the figures do not count.** {said}"


@contextmanager
def taken(cores: int) -> Iterator[list[int]]:
    """Start processes that each keep a core busy; yield their ids."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield [burner.pid for burner in burners]
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 where a backend's masks do not pass its gate."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        samples = load_samples(options.data, options.masks)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    pixels = np.stack([sample.pixels for sample in samples])
    with ExitStack() as stack:
        engines: dict[str, Contender] = {}
        infos: dict[str, BackendInfo] = {}

        def enter(name: str | None, model: Path) -> None:
            contender = Contender(name, model, options.threads)
            stack.callback(contender.close)
            if (info := contender.info) is None:
                engines[STOCK] = contender
            else:
                shown = f"{info.name} ({info.precision})"
                engines[shown], infos[shown] = contender, info

        enter(None, options.stock or options.model)
        for backend_name in options.backends:
            try:
                enter(backend_name, options.model)
            except BackendError as error:
                print(f"{backend_name} is left out: {error}", file=sys.stderr)
        source = GENERATED if options.data == REFERENCE else options.data.name
        print(f"Machine: {machine()}. {options.threads} threads, {len(samples)} photos ({source}),")
        print(f"ONNX Runtime {onnxruntime.__version__}, {options.rounds} rounds,", end=" ")
        print(f"{options.busy} cores taken on purpose.\n")
        with taken(options.busy) as burners:
            own = [*burners, *(contender.pid for contender in engines.values())]
            figures = measure(engines, pixels, options.batches, options.rounds, OtherWork(own))
        print(speed_table(figures, list(engines), options.batches))
        print(f"\n{disturbance(figures.others)}", flush=True)
        results = [
            compare(
                engines[STOCK].infer,
                engines[name].infer,
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_engine",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="the network, an ONNX file")
    parser.add_argument(
        "--stock",
        type=Path,
        help="the file that stock runs, such as the exact graph (default: --model)",
    )
    parser.add_argument(
        "--backends", nargs="+", default=["onnxruntime"], metavar="NAME", help="beside stock"
    )
    parser.add_argument(
        "--threads", type=int, default=available_cores(), help="threads of each engine"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8], metavar="SIZE", help="sizes of batches"
    )
    parser.add_argument("--rounds", type=int, default=30, help="rounds that are measured")
    parser.add_argument(
        "--busy", type=int, default=0, metavar="CORES", help="cores that other work takes meanwhile"
    )
    parser.add_argument("--data", type=Path, default=REFERENCE, help="folder of photos")
    parser.add_argument("--masks", type=Path, help="folder of their true masks")
    return parser


def _precision(info: BackendInfo) -> Precision:
    return "bf16" if info.precision == "bf16" else "fp32"


if __name__ == "__main__":
    sys.exit(main())
