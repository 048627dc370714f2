"""One process that serves until SIGTERM or SIGINT, then finishes what is in flight and exits 0.

The first signal turns readiness off. New requests are still served for a grace period, so that
routers can notice. Then the port closes and what is in flight is finished. A second signal ends the
process at once, with the exit code that a shell gives for that signal. SIGHUP loads the network and
the TLS certificate from their files again.

It may be the only process, or one of several on one port (`server.process.supervisor`).

It is hand-written around uvicorn's `Server`, which has no grace period, resets clients that wait in
its backlog when it stops, and cannot count connections during their TLS handshake.
"""

import asyncio
import contextlib
import gc
import logging
import math
import os
import resource
import shutil
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.types import ASGIApp

from server.backends import BackendError
from server.http.app import create_app
from server.http.shedding import Door
from server.inference.service import Service
from server.inference.sharing.feeder import Address
from server.keys import KeyFileError
from server.observe.logs import configure, silence_libtiff
from server.observe.shared_metrics import SHARED_FOLDER, mark_accepting, others_accept
from server.process.child import ALL_STOP, end_after, hold_signals, outlives
from server.process.connections import WANTED_ON_TOP, Connection, House
from server.process.port import refuse_newcomers
from server.settings import Settings, read_settings

if TYPE_CHECKING:
    from server.rpc.listener import Listener

__all__ = ["run"]

log = logging.getLogger("slsnet.server")

# Connections accepted at a time, before the others are read again.
_AT_ONCE = 4

# Seconds without accepting connections when files or memory are short.
_PAUSE_S = 0.2

# Seconds in which a worker loads its networks before it accepts connections though no other one
# does, and between two looks at how far they are.
_FIRST_LOAD_S = 10.0
_LOOK_S = 0.01

# Seconds in which what a client's connection still lacks arrives, while no other one can begin.
_LAST_ACKS_S = 0.2

# Seconds in which clients that connected before the port closed may send their request.
_LAST_REQUESTS_S = 0.5

LAST_HANDSHAKES_S = 1.0
"""Seconds for the TLS handshake of a client that connects while the port closes."""

# Seconds before the drain's timeout at which the unfinished photos of a request with several are
# given up, so that its answer can end properly.
_LAST_ANSWERS_S = 5.0

# Seconds beyond all of these and the drain's timeout, for what is closed after it.
_MARGIN_S = 3.0


class _Server(uvicorn.Server):
    """Uvicorn with a drain that loses no request, and exit code 0 after it."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        held: list[int],
        *,
        feeds: bool = False,
        shares_port: bool = False,
    ) -> None:
        """Serve with `service`; if it feeds another process, that one reloads the network."""
        super().__init__(config)
        self._service = service
        self._held = held
        self._feeds = feeds
        self._shares_port = shares_port
        self._closes_port = not shares_port
        door = Door(service)
        self._house = House(
            service.settings, service.metrics, door.refuses, service.gate.body_bytes
        )
        self._grpc = _grpc_listener(config, service, door, self.server_state.tasks)
        self.servers = []
        self._reloading: asyncio.Task[None] | None = None

    def warn_of_limit(self) -> None:
        """Warn if fewer connections are held than the setting asks for."""
        most, asked = self._house.most, self._service.settings.max_connections
        if most < asked:
            files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            log.warning(
                "%d connections are held, not the %d of --max-connections: the system allows %d"
                " open files (ulimit -n)",
                most,
                asked,
                files,
            )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._service.drain.begun:
            os._exit(128 + sig)
        self._drain()

    def _drain(self) -> None:
        if self._service.drain.begun:
            return
        self._service.drain.begin()
        grace_s = self._service.settings.drain_grace_s
        self._loop.call_soon_threadsafe(self._loop.call_later, grace_s, self._stop)

    def _drain_with_all(self) -> None:
        self._closes_port = True
        self._drain()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def _reload(self) -> None:
        settings = self._service.settings
        if self.config.ssl is not None and settings.tls_cert is not None:
            try:
                # It is tried apart first: a failure would leave half of it in use.
                for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.config.ssl):
                    context.load_cert_chain(settings.tls_cert, settings.tls_key)
                if self._grpc is not None:
                    self._grpc.reload()
            except OSError as error:
                log.error("the certificate is not changed: %s", error)
        if self._feeds:
            return
        # The log has what went wrong.
        with contextlib.suppress(BackendError, OSError):
            await self.lifespan.state["reload"]()

    def _on_hangup(self) -> None:
        self._reloading = self._loop.create_task(self._reload())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(1)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        self._loop.add_signal_handler(ALL_STOP, self._drain_with_all)
        if signal.SIGHUP in self._held:
            self._on_hangup()
        if ALL_STOP in self._held:
            self._drain_with_all()
        elif set(self._held) - {signal.SIGHUP}:
            self._drain()
        if self._shares_port:
            await self._wait_for_networks()
        if self._grpc is not None and not self.should_exit:
            try:
                await self._grpc.start()
            except OSError as error:
                log.error("%s", error)
                # Else the loop's end would cancel it, with a traceback.
                await self.lifespan.shutdown()
                sys.exit(1)
        for listener in sockets or []:
            listener.setblocking(False)
            listener.listen(self.config.backlog)
            if not self.should_exit:
                self._listen(listener)
        if self._shares_port and not self.should_exit:
            mark_accepting(accepts=True)
        # All objects made by now stay: no garbage collection need go through them again.
        gc.freeze()
        self.started = True

    async def _wait_for_networks(self) -> None:
        """Leave connections to the workers that have their networks, until this one has its own.

        If there are no others it does not wait for long: somebody has to say that the server lives.
        It is the same for one that is told to stop as it starts: the others still serve then.
        """
        give_up = self._loop.time() + _FIRST_LOAD_S
        has_told = False
        while self._service.networks.are_loading and not self.should_exit:
            is_late = self._loop.time() > give_up
            if is_late and not others_accept():
                break
            if is_late and not has_told:
                log.warning(
                    "the networks are still being loaded: until then only other workers"
                    " accept connections"
                )
                has_told = True
            await asyncio.sleep(_LOOK_S)

    def _listen(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Accept connections here: asyncio's own server does not show those at a TLS handshake."""
        for _ in range(_AT_ONCE):
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                # This one has given up.
                continue
            except OSError as error:
                log.error("nobody is accepted for %g s: %s", _PAUSE_S, error)
                self._house.metrics.connections_refused.labels("no_file").inc()
                self._loop.remove_reader(listener)
                self._loop.call_later(_PAUSE_S, self._listen, listener)
                return
            self._take_in(connection, self._service.settings.head_timeout_s)
            self._house.make_room(len(self.server_state.connections))

    def _take_in(self, accepted: socket.socket, handshake_timeout_s: float) -> None:
        accepted.setblocking(False)
        options: dict[str, Any] = {}
        if self.config.ssl is not None:
            options = {"ssl": self.config.ssl, "ssl_handshake_timeout": handshake_timeout_s}
        connection = Connection(self._house, self.config, self.server_state, self.lifespan.state)
        arrival = self._loop.create_task(
            self._loop.connect_accepted_socket(lambda: connection, accepted, **options)
        )
        self._house.arriving[connection] = arrival

        def arrived(_: asyncio.Task[Any]) -> None:
            self._house.arriving.pop(connection, None)
            if arrival.cancelled():
                # If the handshake had not begun, nobody else closes this.
                accepted.close()
            elif error := arrival.exception():
                accepted.close()
                timed_out = isinstance(error, ConnectionAbortedError)
                if timed_out or isinstance(error, ssl.SSLError):
                    reason = "handshake_timeout" if timed_out else "handshake_failed"
                    self._house.metrics.connections_refused.labels(reason).inc()

        arrival.add_done_callback(arrived)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Else a client could connect between the last accept and the end of the port.
        if self._closes_port and all(map(refuse_newcomers, sockets or [])):
            await asyncio.sleep(_LAST_ACKS_S)
        can_answer = not self._service.networks.are_loading
        if self._shares_port:
            mark_accepting(accepts=False)
            if self._closes_port and not can_answer:
                # Those who can answer go first. If there are none, somebody has to say so.
                await asyncio.sleep(_LAST_REQUESTS_S)
        for listener in sockets or []:
            self._loop.remove_reader(listener)
            if self._closes_port or can_answer:
                await self._accept_backlog(listener)
            else:
                # Nothing is reset: the others have the socket too.
                listener.close()
        await asyncio.sleep(_LAST_REQUESTS_S)
        timeout_s = self._service.settings.drain_timeout_s
        give_up_s = max(timeout_s - _LAST_ANSWERS_S, timeout_s / 2)
        self._loop.call_later(give_up_s, self._service.drain.give_up)
        if self._grpc is not None:
            # Uvicorn waits for it, as for a request, before it closes the service.
            stopping = self._loop.create_task(self._grpc.stop(timeout_s))
            self.server_state.tasks.add(stopping)
            stopping.add_done_callback(self.server_state.tasks.discard)
        await super().shutdown(sockets)

    async def _accept_backlog(self, listener: socket.socket) -> None:
        """Accept waiting connections, then close the port: closing alone would reset them."""
        listener.setblocking(False)
        while True:
            try:
                self._take_in(listener.accept()[0], LAST_HANDSHAKES_S)
            except BlockingIOError:
                break
            except ConnectionAbortedError:
                # This one has given up.
                continue
            except OSError as error:
                log.error("the last connections are not answered: %s", error)
                break
        listener.close()
        # Wait for all at once, since some may send nothing.
        if arrivals := set(self._house.arriving.values()):
            _, late = await asyncio.wait(arrivals, timeout=LAST_HANDSHAKES_S)
            for arrival in late:
                arrival.cancel()

    def _stop(self) -> None:
        self.should_exit = True
        patience_s = _LAST_ACKS_S + LAST_HANDSHAKES_S + _LAST_REQUESTS_S + _MARGIN_S
        patience_s += math.ceil(self._service.settings.drain_timeout_s)
        end_after(patience_s)


def _grpc_listener(
    config: uvicorn.Config, service: Service, door: Door, tasks: set[asyncio.Task[None]]
) -> "Listener | None":
    """The port of gRPC, if it is wanted."""
    if service.settings.grpc_port is None:
        return None
    # Its packages are optional, and are only loaded here.
    try:
        from server.rpc.bridge import Bridge
        from server.rpc.listener import Listener
    except ImportError as error:
        log.error("--grpc-port needs `pip install -r requirements-grpc.txt`: %s", error)
        sys.exit(1)

    scheme = "https" if service.settings.tls_cert else "http"
    return Listener(service.settings, Bridge(config.loaded_app, door.refuses, tasks, scheme))


def _allow_files(wanted: int) -> None:
    """Raise the limit of open files as far as is needed and allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted and soft != resource.RLIM_INFINITY:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        # A connection takes `server.process.streams` for a WebSocket, and uvicorn none.
        ws="none",
        ws_max_size=settings.stream_frame_bytes,
        ws_ping_interval=settings.stall_timeout_s,
        ws_ping_timeout=2 * settings.stall_timeout_s,
        # Photos are compressed already, and what is small could unpack to much.
        ws_per_message_deflate=False,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s),
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        ssl_ca_certs=settings.tls_client_ca and str(settings.tls_client_ca),
        ssl_cert_reqs=ssl.CERT_REQUIRED if settings.tls_client_ca else ssl.CERT_NONE,
    )


def run(
    settings: Settings,
    listener: socket.socket,
    held: list[int],
    on_reloaded: Callable[[], None] = lambda: None,
    owner: Address | None = None,
    *,
    shares_port: bool = False,
) -> int:
    """Serve; return the process's exit code.

    Args:
        settings: the server's settings.
        listener: the socket to accept connections from.
        held: signals that have come by now, and those that come until the server handles them.
        on_reloaded: called when an administrator has reloaded the network.
        owner: runs the network; None if this process does.
        shares_port: other processes accept from the listener too, and may go on when this one ends.
    """
    _allow_files(settings.max_connections + WANTED_ON_TOP)
    silence_libtiff()
    failed = False

    def on_failure() -> None:
        nonlocal failed
        failed = True
        server.should_exit = True

    try:
        app, service = create_app(settings, on_failure, on_reloaded, owner)
    except (KeyFileError, RuntimeError) as error:
        log.error("%s", error)
        return 1
    config = _config(app, settings)
    try:
        config.load()
    except OSError as error:
        log.error("TLS cannot be set up, look at --tls-cert and the other --tls flags: %s", error)
        return 1
    server = _Server(config, service, held, feeds=owner is not None, shares_port=shares_port)
    server.warn_of_limit()
    server.run([listener])
    return 1 if failed else 0


def main() -> int:
    """`python -m server.process.worker SUPERVISOR LISTENER OWNER FLAGS…`, as it is started.

    OWNER is the address of the network's process, or empty.
    """
    supervisor, listener = int(sys.argv[1]), int(sys.argv[2])
    owner = Address.parse(sys.argv[3]) if sys.argv[3] else None
    settings = read_settings(sys.argv[4:])
    configure(settings.log_level, settings.log_format)
    # However the supervisor ends, its workers drain and end too.
    if outlives(supervisor):
        return 1
    code = run(
        settings,
        socket.socket(fileno=listener),
        hold_signals(),
        lambda: os.kill(supervisor, signal.SIGHUP),
        owner,
        shares_port=True,
    )
    if os.getppid() != supervisor:
        # No other process is left to remove it.
        shutil.rmtree(os.environ[SHARED_FOLDER], ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
