"""What an operator sees: metrics, logs as JSON, traces."""

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from server.observe.tracing import open_tracing
from tests.support.launch import ServerProcess, serve
from tests.support.lesions import drawn_photo
from tests.support.offline import CPU_BACKEND
from tests.support.samples import Sample
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("small_networks")


class Collector(HTTPServer):
    """Takes traces as a collector does (OTLP over HTTP)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[ExportTraceServiceRequest] = []


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def spans_of(collector: Collector, trace_id: str) -> list[Span]:
    """Those of one trace that have come so far."""
    return [
        span
        for request in collector.received
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
        if span.trace_id.hex() == trace_id
    ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_TRACES_EXPORTER", "console"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
)
def test_traces_that_would_go_nowhere_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=f"OTLP over HTTP.*not {value}"):
        open_tracing()


def test_a_request_leaves_a_line_of_json_and_a_trace(
    collector: Collector, photos: list[Sample]
) -> None:
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        # What is not sent before the end has 2 s then.
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        # The framework's own spans would tell the same a second time.
        "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
    }
    with serve("--log-format", "json", environment=environment) as server:
        answer = httpx.post(
            f"{server.url}/segment?format=json",
            files={"file": ("Jane-Doe.jpg", photos[0].data)},
            headers={"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"},
            timeout=600,
        )
        assert answer.status_code == 200
        assert httpx.post(f"{server.url}/segment", content=b"x").status_code == 415
        # Of this one the decoder itself complains, and not in JSON.
        damaged = drawn_photo(0, 96, 80, "TIFF", compression="tiff_lzw")
        damaged = damaged[:1000] + 16 * b"\xff" + damaged[1016:]
        assert httpx.post(f"{server.url}/segment", content=damaged).status_code == 422
        # It ends last of its trace.
        until(lambda: any(span.name == "POST /segment" for span in spans_of(collector, trace_id)))
        server.terminate()
        assert server.wait() == 0
        log = server.log()

    lines = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "logger"} <= set(line) for line in lines)
    served, refused, _ = (line for line in lines if line.get("path") == "/segment")
    assert served["request_id"] == answer.headers["x-request-id"]
    assert (served["status"], served["method"], served["reason"]) == (200, "POST", "")
    assert set(served["stages_ms"]) == {"read", "decode", "queue", "infer", "encode"}
    assert sum(served["stages_ms"].values()) <= served["total_ms"] + 1
    assert (refused["status"], refused["reason"]) == (415, "unsupported_type")
    assert "Jane-Doe" not in log

    spans = spans_of(collector, trace_id)
    root = next(span for span in spans if span.name == "POST /segment")
    assert root.parent_span_id.hex() == "00f067aa0ba902b7"
    parts = {span.name: span for span in spans if span.parent_span_id == root.span_id}
    assert set(parts) == {"read", "decode", "queue", "infer", "encode"}
    assert len(spans) == 1 + len(parts)
    for span in parts.values():
        assert root.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano


def test_a_collector_that_says_nothing_does_not_hold_up_the_end(photos: list[Sample]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        flags = ("--drain-grace-s", "0", "--drain-timeout-s", "15")
        with serve(*flags, environment={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}) as server:
            answer = httpx.post(f"{server.url}/segment", content=photos[0].data, timeout=60)
            assert answer.status_code == 200
            server.terminate()
            assert server.wait() == 0


def _value(family: Metric, suffix: str = "_total", **labels: str) -> float:
    return sum(
        sample.value
        for sample in family.samples
        if sample.name == family.name + suffix and labels.items() <= sample.labels.items()
    )


def _families(server: ServerProcess) -> dict[str, Metric]:
    text = httpx.get(f"{server.url}/metrics").text
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_metrics_tell_what_an_operator_needs(server: ServerProcess, photos: list[Sample]) -> None:
    before = _families(server)
    assert httpx.post(f"{server.url}/segment", content=photos[0].data).status_code == 200
    assert httpx.post(f"{server.url}/segment", content=b"x").status_code == 415
    families = _families(server)
    assert {
        "process_cpu_seconds",
        "process_open_fds",
        "process_resident_memory_bytes",
        "slsnet_backend_info",
        "slsnet_batch_padding_images",
        "slsnet_batch_size",
        "slsnet_bytes_in_flight",
        "slsnet_circuit_open",
        "slsnet_connections_refused",
        "slsnet_log_lines_lost",
        "slsnet_dropped",
        "slsnet_pixels_decoding",
        "slsnet_queue_age_seconds",
        "slsnet_queue_depth",
        "slsnet_ready",
        "slsnet_reloads",
        "slsnet_request_seconds",
        "slsnet_requests",
        "slsnet_requests_in_flight",
        "slsnet_stage_seconds",
    } <= set(families)
    assert all(family.documentation for family in families.values())
    by_reason = {
        (sample.labels["status"], sample.labels["reason"])
        for sample in families["slsnet_requests"].samples
        if sample.labels["path"] == "/segment"
    }
    assert {("200", ""), ("415", "unsupported_type")} <= by_reason
    # A refusal is no latency.
    timed = [
        _value(seen["slsnet_request_seconds"], "_count", path="/segment")
        for seen in (before, families)
    ]
    assert timed[1] - timed[0] == 1
    # A counter that first appears with its first failure would rise unseen.
    assert _value(families["slsnet_reloads"], result="failed") == 0
    (info,) = families["slsnet_backend_info"].samples
    assert info.labels["backend"] == CPU_BACKEND
    assert info.labels["sha256"] == httpx.get(f"{server.url}/model").json()["weights_sha256"]
    stages = {sample.labels["stage"] for sample in families["slsnet_stage_seconds"].samples}
    assert {"read", "decode", "queue", "infer", "encode"} <= stages
