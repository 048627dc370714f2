"""
`python -m server`: serve until SIGTERM or SIGINT, then finish what is in flight and exit 0.

The first signal turns readiness off; new requests are still served for a grace period, so that
whoever routes them here can notice. Then the port closes and what is in flight is finished. A
second signal ends at once.
"""

import asyncio
import logging
import socket
import sys
from types import FrameType

import uvicorn

from server.app import create_app
from server.service import Service
from server.settings import read_settings

# Connections that were accepted when the port closes may have a request on its way to be read.
_LAST_REQUESTS_S = 0.2


class _Server(uvicorn.Server):
    """Uvicorn with a drain that loses no request, and exit code 0 after it."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.service: Service | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.service is None or self.service.draining:
            self.force_exit = True
            self.should_exit = True
            return
        self.service.draining = True
        grace_s = self.service.settings.drain_grace_s
        self._loop.call_soon_threadsafe(self._loop.call_later, grace_s, self._stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if not self.force_exit:
            for server in self.servers:
                server.close()
            await asyncio.sleep(_LAST_REQUESTS_S)
        await super().shutdown(sockets)

    def _stop(self) -> None:
        self.should_exit = True


def main() -> int:
    """Run the server; gives the process's exit code."""
    settings = read_settings()
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    failed = False

    def on_failure() -> None:
        nonlocal failed
        failed = True
        server.should_exit = True

    app, service = create_app(settings, on_failure)
    server = _Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(settings.drain_timeout_s),
        )
    )
    server.service = service
    server.run()
    return 1 if failed or not server.started else 0


if __name__ == "__main__":
    sys.exit(main())
