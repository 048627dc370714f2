"""Takes photos by C-STORE, and answers C-ECHO.

Success is answered once the object is in the journal. If there is no room, the answer is that
resources are out (A700), so that the sender keeps the object and comes again.
"""

import logging
import socket
import socketserver
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

from pydicom import uid
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from server.archive.journal import Accepted, Journal, JournalFull

__all__ = ["PHOTOS", "Allowed", "Limits", "Receiver", "silence"]

log = logging.getLogger("slsnet.archive")

PHOTOS = {
    str(kind): kind.name
    for kind in (
        uid.VLPhotographicImageStorage,
        uid.DermoscopicPhotographyImageStorage,
        uid.SecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
    )
}
"""SOP classes that are taken; the server says more of each."""

_ENCODINGS = [
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.JPEGBaseline8Bit,
    uid.JPEGExtended12Bit,
    uid.JPEGLossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEGLSNearLossless,
    uid.JPEG2000Lossless,
    uid.JPEG2000,
    uid.RLELossless,
]

_VERIFICATION = "1.2.840.10008.1.1"
"""The SOP class of C-ECHO."""

_SUCCESS = 0x0000
_NOT_AUTHORISED = 0x0124
_OUT_OF_RESOURCES = 0xA700
_TOO_LARGE = 0xC000

# Bytes of a piece (PDU) that is read whole before anything looks at it. Peers are asked for less.
_MOST_PDU = 1 << 20
_ASKED_PDU = 1 << 17


@dataclass(frozen=True)
class Allowed:
    """A peer that may send."""

    title: str
    address: str | None
    """None for any."""

    @classmethod
    def of(cls, text: str) -> Self:
        """Read `TITLE` or `TITLE@ADDRESS`.

        Raises:
            ValueError: it has no title, or too long a one.
        """
        title, _, address = text.partition("@")
        if not 0 < len(title) <= 16:
            raise ValueError(f"{text!r} is not TITLE or TITLE@ADDRESS")
        return cls(title, address or None)


def silence() -> None:
    """Keep what pydicom and pynetdicom say of an object out of the log: names may be in it."""
    warnings.filterwarnings("ignore", module=r"pydicom|pynetdicom")
    for name in ("pydicom", "pynetdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    # They would make text of every message, for nobody.
    _config.LOG_HANDLER_LEVEL = "none"


class _Handler(RequestHandler):
    """Reads no piece of a length that only a hostile peer would send."""

    def _create_association(self) -> Association:
        association = super()._create_association()
        connection = association.dul.socket
        assert connection is not None
        read = connection.recv

        def bounded(nr_bytes: int) -> bytearray:
            if nr_bytes > _MOST_PDU:
                raise OSError(f"A PDU has {nr_bytes} bytes.")
            return read(nr_bytes)

        # pynetdicom would read whatever length the peer names, and has no limit to set.
        connection.recv = bounded  # type: ignore[method-assign]
        return association


class _Listener(ThreadedAssociationServer):
    """Has so many connections at most, from known addresses."""

    def __init__(
        self,
        *arguments: Any,
        most: int,
        addresses: frozenset[str] | None,
        idle_s: float,
        **options: Any,
    ) -> None:
        self._most = most
        self._addresses = addresses
        self._idle_s = idle_s
        super().__init__(*arguments, **options)

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        connection, address = super().get_request()
        # A peer that stops within a piece does not hold its thread for ever.
        connection.settimeout(self._idle_s)
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
        known = self._addresses is None or _plain(client_address[0]) in self._addresses
        # Those above the entity's own limit are told so; those far above it are cut off.
        return known and len(self.active_associations) < 2 * self._most

    def shutdown(self) -> None:
        """Take no more connections; those that are there go on."""
        socketserver.BaseServer.shutdown(self)
        self.server_close()


def _plain(address: str) -> str:
    return address.removeprefix("::ffff:")


@dataclass(frozen=True)
class Limits:
    """What senders may take up."""

    object_bytes: int = 64 << 20
    associations: int = 10
    idle_s: float = 60
    """Seconds without a word, after which an association is ended."""


class Receiver:
    """Listens, in threads of its own.

    Args:
        journal: where objects go.
        title: own title; peers have to call it.
        peers: those that may send; empty for all.
        limits: of what they send.
        counted: called with what became of an object, or a request.
        arrived: called once there is a new object in the journal.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        title: str,
        peers: Sequence[Allowed],
        limits: Limits,
        counted: Callable[[str], None],
        arrived: Callable[[], None],
    ) -> None:
        self._journal = journal
        self._peers = peers
        self._limits = limits
        self._counted = counted
        self._arrived = arrived
        self._entity = entity = AE(ae_title=title)
        entity.require_called_aet = True
        entity.require_calling_aet = sorted({peer.title for peer in peers})
        entity.maximum_associations = limits.associations
        entity.maximum_pdu_size = _ASKED_PDU
        entity.network_timeout = entity.dimse_timeout = limits.idle_s
        entity.acse_timeout = min(30, limits.idle_s)
        entity.add_supported_context(_VERIFICATION)
        for kind in PHOTOS:
            entity.add_supported_context(kind, _ENCODINGS)
        self._listener: _Listener | None = None

    def start(self, host: str, port: int) -> int:
        """Listen; return the port.

        Raises:
            OSError: the port cannot be had.
        """
        addresses = frozenset(peer.address for peer in self._peers if peer.address)
        is_open = any(peer.address is None for peer in self._peers) or not self._peers
        listener = _Listener(
            *(self._entity, (host, port), self._entity.ae_title, self._entity.supported_contexts),
            evt_handlers=[
                (evt.EVT_C_STORE, self._store),
                (evt.EVT_C_ECHO, self._echo),
                (evt.EVT_PDU_RECV, self._check_size),
                (evt.EVT_REJECTED, lambda _: self._counted("rejected")),
            ],
            request_handler=_Handler,
            most=self._limits.associations,
            addresses=None if is_open else addresses,
            idle_s=self._limits.idle_s,
        )
        threading.Thread(
            target=listener.serve_forever, args=(0.1,), name="dicom-listener", daemon=True
        ).start()
        self._listener = listener
        return int(listener.server_address[1])

    @property
    def listens(self) -> bool:
        """Whether new associations are taken."""
        return self._listener is not None

    @property
    def associations(self) -> int:
        """How many there are now."""
        return len(self._listener.active_associations) if self._listener else 0

    def stop(self, grace_s: float) -> None:
        """Take no new associations, and end those that are still there after so many seconds."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        listener.shutdown()
        ends = time.monotonic() + grace_s
        while listener.active_associations and time.monotonic() < ends:
            time.sleep(0.02)
        for association in listener.active_associations:
            association.abort()

    def _is_allowed(self, event: evt.Event) -> bool:
        if not self._peers:
            return True
        requestor = event.assoc.requestor
        title, address = requestor.ae_title.strip(), _plain(str(requestor.address))
        return any(peer.title == title and peer.address in (None, address) for peer in self._peers)

    def _echo(self, event: evt.Event) -> int:
        return _SUCCESS if self._is_allowed(event) else _NOT_AUTHORISED

    def _check_size(self, event: evt.Event) -> None:
        """End an association whose object grows too large while it comes."""
        message = event.assoc.dimse.message
        size = message.data_set.tell() if message and message.data_set else 0
        if size > self._limits.object_bytes:
            log.warning(
                "an object of more than %d bytes is refused, look at --max-object-bytes",
                self._limits.object_bytes,
            )
            self._counted("too_large")
            event.assoc.abort()

    def _store(self, event: evt.Event) -> int:
        if not self._is_allowed(event):
            self._counted("not_allowed")
            return _NOT_AUTHORISED
        request = cast(C_STORE, event.request)
        content = event.encoded_dataset()
        if len(content) > self._limits.object_bytes:
            self._counted("too_large")
            return _TOO_LARGE
        try:
            became, number = self._journal.accept(str(request.AffectedSOPInstanceUID), content)
        except JournalFull as full:
            log.warning("an object is refused for now: %s", full)
            self._counted("full")
            return _OUT_OF_RESOURCES
        except sqlite3.Error as error:
            log.error("an object is refused for now, the journal fails: %s", error)
            self._counted("failed")
            return _OUT_OF_RESOURCES
        self._counted(became.value)
        if became is Accepted.NEW:
            kind = PHOTOS.get(str(request.AffectedSOPClassUID), "?")
            log.info("object %d came: %s, %d bytes", number, kind, len(content))
            self._arrived()
        return _SUCCESS
