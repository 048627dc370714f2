"""OpenTelemetry traces: one span for a request and one for each of its stages.

They are made if an `OTEL_EXPORTER_OTLP_…` variable or `OTEL_TRACES_EXPORTER` is set, and then need
requirements-otel.txt; otherwise OpenTelemetry's SDK is not imported. All settings are its own
variables. Spans are written when a request is over, from its stopwatch.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from server.observe.stages import STAGES, Stages

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

__all__ = ["Record", "open_tracing"]

log = logging.getLogger("slsnet.tracing")

Record = Callable[[Stages, Mapping[str, str], str, Mapping[str, str | int]], None]
"""Called for each request: its stages, its headers, the span's name, and its attributes."""


def open_tracing() -> tuple[Record, Callable[[], None]] | None:
    """The function that records a request, and one that sends the last spans; None if switched off.

    Raises:
        RuntimeError: traces are switched on, and OpenTelemetry is not installed or another exporter
            than OTLP over HTTP is asked for.
    """
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "")
    wanted = exporter or any(name.startswith("OTEL_EXPORTER_OTLP_") for name in os.environ)
    if not wanted or exporter == "none" or os.environ.get("OTEL_SDK_DISABLED", "") == "true":
        return None
    protocol = os.environ.get(
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "")
    )
    if exporter not in ("", "otlp") or protocol not in ("", "http/protobuf"):
        raise RuntimeError(
            "Traces go to a collector by OTLP over HTTP: OTEL_TRACES_EXPORTER can be otlp or none,"
            f" OTEL_EXPORTER_OTLP_PROTOCOL http/protobuf, and not {exporter or protocol}."
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise RuntimeError(
            f"OTEL_… asks for traces: install requirements-otel.txt ({error})"
        ) from error
    named = "OTEL_SERVICE_NAME" in os.environ
    provider = TracerProvider(
        resource=Resource.create({} if named else {"service.name": "slsnet"}),
        # The server shuts it down itself, and does not wait for ever.
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    log.info("traces are sent")
    return _recorder(provider), provider.shutdown


def _recorder(provider: "TracerProvider") -> Record:
    from opentelemetry import propagate, trace

    tracer = provider.get_tracer("slsnet.server")

    def record(
        stages: Stages,
        headers: Mapping[str, str],
        name: str,
        attributes: Mapping[str, str | int],
    ) -> None:
        now_ns = time.time_ns()
        start_ns = now_ns - round((time.perf_counter() - stages.started) * 1e9)
        span = tracer.start_span(
            name,
            context=propagate.extract(headers),
            kind=trace.SpanKind.SERVER,
            attributes=dict(attributes),
            start_time=start_ns,
        )
        within = trace.set_span_in_context(span)
        at_ns = start_ns
        for stage in STAGES:
            if stage in stages.seconds:
                part = tracer.start_span(stage, context=within, start_time=at_ns)
                at_ns += round(stages.seconds[stage] * 1e9)
                part.end(at_ns)
        if attributes["http.response.status_code"] in range(500, 600):
            span.set_status(trace.StatusCode.ERROR)
        span.end(now_ns)

    return record
