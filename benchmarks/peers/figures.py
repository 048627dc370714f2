"""The measurements of each server, and what follows from them."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from benchmarks.peers.client import LOST, Answer, Load
from benchmarks.peers.entrants import ENTRANTS, OURS, Entrant
from benchmarks.percentiles import percentile

Network = Literal["real", "stub 0 ms", "stub 5 ms"]
CLIENTS = (1, 8, 32, 128)
"""Numbers of clients in a closed loop."""
NETWORKS: tuple[Network, ...] = get_args(Network)
STOCK = "stock"
"""Entrant in the bare loop that is ONNX Runtime with its own defaults."""
STOP_S = 12
"""Seconds to wait for a server to end after SIGTERM."""
LARGE = (6000, 4000)
"""Width and height of the photo whose path is measured."""

_QUIET_CORES = 0.25


@dataclass(frozen=True)
class Step:
    """Clients in a closed loop. Latencies are in ms, of answers with a mask."""

    clients: int
    requests: int
    per_s: float
    """Masks in a second."""
    p50_ms: float
    p99_ms: float
    failed: int
    """Number of answers without a mask."""
    generator_cores: float


@dataclass(frozen=True)
class Overload:
    """An open loop at twice the best throughput. Latencies (ms) count from when a photo was due."""

    offered_per_s: float
    seconds: float
    served: int
    """Answers with a mask, however late."""
    served_per_s: float
    """Masks in a second while the load lasted."""
    p50_ms: float
    p99_ms: float
    refused: dict[str, int]
    """Number of refusals by status."""
    with_retry_after: int
    """Number of refusals with `Retry-After`."""
    lost: int
    """Requests that were sent and had no answer within ten seconds after the load."""
    unsent: int
    """Requests that were due while a thousand connections waited for answers."""
    drained_s: float
    """Seconds from the end of the load to the last answer."""


@dataclass(frozen=True)
class BadPhoto:
    """A truncated photo, sent some times over at the same moment as seven good ones."""

    times: int
    good_failed: int
    statuses: dict[str, int]
    """Number of answers to the bad photo, by status."""


@dataclass(frozen=True)
class Stop:
    """SIGTERM sent to a server with eight clients in a closed loop."""

    answered_after: int
    """Masks that came after the signal."""
    refused: int
    """Answers without a mask."""
    lost: int
    """Requests that were sent on an open connection and never answered."""
    seconds: float | None
    """Seconds until the process that got the signal ended; None if it did not."""
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
    """Memory of all its processes after the loads, with shared pages counted once."""
    backend: str
    """The backend that this server reports; peers run ONNX Runtime."""
    others_cores: float
    """Cores that were used meanwhile by neither the server nor its load."""
    steps: list[Step]
    masks_checked: int
    masks_wrong: int
    least_iou: float
    """Least overlap of the checked masks with those predicted without a server."""
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
    """The network of this server, or `STOCK`, in a loop without a server."""

    turn: int
    entrant: str
    per_s: dict[str, float]
    """Images in a second, by batch size."""
    others_cores: float
    """Cores that other work used meanwhile."""

    @property
    def is_quiet(self) -> bool:
        """Whether the machine did hardly anything else."""
        return self.others_cores < _QUIET_CORES

    @property
    def best_per_s(self) -> float:
        """Images in a second at the best batch size."""
        return max(self.per_s.values())


@dataclass(frozen=True)
class PhotoPath:
    """The cost of a photo of 6000×4000 beside the network, in milliseconds."""

    turn: int
    ours: float
    usual: float
    """Cost of the usual way: full decode, enlarged floats, Pillow's default PNG."""
    others_cores: float
    """Cores that other work used meanwhile."""

    @property
    def is_quiet(self) -> bool:
        """Whether the machine did hardly anything else."""
        return self.others_cores < _QUIET_CORES


@dataclass(frozen=True)
class Missing:
    """A server that was not measured with a network, and the reason."""

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
    """The measured ratio; None if it was not measured."""
    at_most: bool = False

    @property
    def wanted(self) -> str:
        """The aim in words."""
        return f"{'≤' if self.at_most else '≥'} {self.ratio:.2f}"

    @property
    def is_met(self) -> bool:
        """Whether the measured ratio meets the aim."""
        if self.found is None:
            return False
        return self.found <= self.ratio if self.at_most else self.found >= self.ratio


@dataclass(frozen=True)
class Setting:
    """Everything that must be the same for figures to be compared."""

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
"""Takes a figure from a visit; None where it was not measured."""


@dataclass
class Comparison:
    """Everything that the report shows."""

    setting: Setting
    visits: list[Visit] = field(default_factory=list)
    bare: list[Bare] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    paths: list[PhotoPath] = field(default_factory=list)

    def put(self, found: "Visit | Missing") -> None:
        """Add a visit. It replaces one of the same turn, unless that was less disturbed."""

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
        """Add a measurement without a server, by the same rule as `put`."""
        same = [b for b in self.bare if (b.turn, b.entrant) == (found.turn, found.entrant)]
        best = min([*same, found], key=lambda bare: bare.others_cores)
        self.bare = [*(bare for bare in self.bare if bare not in same), best]

    def put_path(self, found: PhotoPath) -> None:
        """Add a measurement of a photo's path, by the same rule as `put`."""
        same = [path for path in self.paths if path.turn == found.turn]
        best = min([*same, found], key=lambda path: path.others_cores)
        self.paths = [*(path for path in self.paths if path not in same), best]

    def of(self, entrant: str, network: Network) -> list[Visit]:
        """Visits of an entrant with a network, in order of their turns."""
        return sorted(
            (v for v in self.visits if (v.entrant, v.network) == (entrant, network)),
            key=lambda visit: visit.turn,
        )

    def median(self, entrant: str, network: Network, value: Value) -> float | None:
        """Median of a figure over an entrant's turns; None if it has none."""
        values = [v for visit in self.of(entrant, network) if (v := value(visit)) is not None]
        return statistics.median(values) if values else None

    def ratio(self, over: str, under: str, network: Network, value: Value) -> float | None:
        """The median, over turns, of one entrant's figure divided by the other's in that turn."""
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
        """Name of the entrant whose median is best."""
        medians = {
            name: median
            for name in among
            if (median := self.median(name, network, value)) is not None
        }
        if not medians:
            return None
        return (max if highest else min)(medians, key=lambda name: medians[name])

    def of_bare(self, entrant: str = OURS) -> float | None:
        """An entrant's throughput over that of its bare loop, at its best batch, in one turn."""
        bare = {b.turn: b.best_per_s for b in self.bare if b.entrant == entrant}
        ratios = [
            visit.best_per_s / bare[visit.turn]
            for visit in self.of(entrant, "real")
            if visit.turn in bare
        ]
        return statistics.median(ratios) if ratios else None

    @property
    def peers(self) -> list[str]:
        """Names of the peers that were measured at least once; this server is not one."""
        seen = {visit.entrant for visit in self.visits}
        return [e.name for e in ENTRANTS if not e.is_ours and e.name in seen]

    @property
    def networks(self) -> list[Network]:
        """Networks with which anything was measured."""
        seen = {visit.network for visit in self.visits}
        return [network for network in NETWORKS if network in seen]

    def measured(self, network: Network) -> list[str]:
        """Names of the entrants that were measured with a network."""
        return [e.name for e in ENTRANTS if self.of(e.name, network)]

    @property
    def spread(self) -> float:
        """Range of a load's throughput over the turns, relative to its median; median of all."""
        loads: dict[tuple[str, str, int], list[float]] = {}
        for visit in self.visits:
            for step in visit.steps:
                load = visit.entrant, visit.network, step.clients
                loads.setdefault(load, []).append(step.per_s)
        ranges = [(max(v) - min(v)) / statistics.median(v) for v in loads.values() if all(v)]
        return statistics.median(ranges) if ranges else 0.0

    def aims(self) -> list[Aim]:
        """The ratios that this server is meant to reach."""
        peers = [entrant for entrant in ENTRANTS if entrant.name in self.peers]
        python = self.best(
            "stub 0 ms", _best_per_s, among=[peer.name for peer in peers if peer.is_python]
        )
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
                for peer, label in self._quickest(peers)
            ),
            *(
                Aim(f"real network, throughput ÷ its bare loop's{label}", 0.95, self.of_bare(name))
                for name, label in ((OURS, ""), ("slsnet-openvino", ", both with OpenVINO"))
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

    def _quickest(self, peers: Sequence[Entrant]) -> list[tuple[str | None, str]]:
        """The peers that add least to a lone request, and what each is the best of."""
        return [
            (
                self.best("stub 5 ms", _above_5_ms, among=[p.name for p in among], highest=False),
                label,
            )
            for label, among in (
                ("the best batching peer's", [peer for peer in peers if peer.batches]),
                ("the best's of those with a batching delay", [p for p in peers if p.waits]),
            )
        ]

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


def _latencies_ms(answers: Sequence[Answer]) -> list[float]:
    return [1000 * (a.ended - a.due) for a in answers if a.status == 200]


def step_of(load: Load, clients: int) -> Step:
    """Sum up a closed loop as a step."""
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
    """Sum up an open loop at `per_s` for so many seconds, and the wait for its last answers."""
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
    """Sum up photos sent together: each round has the position of the bad one, and all answers."""
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
    """Sum up a closed loop in which SIGTERM was sent at `signalled`."""
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
