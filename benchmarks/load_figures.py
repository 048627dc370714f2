"""The figures of a load test: those of each load, and those that follow from them."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Kind", "Report", "Scenario", "Step"]

Scenario = Literal["ramp", "open loop", "burst", "priority"]


@dataclass(frozen=True)
class Step:
    """One stretch of one load, and the photos that were due in it or, in a closed loop, answered.

    Latencies are in ms.
    """

    scenario: Scenario
    name: str
    clients: int
    """In a closed loop; 0 in an open one."""
    load: float
    """Of an open loop, aimed at: share of the ramp's best throughput; 0 in a closed one."""
    seconds: float
    requests: int
    offered_per_s: float
    answered_per_s: float
    """With a mask."""
    others_per_s: float
    """Masks for clients in a loop beside the ones that the rest of this is about."""
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    late_p99_ms: float
    """How much later than due a photo was sent: what latency from sending would leave out."""
    stages_ms: dict[str, float]
    """Means by `Server-Timing`, and `outside`: the rest of the latency."""
    batch: float
    """Photos a run of the network, mean over runs."""
    refused: int
    """429."""
    failed: int
    """Neither a mask nor refused."""
    generator_cores: float


@dataclass(frozen=True)
class Kind:
    """Photos of one size and format with a lone client. Medians, ms."""

    name: str
    requests: int
    latency_ms: float
    decode_ms: float
    encode_ms: float
    not_network_ms: float


@dataclass(frozen=True)
class Machine:
    """What client and server ran on."""

    name: str
    """With its cores and its load average before the test."""
    was_quiet: bool
    """Whether it had work for at most half of its cores before the test."""


@dataclass(frozen=True)
class Report:
    """Everything that is written down."""

    machine: Machine
    model: str
    backend: str
    photos: str
    cards: dict[str, int]
    """Requests of the deck by kind of photo."""
    network_ms: float
    """One image through the bare network, the server's backend without the server."""
    steps: list[Step]
    kinds: list[Kind]
    masks: dict[str, int]
    """Answers by verdict."""
    failures: dict[str, int]
    """Statuses other than 200 and 429; 0 is no answer."""
    burst: int
    """Photos at once."""

    def of(self, scenario: Scenario) -> list[Step]:
        """The steps of one scenario, in their order."""
        return [step for step in self.steps if step.scenario == scenario]

    @property
    def best_per_s(self) -> float:
        """The highest throughput of the ramp."""
        return max(step.answered_per_s for step in self.of("ramp"))

    @property
    def knee_clients(self) -> float:
        """Clients at which the ramp's two asymptotes cross.

        Below it each further client adds throughput, above it only waiting: the best throughput ×
        the mean latency of a lone client (Denning and Buzen 1978, doi:10.1145/356733.356735).
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
