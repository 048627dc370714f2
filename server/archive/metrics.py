"""The metrics of the archive's process."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.archive.journal import Journal

__all__ = ["Metrics"]


class Metrics:
    """Counts what comes, what is tried, and what is in the journal."""

    def __init__(self, journal: Journal) -> None:
        self.registry = CollectorRegistry()
        self.received = Counter(
            "slsnet_archive_received",
            "Objects that came by C-STORE or were fetched, and refused associations, by what became"
            " of them",
            ["result"],
            registry=self.registry,
        )
        self.attempts = Counter(
            "slsnet_archive_attempts",
            "Attempts at a stage (segment, stow, send): ok, or the reason of the failure",
            ["stage", "result"],
            registry=self.registry,
        )
        self.delivered = Counter(
            "slsnet_archive_delivered",
            "Objects whose results are delivered everywhere, and which are erased",
            registry=self.registry,
        )
        self.registry.register(_Journal(journal))
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)


class _Journal(Collector):
    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def collect(self) -> Iterator[GaugeMetricFamily]:
        state = self._journal.state()
        waiting = GaugeMetricFamily(
            "slsnet_archive_waiting", "Objects that wait for a stage", labels=["stage"]
        )
        for stage, count in state.waiting.items():
            waiting.add_metric([stage], count)
        yield waiting
        dead = GaugeMetricFamily(
            "slsnet_archive_dead_letters",
            "Objects that wait for a person, by stage and reason",
            labels=["stage", "reason"],
        )
        for (stage, reason), count in state.dead.items():
            dead.add_metric([stage, reason], count)
        yield dead
        yield GaugeMetricFamily(
            "slsnet_archive_journal_bytes", "Bytes of objects in the journal", value=state.bytes
        )
        yield GaugeMetricFamily(
            "slsnet_archive_oldest_seconds",
            "Age of the oldest object that waits; 0 without one",
            value=state.oldest_s,
        )
