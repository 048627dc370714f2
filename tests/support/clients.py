"""Clients of a server that is under load."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx

from tests.support.launch import ServerProcess
from tests.support.samples import Sample
from tests.support.waiting import until

# In a line of the access log that tells of a mask.
_OF_MASK = " /segment 200 "


@dataclass
class Ledger:
    """What became of the requests of one client."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    is_refused: bool = False
    """The port is closed."""


def masks_of(server: ServerProcess, photos: list[Sample]) -> list[bytes]:
    """What it answers to each while it has nothing else to do."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        answers = [client.post("/segment", content=photo.data) for photo in photos]
    masks = [answer.raise_for_status().content for answer in answers]
    # Or nobody would see that two were mixed up.
    assert len(set(masks)) == len(masks)
    return masks


def terminate_under_load(server: ServerProcess, photos: list[Sample]) -> None:
    """End a server that clients send to: it answers all that it takes, and exits with 0."""
    masks = masks_of(server, photos)
    with sending(server, photos, masks) as ledgers:
        until(lambda: all(ledger.right > 2 for ledger in ledgers))
        server.terminate()
        until(lambda: all(ledger.is_refused for ledger in ledgers))
        assert server.wait() == 0
    wrong = [told for ledger in ledgers for told in ledger.wrong]
    told = [line for line in server.log().splitlines() if _OF_MASK not in line]
    assert not wrong, "\n".join([*wrong, *told])


@contextlib.contextmanager
def sending(
    server: ServerProcess, photos: Sequence[Sample], masks: Sequence[bytes]
) -> Iterator[list[Ledger]]:
    """A client for each mask, which sends its photo again and again.

    Each goes on until the port is closed or the block is left; its ledger grows meanwhile.
    """
    stop = threading.Event()

    def send(photo: Sample, mask: bytes, ledger: Ledger) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not stop.is_set() and not ledger.is_refused:
                try:
                    answer = client.post("/segment", content=photo.data)
                except httpx.ConnectError:
                    ledger.is_refused = True
                except httpx.HTTPError as error:
                    ledger.wrong.append(repr(error))
                else:
                    if answer.status_code == 200 and answer.content == mask:
                        ledger.right += 1
                    else:
                        ledger.wrong.append(f"{answer.status_code}")

    with ThreadPoolExecutor(len(masks)) as threads:
        ledgers = [Ledger() for _ in masks]
        clients = [threads.submit(send, *its) for its in zip(photos, masks, ledgers, strict=False)]
        try:
            yield ledgers
        finally:
            stop.set()
        for client in clients:
            client.result()
