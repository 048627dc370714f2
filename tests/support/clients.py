"""Clients of a server that is under load."""

import threading
from dataclasses import dataclass

import httpx

from tests.support.launch import ServerProcess
from tests.support.samples import Sample


@dataclass
class Ledger:
    """What became of the requests of one client."""

    answered: int = 0
    refused: bool = False
    lost: str = ""


def masks_of(server: ServerProcess, photos: list[Sample]) -> list[bytes]:
    """What it answers to each while it has nothing else to do."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        answers = [client.post("/segment", content=photo.data) for photo in photos]
    masks = [answer.raise_for_status().content for answer in answers]
    # Or nobody would see that two were mixed up.
    assert len(set(masks)) == len(masks)
    return masks


def keep_sending(
    server: ServerProcess, photo: Sample, mask: bytes, started: threading.Event
) -> Ledger:
    """Send until the port is closed."""
    ledger = Ledger()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while not ledger.refused and not ledger.lost:
            try:
                response = client.post("/segment", files={"file": photo.data})
            except httpx.ConnectError:
                ledger.refused = True
            except httpx.HTTPError as error:
                ledger.lost = repr(error)
            else:
                assert response.status_code == 200
                assert response.content == mask
                ledger.answered += 1
                started.set()
    return ledger
