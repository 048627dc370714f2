"""What a feeder and the owner of the network tell each other, over a Unix socket.

Photos are told of in short records, everything else in JSON:

    feeder → owner   PHOTO    run the photo in this slot
                     DROP     nobody waits for the photo in this slot any more
                     RELEASE  this network is not needed any more
                     {"feeder": number}      first of all
                     {"reload": number}      load the networks from their files again
    owner → feeder   ANSWER   the photo in this slot is over; the slot is free
                     {"network": …}          this network serves from now on
                     {"failing": name}       what runs this network fails
                     {"retired": name, "reason": text}       this network cannot serve
                     {"reloaded": number, "error": text or null}

Each PHOTO has exactly one ANSWER, and a slot is used again only after it. So slots are names of
photos, and nothing is mixed up.

Times are seconds of `time.perf_counter`, which all processes of a Linux machine share.
"""

import asyncio
import json
import struct
from collections.abc import Iterable
from typing import Any, cast

__all__ = [
    "ANSWER",
    "BEAT_S",
    "DROP",
    "OUTCOMES",
    "PHOTO",
    "RELEASE",
    "Channel",
    "Record",
]

Record = tuple[int, int, int, int, float, float]
"""Kind, flag, slot, number, and two times:

    PHOTO    flag: bulk             number: of the network     first time: deadline
    DROP     flag: the client left
    RELEASE                         number: of the network
    ANSWER   flag: of `OUTCOMES`    number: photos in the run  times: of its start and end
"""

PHOTO, DROP, RELEASE, ANSWER = range(4)

OUTCOMES = ("served", "dropped", "late", "failed", "unavailable")
"""What may become of a photo."""

BEAT_S = 1.0
"""Seconds within which the owner sends something, so that feeders know that it lives."""

_RECORD = struct.Struct("<BBHIdd")
_HEAD = struct.Struct("<BI")
_RECORDS, _JSON = range(2)

# Far more than all slots' records, or the description of a network.
_LONGEST = 2**20


class Channel(asyncio.Protocol):
    """One end of the connection. It is cut off if what comes is no message."""

    def __init__(self) -> None:
        self.is_lost = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._records: list[bytes] = []
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        self.is_lost = True

    def data_received(self, data: bytes) -> None:
        data = self._received + data
        at = 0
        while len(data) - at >= _HEAD.size:
            kind, length = _HEAD.unpack_from(data, at)
            if kind not in (_RECORDS, _JSON) or length > _LONGEST:
                raise ValueError("what came is no message")
            end = at + _HEAD.size + length
            if end > len(data):
                break
            body = data[at + _HEAD.size : end]
            at = end
            if kind == _RECORDS:
                self.on_records(_RECORD.iter_unpack(body))
            else:
                self.on_message(json.loads(body))
        self._received = data[at:]

    def on_records(self, records: Iterable[Record]) -> None:
        """Records came."""
        raise NotImplementedError

    def on_message(self, message: dict[str, Any]) -> None:
        """A message in JSON came."""
        raise NotImplementedError

    def put(
        self,
        kind: int,
        flag: int = 0,
        slot: int = 0,
        number: int = 0,
        first: float = 0,
        second: float = 0,
    ) -> None:
        """Send a record, with those of the same turn of the event loop."""
        if not self._records:
            self._loop.call_soon(self.flush)
        self._records.append(_RECORD.pack(kind, flag, slot, number, first, second))

    def say(self, message: dict[str, Any]) -> None:
        """Send a message after the records before it."""
        self.flush()
        self._write(_JSON, json.dumps(message).encode())

    def beat(self) -> None:
        """Send an empty message, which says that this process lives."""
        self._write(_RECORDS, b"")

    def flush(self) -> None:
        """Send the records that wait."""
        if self._records:
            records, self._records = b"".join(self._records), []
            self._write(_RECORDS, records)

    def _write(self, kind: int, body: bytes) -> None:
        if self._transport is not None and not self.is_lost:
            self._transport.write(_HEAD.pack(kind, len(body)) + body)

    def cut(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()
