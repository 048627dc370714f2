"""Measures this server beside its peers: `make peers`, or `python -m benchmarks.peers`.

It makes an environment for each peer. In every turn it starts each server with each network, loads
it, measures it and stops it. It writes report.html, report.md with its plots and report.json. It
keeps results after each visit, so that the next run continues. Server and load share the machine,
so nothing else should run on it.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from benchmarks.latency import machine
from benchmarks.peers.entrants import ENTRANTS, OURS, Entrant
from benchmarks.peers.figures import NETWORKS, STOCK, Comparison, Missing, Network, Setting
from benchmarks.peers.measure import (
    Deck,
    Plan,
    layout,
    measure_bare,
    measure_path,
    measure_stock,
    visit,
)
from benchmarks.peers.processes import ROOT, Unavailable, end_on_signals, prepare, python_of
from benchmarks.peers.report import write_report
from common.files import write_atomically
from common.program import Help
from photos.image import read_photo
from server.settings import SHIPPED_MODEL
from tests.support.lesions import drawn_photo

RESULTS = ROOT / "benchmarks" / "results" / "peers"

FULL = Plan(
    turns=3, step_s=1.5, real_s=(2, 3, 3, 5), overload_s=3, bare_s=3, idle_s=2, path_turns=5
)
QUICK = Plan(
    turns=1,
    step_s=0.5,
    real_s=(0.5, 0.5, 0.5, 1),
    overload_s=1,
    bare_s=0.5,
    idle_s=0.5,
    path_turns=1,
)

_COMPARISON = TypeAdapter(Comparison)
_PHOTOS = 8
_ROTATE = 3
"""Each turn begins so many servers later in the list than the one before."""
_OVERLOADED: tuple[Network, ...] = ("real", "stub 5 ms")
"""Networks with which servers are overloaded, in the first turn."""
_TROUBLED: tuple[Network, ...] = ("stub 5 ms",)
"""Networks with which a bad photo is sent, and then SIGTERM."""


Kind = Literal["visit", "bare", "stock", "path"]
"""A visit to a server, or a measurement without one: its bare loop, stock ONNX Runtime's, a large
photo's path."""
Key = tuple[int, Network, str, Kind]


@dataclass(frozen=True)
class Job:
    """A measurement that is saved as a whole."""

    turn: int
    network: Network
    entrant: Entrant
    kind: Kind = "visit"

    def __str__(self) -> str:
        """The job's name in the output."""
        kind = "" if self.kind == "visit" else f" {self.kind}"
        return f"turn {self.turn}, {self.network}, {self.entrant.name}{kind}"

    @property
    def key(self) -> Key:
        """The job's key among the results."""
        return self.turn, self.network, self.entrant.name, self.kind


def jobs(entrants: Sequence[Entrant], networks: Sequence[Network], turns: int) -> Iterator[Job]:
    """All jobs; each turn begins with another server."""
    for turn in range(1, turns + 1):
        start = (turn - 1) * _ROTATE % len(entrants)
        order = [*entrants[start:], *entrants[:start]]
        for network in networks:
            for entrant in order:
                if network != "real" and not entrant.stubs:
                    continue
                if network == "real" and entrant.name == OURS:
                    yield Job(turn, network, entrant, "path")
                    yield Job(turn, network, entrant, "stock")
                if network == "real" and entrant.is_ours:
                    yield Job(turn, network, entrant, "bare")
                yield Job(turn, network, entrant)


def done(comparison: Comparison) -> set[Key]:
    """Keys of finished jobs. Those that failed or were disturbed are not among them."""
    found: set[Key] = {
        (v.turn, v.network, v.entrant, "visit") for v in comparison.visits if v.is_quiet
    }
    for bare in comparison.bare:
        if bare.is_quiet and bare.entrant == STOCK:
            found.add((bare.turn, "real", OURS, "stock"))
        elif bare.is_quiet:
            found.add((bare.turn, "real", bare.entrant, "bare"))
    return found | {(path.turn, "real", OURS, "path") for path in comparison.paths if path.is_quiet}


class Run:
    """Does jobs and keeps their results."""

    def __init__(
        self,
        plan: Plan,
        deck: Deck,
        images: Path | None,
        here: Sequence[str],
        comparison: Comparison,
    ) -> None:
        self._plan = plan
        self._deck = deck
        self._images = images
        self._here = here
        self.comparison = comparison
        self._unavailable: dict[str, str] = {}
        self._prepared: set[str] = set()

    def do(self, job: Job) -> None:
        """Do one job. A measurement that is impossible is marked as missing."""
        comparison = self.comparison
        seconds, model = self._plan.bare_s, self._deck.model
        match job.kind:
            case "bare":
                try:
                    comparison.put_bare(measure_bare(job.entrant, job.turn, seconds, model))
                except Unavailable as error:
                    print(f"  {error}", file=sys.stderr)
                    self._unavailable[job.entrant.name] = str(error)
            case "stock":
                comparison.put_bare(measure_stock(job.turn, seconds, model))
            case "path":
                turns = self._plan.path_turns
                comparison.put_path(measure_path(job.turn, turns, self._images, model))
            case "visit":
                self._visit(job)

    def _visit(self, job: Job) -> None:
        comparison = self.comparison
        try:
            python = self._python(job.entrant)
            found = visit(
                job.entrant,
                python,
                job.network,
                job.turn,
                self._plan,
                self._deck,
                overload=job.turn == 1 and job.network in _OVERLOADED,
                trouble=job.turn == 1 and job.network in _TROUBLED,
            )
        except (Unavailable, OSError) as error:
            print(f"  {error}", file=sys.stderr)
            if isinstance(error, Unavailable):
                # It would not start the next time either, and each try takes the whole wait.
                self._unavailable[job.entrant.name] = str(error)
            reason = str(error).replace("|", "/")
            comparison.put(Missing(job.entrant.name, job.network, job.turn, reason))
        else:
            comparison.put(found)

    def _python(self, entrant: Entrant) -> Path:
        if entrant.name in self._unavailable:
            raise Unavailable(self._unavailable[entrant.name])
        if entrant.is_ours or entrant.name in self._here:
            return Path(sys.executable)
        if entrant.name not in self._prepared:
            prepare(entrant)
            self._prepared.add(entrant.name)
        return python_of(entrant)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the report."""
    parser = _parser()
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else FULL
    plan = replace(
        plan,
        turns=options.turns or plan.turns,
        step_s=options.step_s or plan.step_s,
        real_s=tuple(options.real_s or plan.real_s),
    )
    try:
        photos = given(options.images) if options.images else generated()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    model = ROOT / SHIPPED_MODEL
    setting = _setting(plan, photos, "given" if options.images else "generated", model)
    kept = options.output / "report.json"
    comparison = Comparison(setting)
    if kept.exists() and not options.fresh:
        try:
            comparison = _resumed(kept, setting)
        except ValueError as error:
            parser.error(str(error))
    entrants = [entrant for entrant in ENTRANTS if entrant.name in options.servers]
    print("predicting the masks", file=sys.stderr)
    run = Run(plan, Deck.of(photos, model), options.images, options.here, comparison)
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    been = done(comparison)
    left = [job for job in jobs(entrants, options.networks, plan.turns) if job.key not in been]
    while left and time.monotonic() < started + options.stop_after_s:
        job = left.pop(0)
        print(f"{job}; {len(left)} to go", file=sys.stderr)
        run.do(job)
        write_atomically(kept, _COMPARISON.dump_json(comparison, indent=1) + b"\n")
    print(write_report(comparison, options.output))
    print(f"\n{options.output / 'report.html'}", file=sys.stderr)
    if left:
        print(f"{len(left)} visits are left: run again to go on", file=sys.stderr)
    return 0 if all(visit.masks_wrong == 0 for visit in comparison.visits) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=Help,
    )
    names = [entrant.name for entrant in ENTRANTS]
    parser.add_argument(
        "--servers",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"of {', '.join(names)} (default: all)",
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=NETWORKS,
        metavar="NAME",
        help="`real`, or a stub: `stub 0 ms`, `stub 5 ms` (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="one turn of short loads")
    parser.add_argument(
        "--turns", type=int, help=f"how often all is measured (default: {FULL.turns})"
    )
    parser.add_argument("--step-s", type=float, help="seconds measured of each load on a stub")
    parser.add_argument(
        "--real-s",
        type=float,
        nargs=4,
        metavar="S",
        help="seconds measured of 1, 8, 32 and 128 clients on the real network",
    )
    parser.add_argument(
        "--here",
        nargs="+",
        choices=names,
        default=[],
        metavar="NAME",
        help="peers that run in this Python instead of environments of their own",
    )
    parser.add_argument("--images", type=Path, help="folder of photos; generated if not given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the report")
    parser.add_argument("--fresh", action="store_true", help="forget what lies in that folder")
    parser.add_argument(
        "--stop-after-s",
        type=float,
        default=float("inf"),
        metavar="S",
        help="begin no further visit after that long; run again to go on (default: no end)",
    )
    return parser


def _resumed(kept: Path, setting: Setting) -> Comparison:
    """The comparison that was begun there.

    Raises:
        ValueError: it is of another setting.
    """
    comparison = _COMPARISON.validate_json(kept.read_bytes())
    different = [
        field.name
        for field in fields(Setting)
        if getattr(comparison.setting, field.name) != getattr(setting, field.name)
    ]
    if different:
        raise ValueError(
            f"{kept} is of another {', '.join(different)}: name another --output, or give"
            " --fresh to forget it."
        )
    return comparison


def generated() -> list[bytes]:
    """Make photos of 600×450, as JPEG."""
    return [drawn_photo(seed) for seed in range(_PHOTOS)]


def given(folder: Path) -> list[bytes]:
    """Read the first JPEG photos of a folder.

    Raises:
        ValueError: the folder holds none.
    """
    photos = []
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        data = file.read_bytes()
        if data.startswith(b"\xff\xd8"):
            photos.append(data)
        if len(photos) == _PHOTOS:
            break
    if not photos:
        raise ValueError(f"{folder} holds no JPEG photo.")
    return photos


def _setting(plan: Plan, photos: Sequence[bytes], source: str, model: Path) -> Setting:
    processes, threads = layout()
    read = [read_photo(data) for data in photos]
    sizes = ", ".join(sorted({f"{photo.width}×{photo.height}" for photo in read}))
    mean_kb = sum(map(len, photos)) / len(photos) / 1000
    return Setting(
        machine=machine().partition(", load")[0],
        commit=measured_commit(),
        model=f"{model.name}, sha256 {sha256(model.read_bytes()).hexdigest()[:12]}",
        photos=f"{len(read)} {source} JPEG photos of {sizes}, {mean_kb:.0f} kB on average",
        layout=f"{processes} processes that run the network, {threads} thread each",
        step_s=plan.step_s,
        real_s=plan.real_s,
        overload_s=plan.overload_s,
    )


def measured_commit() -> str:
    """The last commit to the measured and measuring code; with + at its end if that has changed."""
    git = ["git", "-C", str(ROOT)]
    watched = ["server", "model", "photos", "common", "trt_build", "benchmarks/peers"]
    log = [*git, "log", "-1", "--format=%h", "--", *watched]
    run = subprocess.run(log, capture_output=True, text=True, check=False)
    if run.returncode or not run.stdout:
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *watched], check=False)
    return run.stdout.strip() + "+" * bool(changed.returncode)


if __name__ == "__main__":
    # This process ends a server under test with itself, so that none is left behind.
    end_on_signals()
    sys.exit(main())
