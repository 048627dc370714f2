"""Who is let in: as many as there is room for, and only those that can be answered in time.

How long a request would wait is told by how many photos are ahead of it and by the pace at which
photos got done while there were any: decoding, the network, batches, encoding and whatever else
keeps the machine busy are all in that pace. Interactive and bulk photos are counted apart, as each
kind waits for its own: what one kind costs the other is in the other's pace.

A request that would be answered too late is refused before its body is read, and once more when
its body has come and those ahead turned out to be more. One that nobody is ahead of is let in
whatever its deadline, for it could not do better by coming back.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from itertools import takewhile

from server.problems import Overloaded
from server.settings import Settings
from server.uploads import ByteBudget

__all__ = ["Gate", "Pace", "Place"]

# Photos that the pace is an average of, and batches: those of one come all at once.
_PHOTOS = 32
_BATCHES = 4

# Of what is left until its deadline a request may spend so much by expectation; the rest is for
# what nobody expects.
_USABLE = 0.9

# A body that takes longer than this to come is not ahead of anyone: a slow client must not keep
# others out. When it is there it has to find room anew.
_ARRIVING_S = 1.0


class Pace:
    """How soon photos get done."""

    def __init__(self) -> None:
        self.photos = 0
        """That are being worked on or wait for it."""
        self.seconds_each = 0.0
        """From one that gets done to the next, while there are any; 0 before it is known."""
        self.max_batch = 1
        self._samples = 0
        self._last = 0.0

    def suppose(self, seconds_each: float, max_batch: int) -> None:
        """What to go by until photos have been seen, and how many may run together."""
        self.max_batch = max_batch
        if not self._samples:
            self.seconds_each = seconds_each

    def begin(self, photos: int) -> None:
        """So many more are worked on or wait."""
        if not self.photos:
            self._last = time.perf_counter()
        self.photos += photos

    def end(self, photos: int, *, served: bool) -> None:
        """So many less; `served` if the network has run them."""
        self.photos -= photos
        if not served:
            # Took nearly no time, or was given up: its share is in the next one's.
            return
        now = time.perf_counter()
        each = (now - self._last) / photos
        self._last = now
        self._samples = min(self._samples + photos, max(_PHOTOS, _BATCHES * self.max_batch))
        self.seconds_each += (each - self.seconds_each) * min(1.0, photos / self._samples)

    def wait_s(self, ahead: int, photos: int = 1) -> float:
        """Until the last of so many is done that come now, seconds; `ahead` come before them.

        As many as are ahead, but for a batch at most, may follow and run with them.
        """
        if not ahead:
            return 0.0
        return (ahead + photos + min(ahead, self.max_batch - 1)) * self.seconds_each


class Place:
    """What a request holds from its admission to its answer."""

    def __init__(
        self,
        gate: "Gate",
        take: Callable[[int], None],
        deadline: float,
        bulk: bool,
    ) -> None:
        self.take = take
        """Accounts for bytes of its body; see `ByteBudget.account`."""
        self.deadline = deadline
        """Second of `time.perf_counter`; may be set until `check`, as may `bulk`."""
        self.bulk = bulk
        self._gate = gate
        self._pace = gate.pace(bulk=bulk)
        self._photos = 0

    def check(self, photos: int = 1) -> None:
        """The body is there, with so many photos.

        Raises:
            Overloaded: they would be done too late.
        """
        self._gate.arrived(self)
        self._pace = pace = self._gate.pace(bulk=self.bulk)
        self._gate.check(pace, pace.photos, self.deadline - time.perf_counter(), photos)

    def begin(self, photos: int = 1) -> None:
        """Work on so many of them begins."""
        self._photos += photos
        self._pace.begin(photos)

    def end(self, photos: int = 1, *, served: bool) -> None:
        """Work on so many of them is over; `served` if the network has run them."""
        self._photos -= photos
        self._pace.end(photos, served=served)

    def leave(self) -> None:
        """The request is over, whatever photos it still has."""
        self._gate.arrived(self)
        self.end(self._photos, served=False)


class Gate:
    """Counts places, bytes and photos, and refuses what would be too many."""

    def __init__(self, settings: Settings) -> None:
        self.admitted = 0
        """Places that are taken."""
        self.body_bytes = ByteBudget(settings.max_bytes_in_flight)
        self._settings = settings
        self._paces = {False: Pace(), True: Pace()}
        self._arriving: dict[Place, float] = {}

    def pace(self, *, bulk: bool) -> Pace:
        """Of one of the two kinds of photos."""
        return self._paces[bulk]

    def expect(self, seconds_each: float, max_batch: int) -> None:
        """What a photo takes the network, by a first measurement, and how many it runs together."""
        for pace in self._paces.values():
            pace.suppose(seconds_each, max_batch)

    def wait_s(self, *, bulk: bool) -> float:
        """What a request that comes now would wait for its answer by expectation, seconds."""
        return self.pace(bulk=bulk).wait_s(self._ahead(bulk))

    @contextlib.contextmanager
    def enter(self, *, deadline: float, bulk: bool) -> Iterator[Place]:
        """A place among the requests being worked on.

        Args:
            deadline: second of `time.perf_counter` after which an answer is of no use.
            bulk: the half of the places that was free last is not for this one.

        Raises:
            Overloaded: all places are taken, or the answer would come too late.
        """
        pace = self.pace(bulk=bulk)
        usable_s = (deadline - time.perf_counter()) * _USABLE
        self.check(pace, self._ahead(bulk), usable_s)
        with self.places(1, bulk=bulk), self.body_bytes.account(self._memory_full) as take:
            place = Place(self, take, deadline, bulk)
            self._arriving[place] = time.perf_counter()
            try:
                yield place
            finally:
                place.leave()

    @contextlib.contextmanager
    def places(self, count: int, *, bulk: bool) -> Iterator[None]:
        """So many places; a request with several photos takes some beside its own.

        Raises:
            Overloaded: fewer are free.
        """
        limit = self._settings.bulk_queue if bulk else self._settings.max_queue
        if self.admitted + count > limit:
            raise self._overloaded("the queue is full", "queue_full")
        self.admitted += count
        try:
            yield
        finally:
            self.admitted -= count

    def arrived(self, place: Place) -> None:
        """The body of this one has come, or never will."""
        self._arriving.pop(place, None)

    def check(self, pace: Pace, ahead: int, left_s: float, photos: int = 1) -> None:
        """Raises:
        Overloaded: photos that come now, with so many ahead, are not done in `left_s`.
        """
        wait_s = pace.wait_s(ahead, photos)
        if ahead and wait_s > left_s:
            raise self._overloaded(
                f"with {ahead} photos ahead the answer would take about {wait_s:.1f} s, longer than"
                " the request may take (X-Request-Timeout-Ms)",
                "would_be_late",
            )

    def _ahead(self, bulk: bool) -> int:
        """Photos that one which comes now has to wait for."""
        since = time.perf_counter() - _ARRIVING_S
        arriving = takewhile(lambda item: item[1] > since, reversed(self._arriving.items()))
        return self.pace(bulk=bulk).photos + sum(place.bulk is bulk for place, _ in arriving)

    def _memory_full(self) -> Overloaded:
        return self._overloaded("the photos in flight fill the memory set aside for them", "memory")

    def _overloaded(self, why: str, reason: str) -> Overloaded:
        busy_s = max(pace.photos * pace.seconds_each for pace in self._paces.values())
        retry_s = max(1, math.ceil(busy_s))
        return Overloaded(
            f"The server is busy: {why}. Try again in about {retry_s} s (Retry-After).",
            retry_s,
            reason,
        )
