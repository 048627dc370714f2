"""A client's connection once it speaks WebSocket, with limits on its time and its bytes.

Uvicorn and websockets speak the protocol, for a connection that `server.process.connections` hands
over. Added here is what bounds it whatever the client does:

- bytes of a frame that is not whole yet count in the same budget as those of bodies
- a client that does not read, or does not answer a ping within twice `stall_timeout_s`, is cut off
- a connection that is being closed is gone soon after; until then what comes is thrown away, since
  closing at once would reset it, and the close frame that says why would be lost

A server that stops lets the frame at work be answered, and the application close.
"""

import asyncio
import contextlib
import logging
from typing import Any

from uvicorn._types import ASGISendEvent
from uvicorn.config import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import CloseCode

from server.inference.budgets import ByteBudget
from server.observe.metrics import Metrics
from server.settings import Settings

__all__ = ["Stream"]

# A client may take this long to read why it is closed.
_FAREWELL_S = 2

_RESTARTS = 1012

# By default both would log, with addresses and queries, and at debug level bytes of frames.
_quiet = logging.getLogger("slsnet.server.websocket")
_quiet.setLevel(logging.ERROR)


class _MemoryFullError(Exception):
    """The bytes in flight fill the memory set aside for them."""


class Stream(WebSocketsSansIOProtocol):
    """Uvicorn's protocol with limits; see the module's description."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        settings: Settings,
        metrics: Metrics,
        budget: ByteBudget,
    ) -> None:
        """Take over a connection.

        Args:
            budget: for bytes of frames that are not whole yet.
        """
        super().__init__(config, server_state, app_state)
        self.logger = self.conn.logger = _quiet
        self.conn.debug = False
        self._settings = settings
        self._metrics = metrics
        self._held = contextlib.ExitStack()
        self._take = self._held.enter_context(budget.account(_MemoryFullError))
        self._partial_bytes = 0
        self._has_failed = False
        self._write_timer: asyncio.TimerHandle | None = None
        self._farewell: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._write_timer, self._farewell):
            if timer is not None:
                timer.cancel()
        self._held.close()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._has_failed:
            return
        try:
            self._take(len(data))
        except _MemoryFullError:
            self.conn.fail(CloseCode.TRY_AGAIN_LATER, "the frames in flight fill the memory")
            self.handle_parser_exception()
            return
        self._partial_bytes += len(data)
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.transport.is_closing():
            # Uvicorn leaves such a client without an answer.
            self._has_failed = True
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    def send_receive_event_to_app(self) -> None:
        self._give_back()
        super().send_receive_event_to_app()

    def _give_back(self) -> None:
        self._take(-self._partial_bytes)
        self._partial_bytes = 0

    def handle_parser_exception(self) -> None:
        """Say why in the close frame, and leave the client time to read it."""
        close = self.conn.close_sent
        self._has_failed = True
        if self.close_sent or close is None:
            return
        self._metrics.connections_refused.labels(f"stream_{close.code}").inc()
        self._give_back()
        self.queue.put_nowait(
            {"type": "websocket.disconnect", "code": close.code, "reason": close.reason}
        )
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.close_timer = self.loop.call_later(_FAREWELL_S, self.transport.close)
        self._end_soon()

    def handle_close(self, event: Any) -> None:
        super().handle_close(event)
        self._end_soon()

    def keepalive_timeout(self) -> None:
        self._metrics.connections_refused.labels("answer_not_read").inc()
        super().keepalive_timeout()
        self._end_soon()

    async def send(self, message: ASGISendEvent) -> None:
        await super().send(message)
        if message["type"] == "websocket.close":
            self._end_soon()

    def shutdown(self) -> None:
        if self.close_sent or not self.handshake_complete:
            super().shutdown()
            return
        self.stop_keepalive()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": _RESTARTS})

    def _end_soon(self) -> None:
        """Cut it off if it is still there after the farewell."""
        if self._farewell is None and not self.disconnected:
            self._farewell = self.loop.call_later(_FAREWELL_S + 1, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._watch_writing()

    def _watch_writing(self) -> None:
        self._write_timer = self.loop.call_later(
            self._settings.stall_timeout_s,
            self._check_writing,
            self.transport.get_write_buffer_size(),
        )

    def _check_writing(self, before: int) -> None:
        self._write_timer = None
        if self.writable.is_set():
            return
        settings = self._settings
        sent = before - self.transport.get_write_buffer_size()
        if sent < settings.min_bytes_per_s * settings.stall_timeout_s:
            self._metrics.connections_refused.labels("answer_not_read").inc()
            self.transport.abort()
        else:
            self._watch_writing()
