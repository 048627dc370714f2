"""What stands in for Label Studio where a test needs it to answer in a certain way."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

__all__ = ["Studio"]

Answer = tuple[int, dict[str, str], bytes]


class Studio:
    """A web server on 127.0.0.1 whose paths are answered by functions.

    Args:
        paths: for each path what makes its answer of the request's headers.
    """

    def __init__(self, paths: dict[str, Callable[[dict[str, str]], Answer]]) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        """Paths and headers of the requests so far."""
        studio = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                studio.asked.append((self.path, headers))
                path = self.path.partition("?")[0]
                answer = paths[path](headers) if path in paths else (404, {}, b"")
                status, more, body = answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **more}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815 - as the base class calls it

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
