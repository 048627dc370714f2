"""A visit to a server: start it, send it load, look at it, stop it."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.latency import largest, photos_at_all_sizes
from benchmarks.path import compare
from benchmarks.peers.client import Answer, at_once, closed_loop, open_loop, until_closed
from benchmarks.peers.entrants import Entrant
from benchmarks.peers.figures import (
    CLIENTS,
    LARGE,
    STOCK,
    STOP_S,
    BadPhoto,
    Bare,
    Network,
    Overload,
    PhotoPath,
    Step,
    Stop,
    Visit,
    bad_photo_of,
    overload_of,
    step_of,
    stop_of,
)
from benchmarks.peers.processes import ROOT, Running, Unavailable, running
from benchmarks.peers.servers import handler
from common.onnx import onnx_runner
from photos.image import lesion_mask, read_photo, unpack_mask
from server.cores import available_cores
from trt_build.parity import mask_iou

_STUB_MS: dict[Network, float | None] = {"stub 0 ms": 0, "stub 5 ms": 5, "real": None}

_SAME_MASK_IOU = 0.9
"""A mask that overlaps less is wrong. Peers enlarge theirs in blocks, which costs a few percent."""

_WARM_UP_S = 0.5
_WARM_UP = 32
"""Least number of answers: BentoML holds first requests while it learns how long a batch takes."""
_LEAD = 0.25
"""Share of a load's time that is not measured, at its start."""
_BESIDE = 8
_BAD_TIMES = 10


@dataclass(frozen=True)
class Plan:
    """How long everything takes."""

    turns: int
    step_s: float
    """Seconds of each load, with a stub."""
    real_s: tuple[float, float, float, float]
    """Seconds of each load, with the real network."""
    overload_s: float
    bare_s: float
    """Seconds of the bare loop, with each batch size."""
    idle_s: float
    path_turns: int
    """Number of times that a large photo goes each way, in each turn."""


@dataclass(frozen=True)
class Deck:
    """Photos, and the mask of each photo with each network."""

    photos: Sequence[bytes]
    masks: dict[Network, list[NDArray[np.bool_]]]
    model: Path

    @classmethod
    def of(cls, photos: Sequence[bytes], model: Path) -> "Deck":
        """Make a deck of photos: predict their masks."""
        read = [read_photo(data) for data in photos]
        batch = np.stack([photo.pixels for photo in read])
        disc = handler.stub(0)(batch)
        probabilities: dict[Network, NDArray[np.float32]] = {
            "real": onnx_runner(model)(batch),
            "stub 0 ms": disc,
            "stub 5 ms": disc,
        }
        masks = {
            network: [
                unpack_mask(lesion_mask(p, photo.width, photo.height), photo.width)
                for p, photo in zip(of_network, read, strict=True)
            ]
            for network, of_network in probabilities.items()
        }
        return cls(photos, masks, model)


class Masks:
    """Compares masks that came back with the predicted ones."""

    def __init__(self, entrant: Entrant, expected: Sequence[NDArray[np.bool_]]) -> None:
        self._entrant = entrant
        self._expected = expected
        self._known: dict[tuple[int, bytes], float] = {}
        self.checked = self.wrong = 0
        self.least_iou = 1.0

    def check(self, answers: Sequence[Answer]) -> None:
        """Check the answers whose bodies were kept."""
        for answer in answers:
            if answer.status != 200 or answer.body is None:
                continue
            key = answer.request % len(self._expected), answer.body
            if key not in self._known:
                self._known[key] = self._iou(*key)
            self.checked += 1
            self.wrong += self._known[key] < _SAME_MASK_IOU
            self.least_iou = min(self.least_iou, self._known[key])

    def _iou(self, request: int, body: bytes) -> float:
        expected = self._expected[request]
        try:
            with Image.open(BytesIO(self._entrant.mask(body)), formats=("PNG",)) as picture:
                found = np.asarray(picture.convert("L")) > 127
        except (OSError, ValueError, LookupError):
            return 0.0
        return mask_iou(found, expected) if found.shape == expected.shape else 0.0


def layout(entrant: Entrant | None = None) -> tuple[int, int]:
    """Number of processes that run a peer's network, and of threads in each of them."""
    cores = available_cores()
    return (1, cores) if entrant and entrant.one_process else (cores, 1)


def visit(
    entrant: Entrant,
    python: Path,
    network: Network,
    turn: int,
    plan: Plan,
    deck: Deck,
    *,
    overload: bool,
    trouble: bool,
) -> Visit:
    """Start the server and measure it.

    Args:
        python: the interpreter of a peer.
        overload: whether to send, too, more than the server can do.
        trouble: whether to leave it idle, send a bad photo and stop it under load, too.

    Raises:
        Unavailable: the server does not start.
        OSError: the server takes no more connections.
    """
    stub_ms = _STUB_MS[network]
    workers, threads = layout(entrant)
    environment = {
        "PEER_NETWORK": str(deck.model.resolve()) if stub_ms is None else f"stub:{stub_ms:g}",
        "PEER_WORKERS": str(workers),
        "PEER_THREADS": str(threads),
    }
    requests = [entrant.ask(photo) for photo in deck.photos]
    masks = Masks(entrant, deck.masks[network])
    with running(entrant, python, environment, stub_ms, deck.photos[0]) as server:
        backend = _backend(server) if entrant.is_ours else ""
        masks.check(at_once(server.port, requests))
        closed_loop(server.port, requests, clients=_BESIDE, seconds=_WARM_UP_S, fewest=_WARM_UP)
        idle = _idle_cores(server, plan.idle_s) if trouble else None
        others = _Others(server.cpu_s)
        seconds = plan.real_s if stub_ms is None else [plan.step_s] * len(CLIENTS)
        steps = _ramp(server, requests, seconds, masks)
        others_cores = others.cores()
        memory_mib = server.memory_mib()
        bad = _bad_photo(server, entrant, deck) if trouble else None
        too_much = _overload(server, requests, steps, plan.overload_s) if overload else None
        return Visit(
            entrant=entrant.name,
            network=network,
            turn=turn,
            seconds_to_ready=server.seconds_to_ready,
            memory_mib=memory_mib,
            backend=backend,
            others_cores=others_cores,
            steps=steps,
            masks_checked=masks.checked,
            masks_wrong=masks.wrong,
            least_iou=masks.least_iou,
            idle_cores=idle,
            overload=too_much,
            bad_photo=bad,
            stop=_stop(server, requests) if trouble else None,
        )


def _ramp(
    server: Running, requests: Sequence[bytes], seconds: Sequence[float], masks: Masks
) -> list[Step]:
    """Send as each number of `CLIENTS`, for as many seconds as `seconds` has for it."""
    steps = []
    for clients, measured_s in zip(CLIENTS, seconds, strict=True):
        load = closed_loop(
            server.port,
            requests,
            clients=clients,
            seconds=measured_s,
            lead_s=_LEAD * measured_s,
            fewest=clients,
        )
        steps.append(step_of(load, clients))
        masks.check(load.answers)
    return steps


def measure_bare(entrant: Entrant, turn: int, seconds: float, model: Path) -> Bare:
    """Run this server's network in a loop, in as many processes and threads as the server.

    Raises:
        Unavailable: its backend does not run here.
    """
    return _bare(entrant.name, turn, seconds, ["--model", str(model.resolve()), *entrant.flags])


def measure_stock(turn: int, seconds: float, model: Path) -> Bare:
    """Run ONNX Runtime with its own defaults in that loop, in as many threads."""
    return _bare(STOCK, turn, seconds, ["--model", str(model.resolve()), "--stock"])


def _bare(name: str, turn: int, seconds: float, flags: Sequence[str]) -> Bare:
    others = _Others(_children_s)
    command = [sys.executable, "-m", "benchmarks.peers.bare", str(seconds), *flags]
    try:
        run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").splitlines()[-1:]
        raise Unavailable(f"does not run here: {''.join(last)}") from error
    return Bare(turn, name, json.loads(run.stdout), others.cores())


def measure_path(turn: int, turns: int, images: Path | None, model: Path) -> PhotoPath:
    """Measure the cost of a large photo beside the network, in one thread, without a server.

    Args:
        turns: number of times that each way is measured in this turn.
        images: folder, whose largest photo is resized; None means a generated photo.
    """
    photo = photos_at_all_sizes(largest(images) if images else None)[LARGE]
    others = _Others(lambda: 0)
    found = compare(photo, onnx_runner(model), turns)
    ours, usual = (sum(way.values()) for way in (found.ours, found.usual))
    return PhotoPath(turn, ours, usual, others.cores())


def _children_s() -> float:
    # The times of the children that have ended, and of all that they waited for.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _backend(server: Running) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/model", timeout=10) as answer:
        backend = json.load(answer)["backend"]
    return f"{backend['name']} {backend['version']}, {backend['precision']}"


class _Others:
    """Work of the machine outside this process and what it measures."""

    def __init__(self, measured_s: Callable[[], float]) -> None:
        self._measured_s = measured_s
        self._started, self._before = time.perf_counter(), self._used_s()

    def cores(self) -> float:
        """Mean number of cores since this object was made."""
        used_s = self._used_s() - self._before
        return max(0.0, used_s / (time.perf_counter() - self._started))

    def _used_s(self) -> float:
        # proc(5): user, nice, system, idle, iowait, irq, softirq, steal.
        ticks = [int(t) for t in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        busy_s = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return busy_s - self._measured_s() - time.process_time()


def _idle_cores(server: Running, seconds: float) -> float:
    time.sleep(0.5)
    started, before = time.perf_counter(), server.cpu_s()
    time.sleep(seconds)
    return max(0.0, server.cpu_s() - before) / (time.perf_counter() - started)


def _bad_photo(server: Running, entrant: Entrant, deck: Deck) -> BadPhoto:
    photo = deck.photos[0]
    bad = entrant.ask(photo[: len(photo) // 2])
    rounds = []
    for time_ in range(_BAD_TIMES):
        place = time_ % _BESIDE
        together = [entrant.ask(deck.photos[i % len(deck.photos)]) for i in range(_BESIDE)]
        together[place] = bad
        rounds.append((place, at_once(server.port, together)))
    return bad_photo_of(rounds)


def _overload(
    server: Running, requests: Sequence[bytes], steps: Sequence[Step], seconds: float
) -> Overload:
    per_s = 2 * max(step.per_s for step in steps)
    return overload_of(
        open_loop(server.port, requests, per_s=per_s, seconds=seconds), per_s, seconds
    )


def _stop(server: Running, requests: Sequence[bytes]) -> Stop:
    signalled = ended = 0.0

    def wait() -> None:
        nonlocal ended
        server.process.wait()
        ended = time.perf_counter()

    def terminate() -> None:
        nonlocal signalled
        signalled = time.perf_counter()
        server.terminate()
        threading.Thread(target=wait, daemon=True).start()

    load = until_closed(
        server.port, requests, clients=_BESIDE, after_s=1, stop=terminate, seconds=STOP_S
    )
    while not ended and time.perf_counter() < signalled + STOP_S:
        time.sleep(0.02)
    time.sleep(0.5)
    try:
        still_answers = at_once(server.port, requests[:1], timeout_s=2)[0].status == 200
    except OSError:
        still_answers = False
    return stop_of(
        load,
        signalled,
        seconds=ended - signalled if ended else None,
        exit_code=server.process.returncode,
        survivors=len(server.pids()),
        still_answers=still_answers,
    )
