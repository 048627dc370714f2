"""What was measured of each server, and what follows from it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from benchmarks.peers.client import LOST, Answer, Load
from benchmarks.peers.entrants import ENTRANTS, OURS

__all__ = [
    "CLIENTS",
    "LARGE",
    "NETWORKS",
    "STOCK",
    "STOP_S",
    "Aim",
    "BadPhoto",
    "Bare",
    "Comparison",
    "Missing",
    "Network",
    "Overload",
    "PhotoPath",
    "Setting",
    "Step",
    "Stop",
    "Value",
    "Visit",
    "bad_photo_of",
    "overload_of",
    "percentile",
    "step_of",
    "stop_of",
]

Network = Literal["real", "stub 0 ms", "stub 5 ms"]
CLIENTS = (1, 8, 32, 128)
"""In a closed loop."""
NETWORKS: tuple[Network, ...] = get_args(Network)
STOCK = "stock"
"""What runs as it comes in the bare loop: ONNX Runtime."""
STOP_S = 12
"""Waited for a server to end after SIGTERM."""
LARGE = (6000, 4000)
"""Width and height of the photo whose path is measured."""

_QUIET_CORES = 0.25


@dataclass(frozen=True)
class Step:
    """Clients in a closed loop. Latencies in ms, of answers with a mask."""

    clients: int
    requests: int
    per_s: float
    """Masks a second."""
    p50_ms: float
    p99_ms: float
    failed: int
    """Answers without a mask."""
    generator_cores: float


@dataclass(frozen=True)
class Overload:
    """An open loop at twice the best throughput. Latencies in ms, from when a request was due."""

    offered_per_s: float
    seconds: float
    served: int
    """With a mask, however late."""
    served_per_s: float
    """While the load lasted."""
    p50_ms: float
    p99_ms: float
    refused: dict[str, int]
    """By status."""
    with_retry_after: int
    """Of those refused."""
    lost: int
    """Sent and never answered, within ten seconds after the load."""
    unsent: int
    """Due while a thousand connections waited for answers."""
    drained_s: float
    """From the end of the load to the last answer."""


@dataclass(frozen=True)
class BadPhoto:
    """A truncated photo sent at the same moment as seven good ones, some times over."""

    times: int
    good_failed: int
    statuses: dict[str, int]
    """Of the bad one."""


@dataclass(frozen=True)
class Stop:
    """SIGTERM under eight clients in a closed loop."""

    answered_after: int
    """Masks that came after the signal."""
    refused: int
    """Answered without a mask."""
    lost: int
    """Sent on an open connection and never answered."""
    seconds: float | None
    """To the end of the process that got the signal; None if it was still there."""
    exit_code: int | None
    survivors: int
    """Processes that it left behind."""
    still_answers: bool
    """Whether the port gave a mask after that."""


@dataclass(frozen=True)
class Visit:
    """One start of one server with one network, and all loads on it."""

    entrant: str
    network: Network
    turn: int
    seconds_to_ready: float
    memory_mib: float
    """After the loads, of all its processes, shared pages counted once."""
    backend: str
    """What this server says it runs; peers run ONNX Runtime."""
    others_cores: float
    """Used meanwhile by neither the server nor the load on it."""
    steps: list[Step]
    masks_checked: int
    masks_wrong: int
    least_iou: float
    """Of the masks checked with those predicted without a server."""
    idle_cores: float | None = None
    overload: Overload | None = None
    bad_photo: BadPhoto | None = None
    stop: Stop | None = None

    def at(self, clients: int) -> Step:
        """The step with so many clients."""
        return next(step for step in self.steps if step.clients == clients)

    @property
    def is_quiet(self) -> bool:
        """Whether the machine did hardly anything else."""
        return self.others_cores < _QUIET_CORES

    @property
    def best_per_s(self) -> float:
        """The highest throughput of its steps."""
        return max(step.per_s for step in self.steps)


@dataclass(frozen=True)
class Bare:
    """The network of this server, or `STOCK`, in a loop, without a server."""

    turn: int
    entrant: str
    per_s: dict[str, float]
    """Images a second by batch size."""
    others_cores: float
    """Used meanwhile by anything else."""

    @property
    def is_quiet(self) -> bool:
        """Whether the machine did hardly anything else."""
        return self.others_cores < _QUIET_CORES

    @property
    def best_per_s(self) -> float:
        """With the batch size that is best."""
        return max(self.per_s.values())


@dataclass(frozen=True)
class PhotoPath:
    """What a photo of 6000×4000 costs beside the network, in milliseconds."""

    turn: int
    ours: float
    usual: float
    """Full decode, enlarged floats, Pillow's default PNG."""
    others_cores: float
    """Used meanwhile by anything else."""

    @property
    def is_quiet(self) -> bool:
        """Whether the machine did hardly anything else."""
        return self.others_cores < _QUIET_CORES


@dataclass(frozen=True)
class Missing:
    """A server that was not measured, with a network, and why."""

    entrant: str
    network: str
    turn: int
    reason: str


@dataclass(frozen=True)
class Aim:
    """A ratio that this server is meant to reach."""

    measure: str
    ratio: float
    found: float | None
    """None if it was not measured."""
    at_most: bool = False

    @property
    def wanted(self) -> str:
        """For people."""
        return f"{'≤' if self.at_most else '≥'} {self.ratio:.2f}"

    @property
    def is_met(self) -> bool:
        """By what was found."""
        if self.found is None:
            return False
        return self.found <= self.ratio if self.at_most else self.found >= self.ratio


@dataclass(frozen=True)
class Setting:
    """What has to be the same for figures to be compared."""

    machine: str
    commit: str
    model: str
    photos: str
    layout: str
    """Processes and threads of the peers."""
    step_s: float
    real_s: tuple[float, float, float, float]
    overload_s: float


Value = Callable[[Visit], float | None]
"""Of a visit, None where it was not measured."""


@dataclass
class Comparison:
    """All there is to report."""

    setting: Setting
    visits: list[Visit] = field(default_factory=list)
    bare: list[Bare] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    paths: list[PhotoPath] = field(default_factory=list)

    def put(self, found: "Visit | Missing") -> None:
        """In the place of what is known of the same visit, unless that was less disturbed."""

        def is_other(known: Visit | Missing) -> bool:
            return (known.entrant, known.network, known.turn) != (
                found.entrant,
                found.network,
                found.turn,
            )

        self.missing = [missing for missing in self.missing if is_other(missing)]
        known = [visit for visit in self.visits if not is_other(visit)]
        if isinstance(found, Missing):
            if not known:
                self.missing.append(found)
            return
        best = min([*known, found], key=lambda visit: visit.others_cores)
        self.visits = [*filter(is_other, self.visits), best]

    def put_bare(self, found: Bare) -> None:
        """The same, for what runs without a server."""
        same = [b for b in self.bare if (b.turn, b.entrant) == (found.turn, found.entrant)]
        best = min([*same, found], key=lambda bare: bare.others_cores)
        self.bare = [*(bare for bare in self.bare if bare not in same), best]

    def put_path(self, found: PhotoPath) -> None:
        """The same, for a photo's path."""
        same = [path for path in self.paths if path.turn == found.turn]
        best = min([*same, found], key=lambda path: path.others_cores)
        self.paths = [*(path for path in self.paths if path not in same), best]

    def of(self, entrant: str, network: Network) -> list[Visit]:
        """Its visits, in turn."""
        return sorted(
            (v for v in self.visits if (v.entrant, v.network) == (entrant, network)),
            key=lambda visit: visit.turn,
        )

    def median(self, entrant: str, network: Network, value: Value) -> float | None:
        """Over its turns; None if it has none."""
        values = [v for visit in self.of(entrant, network) if (v := value(visit)) is not None]
        return statistics.median(values) if values else None

    def ratio(self, over: str, under: str, network: Network, value: Value) -> float | None:
        """The median of what one has over what the other has in the same turn."""
        below = {visit.turn: value(visit) for visit in self.of(under, network)}
        ratios = [
            above / under_it
            for visit in self.of(over, network)
            if (above := value(visit)) is not None and (under_it := below.get(visit.turn))
        ]
        return statistics.median(ratios) if ratios else None

    def best(
        self,
        network: Network,
        value: Value,
        *,
        among: Sequence[str],
        highest: bool = True,
    ) -> str | None:
        """Whose median is best."""
        medians = {
            name: median
            for name in among
            if (median := self.median(name, network, value)) is not None
        }
        if not medians:
            return None
        return (max if highest else min)(medians, key=lambda name: medians[name])

    def of_bare(self, entrant: str = OURS) -> float | None:
        """Throughput over that of the bare loop in the same turn, which takes its best batch."""
        bare = {b.turn: b.best_per_s for b in self.bare if b.entrant == entrant}
        ratios = [
            visit.best_per_s / bare[visit.turn]
            for visit in self.of(entrant, "real")
            if visit.turn in bare
        ]
        return statistics.median(ratios) if ratios else None

    @property
    def peers(self) -> list[str]:
        """Names of those that are not this server and were measured at least once."""
        seen = {visit.entrant for visit in self.visits}
        return [e.name for e in ENTRANTS if not e.is_ours and e.name in seen]

    @property
    def networks(self) -> list[Network]:
        """Those that anything was measured with."""
        seen = {visit.network for visit in self.visits}
        return [network for network in NETWORKS if network in seen]

    def measured(self, network: Network) -> list[str]:
        """Names of those that were measured with it."""
        return [e.name for e in ENTRANTS if self.of(e.name, network)]

    @property
    def spread(self) -> float:
        """Range of a load's throughput over the turns, relative to its median: the median of it."""
        loads: dict[tuple[str, str, int], list[float]] = {}
        for visit in self.visits:
            for step in visit.steps:
                load = visit.entrant, visit.network, step.clients
                loads.setdefault(load, []).append(step.per_s)
        ranges = [(max(v) - min(v)) / statistics.median(v) for v in loads.values() if all(v)]
        return statistics.median(ranges) if ranges else 0.0

    def aims(self) -> list[Aim]:
        """What this server is meant to reach."""
        peers = [entrant for entrant in ENTRANTS if entrant.name in self.peers]
        python = self.best(
            "stub 0 ms", _best_per_s, among=[peer.name for peer in peers if peer.is_python]
        )
        quickest = [
            (
                self.best("stub 5 ms", _above_5_ms, among=[p.name for p in among], highest=False),
                label,
            )
            for label, among in (
                ("the best batching peer's", [peer for peer in peers if peer.batches]),
                ("the best's of those with a batching delay", [p for p in peers if p.waits]),
            )
        ]
        aims = [
            Aim(
                f"stub 0 ms, throughput ÷ the best Python peer's{_named(python)}",
                1.5,
                self.ratio(OURS, python, "stub 0 ms", _best_per_s) if python else None,
            ),
            *(
                Aim(
                    f"same ÷ {label}",
                    1.0,
                    self.ratio(OURS, name, "stub 0 ms", _best_per_s),
                )
                for name, label in (("triton", "Triton core's"), ("mosec", "mosec's"))
            ),
            *(
                Aim(
                    f"lone request, stub 5 ms: p50 above the 5 ms ÷ {label}{_named(peer)}",
                    1 / 3,
                    self.ratio(OURS, peer, "stub 5 ms", _above_5_ms) if peer else None,
                    at_most=True,
                )
                for peer, label in quickest
            ),
            *(
                Aim(f"real network, throughput ÷ its bare loop's{label}", 0.95, self.of_bare(name))
                for name, label in ((OURS, ""), ("slsnet-ort", ", both with ONNX Runtime"))
            ),
        ]
        aims += [
            Aim(
                f"{network}, throughput of 128 clients ÷ of 8",
                0.95,
                self.median(OURS, network, lambda visit: visit.at(128).per_s / visit.at(8).per_s),
            )
            for network in NETWORKS
        ]
        aims.append(
            Aim("bare loop's throughput ÷ that of stock ONNX Runtime, fp32", 1.5, self._engine())
        )
        aims.append(
            Aim(
                "6000×4000 JPEG to full-size mask, all but the network: time of full decode, float"
                " resize and default PNG ÷ this server's",
                5.0,
                statistics.median(p.usual / p.ours for p in self.paths) if self.paths else None,
            )
        )
        return aims

    def _engine(self) -> float | None:
        stock = {b.turn: b.best_per_s for b in self.bare if b.entrant == STOCK}
        ratios = [
            bare.best_per_s / stock[bare.turn]
            for bare in self.bare
            if bare.entrant == OURS and bare.turn in stock
        ]
        return statistics.median(ratios) if ratios else None


def _best_per_s(visit: Visit) -> float:
    return visit.best_per_s


def _above_5_ms(visit: Visit) -> float:
    return visit.at(1).p50_ms - 5


def _named(peer: str | None) -> str:
    return f" ({next(e.label for e in ENTRANTS if e.name == peer)})" if peer else ""


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all are not above (nearest rank); 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(len(ordered) * share * 1000) // 1000) - 1)] if ordered else 0.0


def _latencies_ms(answers: Sequence[Answer]) -> list[float]:
    return [1000 * (a.ended - a.due) for a in answers if a.status == 200]


def step_of(load: Load, clients: int) -> Step:
    """Of a closed loop."""
    latencies = _latencies_ms(load.answers)
    return Step(
        clients=clients,
        requests=len(load.answers),
        per_s=len(latencies) / load.seconds,
        p50_ms=percentile(latencies, 0.5),
        p99_ms=percentile(latencies, 0.99),
        failed=len(load.answers) - len(latencies),
        generator_cores=load.cpu_s / load.seconds,
    )


def overload_of(load: Load, per_s: float, seconds: float) -> Overload:
    """Of an open loop at `per_s` for so many seconds, and the wait for its last answers."""
    latencies = _latencies_ms(load.answers)
    end = load.started + seconds
    others = [a for a in load.answers if a.status not in (200, LOST)]
    return Overload(
        offered_per_s=per_s,
        seconds=seconds,
        served=len(latencies),
        served_per_s=sum(a.status == 200 and a.ended <= end for a in load.answers) / seconds,
        p50_ms=percentile(latencies, 0.5),
        p99_ms=percentile(latencies, 0.99),
        refused=_counts(others),
        with_retry_after=sum(a.retry_after for a in others),
        lost=sum(a.status == LOST for a in load.answers),
        unsent=load.unsent,
        drained_s=max(0.0, max((a.ended for a in load.answers), default=end) - end),
    )


def bad_photo_of(rounds: Sequence[tuple[int, Sequence[Answer]]]) -> BadPhoto:
    """Of answers to photos sent together, each time with the place of the bad one."""
    bad = [answers[place] for place, answers in rounds]
    good = [a for place, answers in rounds for i, a in enumerate(answers) if i != place]
    return BadPhoto(len(rounds), sum(a.status != 200 for a in good), _counts(bad))


def stop_of(
    load: Load,
    signalled: float,
    *,
    seconds: float | None,
    exit_code: int | None,
    survivors: int,
    still_answers: bool,
) -> Stop:
    """Of a closed loop in which SIGTERM was sent at `signalled`."""
    after = [answer for answer in load.answers if answer.ended >= signalled]
    return Stop(
        answered_after=sum(answer.status == 200 for answer in after),
        refused=sum(answer.status not in (200, LOST) for answer in after),
        lost=sum(answer.status == LOST for answer in after),
        seconds=seconds,
        exit_code=exit_code,
        survivors=survivors,
        still_answers=still_answers,
    )


def _counts(answers: Sequence[Answer]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for answer in answers:
        counts[str(answer.status)] = counts.get(str(answer.status), 0) + 1
    return counts
