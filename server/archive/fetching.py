"""Objects that an archive holds → the journal."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from server.archive.dicomweb import Archive, Instance
from server.archive.failures import Failure
from server.archive.journal import Accepted, Journal, JournalFull
from server.archive.metrics import Metrics
from server.archive.receiver import PHOTOS
from server.archive.relay import Patience, Relay

__all__ = ["Fetched", "fetch"]

log = logging.getLogger("slsnet.archive")

# Attempts at an object that the archive does not give.
_ATTEMPTS = 5

# Seconds between two looks whether the journal has room, or is empty.
_LOOK_S = 0.2


@dataclass
class Fetched:
    """What came of a search, in numbers of objects."""

    found: int = 0
    others: int = 0
    """Objects that are no photos."""
    known: int = 0
    """Photos that were fetched before, and results."""
    taken: int = 0
    failed: int = 0


async def fetch(
    archive: Archive,
    query: Mapping[str, str],
    journal: Journal,
    relay: Relay,
    metrics: Metrics,
    patience: Patience,
) -> Fetched:
    """Take what matches into the journal, and wait until nothing is left to be done there.

    Args:
        archive: where to look.
        query: as for `Archive.search`.
        journal: takes each object as if it had come by C-STORE.
        relay: works on it meanwhile.
        metrics: counts objects.
        patience: when to ask again for an object.

    Raises:
        Failure: the archive cannot be searched.
    """
    counts = Fetched()
    photos = []
    # The whole list first: a search by pages would find the results stored meanwhile.
    async for instance in archive.search(query):
        counts.found += 1
        if instance.sop_class not in PHOTOS:
            counts.others += 1
        elif await asyncio.to_thread(journal.knows, instance.uid):
            counts.known += 1
        else:
            photos.append(instance)
    for instance in photos:
        await _take(archive, instance, journal, relay, metrics, patience, counts)
    # The journal is a database: nothing rings when it is empty.
    while (await asyncio.to_thread(journal.state)).waiting:  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_S)
    return counts


async def _take(
    archive: Archive,
    instance: Instance,
    journal: Journal,
    relay: Relay,
    metrics: Metrics,
    patience: Patience,
    counts: Fetched,
) -> None:
    for attempts in range(_ATTEMPTS):
        try:
            content = await archive.retrieve(instance)
            break
        except Failure as failure:
            log.warning("an object is not fetched: %s (%s)", failure.detail, failure.reason)
            if failure.final or attempts == _ATTEMPTS - 1:
                counts.failed += 1
                metrics.received.labels("not_fetched").inc()
                return
            await asyncio.sleep(max(patience.pause_s(attempts), failure.retry_after_s))
    while True:
        try:
            became, _ = await asyncio.to_thread(journal.accept, instance.uid, content)
            break
        except JournalFull:
            # It empties as results are delivered.
            await asyncio.sleep(_LOOK_S)
    metrics.received.labels(became.value).inc()
    if became is Accepted.NEW:
        counts.taken += 1
        relay.arrived()
    else:
        counts.known += 1
