"""Stores objects by C-STORE at another application entity."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Self

import pydicom
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.transport import AssociationSocket

from server.archive.failures import Failure

__all__ = ["Peer", "Sender"]

_SUCCESS, _DUPLICATE, _PROCESSING_FAILURE = 0x0000, 0x0111, 0x0110

# Of PS3.4, B.2.3: stored, with a remark; and out of resources.
_WARNINGS = range(0xB000, 0xC000)
_OUT_OF_RESOURCES = range(0xA700, 0xA800)

_PEER = re.compile(r"(?P<title>[\x21-\x5b\x5d-\x7e]{1,16})@(?P<host>.+):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class Peer:
    """An application entity."""

    title: str
    host: str
    port: int

    @classmethod
    def of(cls, text: str) -> Self:
        """Read `TITLE@HOST:PORT`.

        Raises:
            ValueError: it is none.
        """
        found = _PEER.fullmatch(text)
        if not found or not 0 < int(found["port"]) < 65536:
            raise ValueError(f"{text} is not TITLE@HOST:PORT, with a title of 16 characters")
        return cls(found["title"], found["host"].strip("[]"), int(found["port"]))


class Sender:
    """Sends to one application entity, by an association for each call.

    Args:
        peer: the application entity that stores.
        title: own title, to call with.
        timeout_s: seconds within which it has to answer.
    """

    def __init__(self, peer: Peer, title: str, *, timeout_s: float = 60) -> None:
        self._peer = peer
        self._title = title
        self._timeout_s = timeout_s

    async def store(self, contents: Sequence[bytes]) -> None:
        """Store objects, one after the other.

        Raises:
            Failure: it does not hold all of them. They may be sent again.
        """
        sending = _Sending()
        work = (sending, self._peer, self._title, contents, self._timeout_s)
        try:
            await asyncio.to_thread(_send, *work)
        finally:
            # If this is cancelled, the thread would wait for the peer, and the process for it.
            sending.give_up()

    async def aclose(self) -> None:
        """There is nothing to close between two calls."""


class _Sending:
    """The connection of one call, which another thread may end."""

    def __init__(self) -> None:
        self._is_given_up = False
        self._connection: AssociationSocket | None = None

    def opened(self, event: evt.Event) -> None:
        """Keep the connection; called by pynetdicom once it is made."""
        self._connection = event.assoc.dul.socket
        if self._is_given_up:
            self.give_up()

    def give_up(self) -> None:
        """End the connection, if there still is one."""
        self._is_given_up = True
        if self._connection is not None and (connected := self._connection.socket) is not None:
            self._connection.close()
            # pynetdicom leaves it to the garbage collector if the peer went first.
            connected.close()


def _send(
    sending: _Sending, peer: Peer, own_title: str, contents: Sequence[bytes], timeout_s: float
) -> None:
    datasets = [pydicom.dcmread(BytesIO(content)) for content in contents]
    entity = AE(ae_title=own_title)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = timeout_s
    entity.connection_timeout = 10
    for kind in sorted({_kind(dataset) for dataset in datasets}):
        entity.add_requested_context(*kind)
    association = entity.associate(
        peer.host,
        peer.port,
        ae_title=peer.title,
        evt_handlers=[(evt.EVT_CONN_OPEN, sending.opened)],
    )
    try:
        _send_over(association, datasets)
    finally:
        if association.is_established:
            association.release()


def _send_over(association: Association, datasets: Sequence[Dataset]) -> None:
    if association.is_rejected:
        # Also for too many associations, or a title that is not known yet.
        raise Failure("key_refused", "The peer rejects the association.")
    if association.rejected_contexts and not association.accepted_contexts:
        raise Failure("refused", "The peer takes no object of these kinds.", final=True)
    if not association.is_established:
        raise Failure("unreachable", "The peer is not reached.")
    for dataset in datasets:
        try:
            status = association.send_c_store(dataset)
        except ValueError as error:
            raise Failure(
                "refused",
                f"The peer does not take {dataset.SOPClassUID.name} in this encoding.",
                final=True,
            ) from error
        except RuntimeError as error:
            raise Failure("unreachable", "The peer ended the association.") from error
        _check(status)


def _kind(dataset: Dataset) -> tuple[str, str]:
    return str(dataset.SOPClassUID), str(dataset.file_meta.TransferSyntaxUID)


def _check(status: Dataset) -> None:
    if "Status" not in status:
        raise Failure("timeout", "The peer does not answer, or ended the association.")
    code = int(status.Status)
    if code in (_SUCCESS, _DUPLICATE) or code in _WARNINGS:
        return
    busy = code in _OUT_OF_RESOURCES or code == _PROCESSING_FAILURE
    raise Failure(
        "busy" if busy else "refused", f"The peer answers status {code:04X}.", final=not busy
    )
