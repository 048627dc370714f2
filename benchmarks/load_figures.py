"""The figures of a load test: those of each load, and those that follow from them."""

from dataclasses import dataclass
from typing import Literal

Scenario = Literal["ramp", "open loop", "burst", "priority"]


@dataclass(frozen=True)
class Step:
    """One stretch of one load, with the photos due in it or, in a closed loop, answered in it.

    Latencies are in ms.
    """

    scenario: Scenario
    name: str
    clients: int
    """Number of clients in a closed loop; 0 in an open one."""
    load: float
    """Load that an open loop aims at: share of the ramp's best throughput; 0 in a closed one."""
    seconds: float
    requests: int
    offered_per_s: float
    answered_per_s: float
    """Masks a second."""
    others_per_s: float
    """Masks a second for clients in a loop beside the ones of this step."""
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    late_p99_ms: float
    """How much later than due a photo was sent. Latency from sending would leave this out."""
    stages_ms: dict[str, float]
    """Mean times by `Server-Timing`, and `outside`, which is the rest of the latency."""
    batch: float
    """Photos in a run of the network, mean over runs."""
    refused: int
    """Answers with status 429."""
    failed: int
    """Requests with neither a mask nor a refusal."""
    generator_cores: float


@dataclass(frozen=True)
class Kind:
    """Photos of one size and format with a lone client. Medians, in ms."""

    name: str
    requests: int
    latency_ms: float
    decode_ms: float
    encode_ms: float
    not_network_ms: float


@dataclass(frozen=True)
class Machine:
    """The machine that client and server ran on."""

    name: str
    """Description of it, with its cores and its load average before the test."""
    was_quiet: bool
    """Whether other work took at most half of its cores before the test."""


@dataclass(frozen=True)
class Report:
    """Everything that the report files hold."""

    machine: Machine
    model: str
    backend: str
    photos: str
    cards: dict[str, int]
    """Requests of the deck, by kind of photo."""
    network_ms: float
    """Time of one image through the bare network: the server's backend without the server."""
    steps: list[Step]
    kinds: list[Kind]
    masks: dict[str, int]
    """Number of answers, by verdict."""
    failures: dict[str, int]
    """Number of answers by status, other than 200 and 429; status 0 is no answer."""
    burst: int
    """Photos that a burst sends at once."""

    def of(self, scenario: Scenario) -> list[Step]:
        """The steps of one scenario, in order."""
        return [step for step in self.steps if step.scenario == scenario]

    @property
    def best_per_s(self) -> float:
        """The highest throughput of the ramp."""
        return max(step.answered_per_s for step in self.of("ramp"))

    @property
    def knee_clients(self) -> float:
        """The number of clients at which the ramp's two asymptotes cross.

        Below it each further client adds throughput, above it only waiting. It is the best
        throughput × the mean latency of a lone client (Denning and Buzen 1978,
        doi:10.1145/356733.356735).
        """
        return self.best_per_s * self.of("ramp")[0].mean_ms / 1000

    @property
    def saturated_at(self) -> Step:
        """The first step within 5 % of the best throughput."""
        return next(s for s in self.of("ramp") if s.answered_per_s >= 0.95 * self.best_per_s)

    @property
    def is_good(self) -> bool:
        """Whether every mask was right and nothing failed."""
        return not self.failures and not self.masks["wrong"] and sum(self.masks.values()) > 0
