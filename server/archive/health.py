"""The port for health and metrics.

The standard library's server is enough for the two clients that it has, an orchestrator's probe and
Prometheus. It shows nothing of any patient.
"""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST

from server.archive.metrics import Metrics

__all__ = ["Health"]

# Seconds for a request to come, so that nobody holds a thread.
_REQUEST_S = 5


class Health:
    """Answers `GET /health/live`, `/health/ready` and `/metrics`.

    Args:
        metrics: what is shown.
        why_not_ready: says why the process takes no objects; empty if it does.

    Raises:
        OSError: the port cannot be had.
    """

    def __init__(
        self, host: str, port: int, metrics: Metrics, why_not_ready: Callable[[], str]
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = _REQUEST_S
            server_version, sys_version = "slsnet-archive", ""

            def do_GET(self) -> None:
                why = ""
                if self.path == "/metrics":
                    self._answer(200, metrics.text(), CONTENT_TYPE_LATEST)
                elif self.path == "/health/live":
                    self._answer(200, b"alive\n")
                elif self.path == "/health/ready":
                    why = why_not_ready()
                    self._answer(503 if why else 200, f"{why or 'ready'}\n".encode())
                else:
                    self._answer(404, b"There are /health/live, /health/ready and /metrics.\n")

            def _answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer((host, port), Handler)
        self.port = self._http.server_port
        threading.Thread(
            target=self._http.serve_forever, args=(0.1,), name="health", daemon=True
        ).start()

    def stop(self) -> None:
        """Close the port."""
        self._http.shutdown()
        self._http.server_close()
