"""`python -m server`: serve until SIGTERM or SIGINT, then finish what is in flight and exit 0.

The first signal turns readiness off; new requests are still served for a grace period, so that
whoever routes them here can notice. Then the port closes and what is in flight is finished. A
second signal ends at once, with what a shell says of a process ended by it. SIGHUP loads the
network, and the TLS certificate, from their files again.
"""

import asyncio
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from types import FrameType
from typing import Any

import uvicorn

from server.app import create_app
from server.backends import BackendError
from server.connections import Connection, House
from server.keys import KeyFileError
from server.service import Service
from server.settings import read_settings

log = logging.getLogger("slsnet.server")

# Files that are open beside connections.
_OTHER_FILES = 512

# Who connected before the port closed may take this long to send what they connected for.
_LAST_REQUESTS_S = 0.5


class _Server(uvicorn.Server):
    """Uvicorn with a drain that loses no request, and exit code 0 after it."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._house = House(service.settings, service.metrics)
        self._reloading: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._service.draining:
            os._exit(128 + sig)
        self._service.draining = True
        grace_s = self._service.settings.drain_grace_s
        self._loop.call_soon_threadsafe(self._loop.call_later, grace_s, self._stop)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    @property
    def _tls(self) -> dict[str, Any]:
        if self.config.ssl is None:
            return {}
        timeout_s = self._service.settings.head_timeout_s
        return {"ssl": self.config.ssl, "ssl_handshake_timeout": timeout_s}

    async def _reload(self) -> None:
        settings = self._service.settings
        try:
            if self.config.ssl is not None and settings.tls_cert is not None:
                self.config.ssl.load_cert_chain(settings.tls_cert, settings.tls_key)
            await self.lifespan.state["reload"]()
        except (BackendError, OSError) as error:
            log.error("nothing is changed: %s", error)

    def _on_hangup(self) -> None:
        self._reloading = self._loop.create_task(self._reload())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(1)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        self.servers = [
            await self._loop.create_server(
                self._protocol, sock=listener, backlog=self.config.backlog, **self._tls
            )
            for listener in sockets or []
        ]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or []:
            await self._accept_backlog(listener)
        await asyncio.sleep(_LAST_REQUESTS_S)
        await super().shutdown(sockets)

    async def _accept_backlog(self, listener: socket.socket) -> None:
        """Take in who has connected already, then close: closing alone would reset them."""
        waiting: list[socket.socket] = []
        listener.setblocking(False)
        try:
            while True:
                waiting.append(listener.accept()[0])
        except BlockingIOError:
            pass
        for server in self.servers:
            server.close()
        listener.close()
        for connection in waiting:
            connection.setblocking(False)
            await self._loop.connect_accepted_socket(self._protocol, connection, **self._tls)

    def _protocol(self) -> asyncio.Protocol:
        return Connection(self._house, self.config, self.server_state, self.lifespan.state)

    def _stop(self) -> None:
        self.should_exit = True


def _set_up_log(level: str) -> None:
    """Of other packages warnings alone: at debug level Pillow writes what a photo's EXIF says."""
    logging.basicConfig(
        level=max(logging.WARNING, logging.getLevelNamesMapping()[level]),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    for name in ("slsnet", "uvicorn"):
        logging.getLogger(name).setLevel(level)


def _allow_files(wanted: int) -> None:
    """Raise the limit of open files as far as it may be and needs to be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted and soft != resource.RLIM_INFINITY:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # `::` is every address, those of IPv4 too.
    both = host == "::" and socket.has_dualstack_ipv6()
    listener = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    log.info("listening on %s port %d", host, listener.getsockname()[1])
    return listener


def main() -> int:
    """Run the server; gives the process's exit code."""
    settings = read_settings()
    _set_up_log(settings.log_level.upper())
    _allow_files(settings.max_connections + _OTHER_FILES)
    failed = False

    def on_failure() -> None:
        nonlocal failed
        failed = True
        server.should_exit = True

    try:
        if settings.backend != "torch":
            # It is loaded once the port is open; a wrong path need not wait for that.
            settings.model.open("rb").close()
    except OSError as error:
        log.error("the network cannot be read, look at --model (SLSNET_MODEL): %s", error)
        return 1
    try:
        app, service = create_app(settings, on_failure)
    except KeyFileError as error:
        log.error("%s", error)
        return 1
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=round(settings.drain_timeout_s),
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        ssl_ca_certs=settings.tls_client_ca and str(settings.tls_client_ca),
        ssl_cert_reqs=ssl.CERT_REQUIRED if settings.tls_client_ca else ssl.CERT_NONE,
    )
    try:
        config.load()
    except OSError as error:
        log.error("TLS cannot be set up, look at --tls-cert and its kin: %s", error)
        return 1
    try:
        listener = _listen(settings.host, settings.port)
    except OSError as error:
        log.error(
            "cannot listen on %s port %d, look at --host and --port: %s",
            settings.host,
            settings.port,
            error.strerror or error,
        )
        return 1
    server = _Server(config, service)
    server.run([listener])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
