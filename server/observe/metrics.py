"""The metrics that Prometheus scrapes at `GET /metrics`."""

import asyncio
import os
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector

from server.backends import BackendInfo
from server.observe.log_writer import lost_lines
from server.observe.shared_metrics import SHARED_FOLDER, WORKER

__all__ = ["SHARED", "Metrics"]

SHARED = SHARED_FOLDER in os.environ
"""Whether this process is one of several whose metrics are shown together."""

if SHARED:
    _worker = os.environ.get(WORKER, str(os.getpid()))
    values.ValueClass = values.MultiProcessValue(lambda: _worker)  # type: ignore[no-untyped-call]

# Creation times would double the series, and no scraper needs them.
disable_created_metrics()  # type: ignore[no-untyped-call]

# Seconds between two readings of the gauges that other processes show.
_REFRESH_S = 1

_STAGE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
_QUALITIES = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


class Metrics:
    """The server's counters, in a registry of their own so that several servers fit a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._serving: dict[str, tuple[str, ...]] = {}
        self._observed: list[tuple[Gauge, Callable[[], float]]] = []
        self._observe_process()
        self._lines_counted = 0
        self._count_requests()
        self._count_work()
        self._show_what_runs()
        self._show_networks()
        self._show_what_waits()

    def _count_requests(self) -> None:
        """Make the metrics of answers, their times, and connections."""
        self.requests = Counter(
            "slsnet_requests",
            "Answers by path, status and, for errors, the reason",
            ["path", "status", "reason"],
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "slsnet_stage_seconds",
            "Time of a segmentation request by stage",
            ["stage"],
            buckets=_STAGE_SECONDS,
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "slsnet_request_seconds",
            "Whole time of requests that the network ran for, or whose deadline passed",
            ["path"],
            buckets=_STAGE_SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "slsnet_batch_size",
            "Photos that ran through the network together",
            buckets=_BATCH_SIZES,
            registry=self.registry,
        )
        self.connections_refused = Counter(
            "slsnet_connections_refused",
            "Connections that were refused or cut off, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.log_lines_lost = Counter(
            "slsnet_log_lines_lost",
            "Lines of the log that were lost: the reader was too slow, or the disk full",
            registry=self.registry,
        )

    def _count_work(self) -> None:
        """Make the metrics of batches, photos and networks."""
        self.dropped = Counter(
            "slsnet_dropped",
            "Requests dropped before inference, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.batch_failures = Counter(
            "slsnet_batch_failures",
            "Batches on which the backend failed",
            registry=self.registry,
        )
        self.bulk_photos = Counter(
            "slsnet_bulk_photos",
            "Photos of requests with several photos, by status",
            ["status"],
            registry=self.registry,
        )
        self.stream_frames = Counter(
            "slsnet_stream_frames",
            "Frames of streams by status; `dropped` are those that a newer one took the place of",
            ["status"],
            registry=self.registry,
        )
        self.mask_quality = Histogram(
            "slsnet_mask_quality",
            "Quality of the masks: the Jaccard that is to be expected of each",
            buckets=_QUALITIES,
            registry=self.registry,
        )
        self.unfit_photos = Counter(
            "slsnet_unfit_photos",
            "Photos that are likely no dermoscopic photos, whether they were refused or not",
            registry=self.registry,
        )
        self.decoded_on_gpu = Counter(
            "slsnet_decoded_on_gpu",
            "Photos that the GPU decoded (--decode gpu)",
            registry=self.registry,
        )
        self.engine_events = Counter(
            "slsnet_engine_events",
            "Steps in the life of the TensorRT engine: found, missing, damaged, built, refused, …",
            ["event"],
            registry=self.registry,
        )
        self.reloads = Counter(
            "slsnet_reloads",
            "Loads of the network, with the first one, by result",
            ["result"],
            registry=self.registry,
        )
        # They exist from the start, so that the first failure shows as a rise.
        for result in ("succeeded", "failed"):
            self.reloads.labels(result)

    def _show_what_runs(self) -> None:
        self.circuit_open = Gauge(
            "slsnet_circuit_open",
            "1 while the backend fails all the time and nothing is given to it",
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.backend = Gauge(
            "slsnet_backend_info",
            "The backend, and the network that it runs",
            [
                "backend",
                "runtime_version",
                "device",
                "precision",
                "model",
                "version",
                "sha256",
                "attention",
                "network",
            ],
            multiprocess_mode="livemax",
            registry=self.registry,
        )

    def _show_networks(self) -> None:
        """Make the metrics of each network by its name."""
        self.network_photos = Counter(
            "slsnet_network_photos",
            "Photos that each network ran",
            ["network"],
            registry=self.registry,
        )
        self.network_seconds = Counter(
            "slsnet_network_run_seconds",
            "Time that the runs of each network took",
            ["network"],
            registry=self.registry,
        )
        self.network_ready = Gauge(
            "slsnet_network_ready",
            "1 while the network runs photos that name it",
            ["network"],
            multiprocess_mode="livemin",
            registry=self.registry,
        )
        self.network_queue_depth = Gauge(
            "slsnet_network_queue_depth",
            "Photos that wait for each network, or to be decoded for it",
            ["network", "priority"],
            multiprocess_mode="livesum",
            registry=self.registry,
        )

    def _show_what_waits(self) -> None:
        self.admitted = Gauge(
            "slsnet_requests_in_flight",
            "Segmentation requests being worked on or waiting",
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.streams = Gauge(
            "slsnet_streams",
            "WebSockets at /stream that are open",
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.bytes_in_flight = Gauge(
            "slsnet_bytes_in_flight",
            "Bytes of request bodies in memory",
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.pixels_decoding = Gauge(
            "slsnet_pixels_decoding",
            "Pixels of the photos being decoded",
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.padding = Counter(
            "slsnet_batch_padding_images",
            "Padding of batches up to a size that the backend is built for, in photos",
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "slsnet_queue_depth",
            "Photos that wait for the network, or to be decoded for it",
            ["priority"],
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.queue_age_seconds = Gauge(
            "slsnet_queue_age_seconds",
            "The longest time that a photo in the queue has waited",
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.expected_wait_seconds = Gauge(
            "slsnet_expected_wait_seconds",
            "The time that a new request is expected to wait for its answer",
            ["priority"],
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.ready = Gauge(
            "slsnet_ready",
            "1 while requests are served and wanted",
            multiprocess_mode="livemin",
            registry=self.registry,
        )

    def observe(self, gauge: Gauge, read: Callable[[], float]) -> None:
        """Let `gauge` show the value that `read` returns when the metrics are rendered."""
        self._observed.append((gauge, read))

    def refresh(self) -> None:
        """Read the observed gauges, so that processes that share metrics can show them."""
        for gauge, read in self._observed:
            gauge.set(read())
        lost = lost_lines()
        self.log_lines_lost.inc(lost - self._lines_counted)
        self._lines_counted = lost

    async def keep_fresh(self) -> None:
        """Refresh all the time: any process shows the figures of all."""
        while True:
            self.refresh()
            await asyncio.sleep(_REFRESH_S)

    def serves(self, network: str, backend: BackendInfo) -> None:
        """`backend` runs this network from now on, and no other does."""
        self._forget_backend(network)
        self._serving[network] = labels = (
            backend.name,
            backend.version,
            backend.device,
            backend.precision,
            backend.model.get("name", "unknown"),
            backend.model.get("version", "unknown"),
            backend.model.get("weights_sha256", "unknown"),
            backend.model.get("attention", "unknown"),
            network,
        )
        self.backend.labels(*labels).set(1)

    def forget(self, network: str) -> None:
        """No request names this network any more; what was counted of it stays."""
        self._forget_backend(network)
        self._end(self.network_ready, network)
        for priority in ("interactive", "bulk"):
            self._end(self.network_queue_depth, network, priority)

    def _forget_backend(self, network: str) -> None:
        if labels := self._serving.pop(network, None):
            self._end(self.backend, *labels)

    def _end(self, gauge: Gauge, *labels: str) -> None:
        """Show no more of this series."""
        child = gauge.labels(*labels)
        self._observed = [(one, read) for one, read in self._observed if one is not child]
        child.set(0)
        if not SHARED:
            # It stays, as 0, in files that processes share.
            gauge.remove(*labels)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format, of all processes that share them."""
        self.refresh()
        if not SHARED:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def _observe_process(self) -> None:
        """Make the metrics of this process (memory, files, CPU, start) under their usual names."""
        if not SHARED:
            ProcessCollector(registry=self.registry)
            return
        process = ProcessCollector(registry=None)
        for family in process.collect():
            gauge = Gauge(
                family.samples[0].name,
                family.documentation,
                registry=self.registry,
                multiprocess_mode="liveall",
            )
            self.observe(gauge, lambda name=family.name: _sample(process, name))  # type: ignore[misc]


def _sample(process: ProcessCollector, name: str) -> float:
    return next(family.samples[0].value for family in process.collect() if family.name == name)
