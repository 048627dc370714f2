"""Admission: lets in as many requests as there is room for, if they can be answered in time.

A request waits about as long as the photos ahead of it take, at the pace of the last ones. That
pace includes decoding, the network, batches, encoding and any other work on the machine.
Interactive photos wait for each other and for bulk's share of the batches. Bulk photos wait for
what the others leave them, so they have a pace of their own.

A request that would be answered too late is refused before its body is read, or when the body has
come and more photos are ahead than before. If no photo is ahead the request is let in whatever its
deadline is: it could not do better later.

It is hand-written because limiters count requests and time, where this depends on the queue, the
bytes in flight and the measured pace.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise

from server.inference.batching import INTERACTIVE_PER_BULK
from server.inference.budgets import ByteBudget
from server.inference.errors import Overloaded
from server.settings import Settings

__all__ = ["WOULD_BE_LATE", "Gate", "Pace", "Place"]

WOULD_BE_LATE = "would_be_late"
"""Reason of an `Overloaded`: there is room, but the request may not take as long as it would."""

# Photos and batches that a pace is averaged over: the photos of a batch come all at once. The pace
# of bulk depends on the others, so it is forgotten sooner.
_PHOTOS = 32
_BULK_PHOTOS = 8
_BATCHES = 4

# Parts that they are split into. The pace is the median of the parts' means: one photo that took
# long affects one part only.
_PARTS = 4

# Seconds without work in which a pace loses half of its distance to the pace at the start: what was
# measured in a bad minute must not refuse requests in a good one.
_FORGET_S = 1.0

# Photos that the measurement at the start counts for. The first photos under load say
# little, since all that came with them were decoded at the same time.
_SUPPOSED_PHOTOS = 8

# A request may be expected to take this share of the time until its deadline. The rest is for the
# unexpected, such as other work on the machine that comes while it waits.
_USABLE = 0.7

# A body that takes longer than this has no place, so that a slow client keeps nobody out. Once the
# body is there, the request asks for a place again.
_ARRIVING_S = 1.0


class Pace:
    """How fast photos get done, measured on the last ones."""

    def __init__(self, memory: int) -> None:
        """Average the last `memory` photos."""
        self.photos = 0
        """Photos that are being worked on, or wait."""
        self._busy_s = 0.0
        self._counted = 0.0
        self._done: deque[float] = deque([0.0], memory + 1)
        self._seen: float | None = None
        self._supposed_s = 0.0

    @property
    def seconds_each(self) -> float:
        """Seconds from one photo done to the next, while there are any; 0 before it is known."""
        seen_s = self._seen_s()
        if self.photos or seen_s <= self._supposed_s:
            return seen_s
        idle_s = time.perf_counter() - self._counted
        return self._supposed_s + (seen_s - self._supposed_s) * math.exp2(-idle_s / _FORGET_S)

    def _seen_s(self) -> float:
        # Every refusal asks for it, and it changes only when photos get done.
        if self._seen is None:
            self._seen = self._middle()
        return self._seen

    def _middle(self) -> float:
        count = len(self._done) - 1
        if count < 2 * _PARTS:
            return (self._done[-1] - self._done[0]) / count if count else 0.0
        ends = [count * part // _PARTS for part in range(_PARTS + 1)]
        means = sorted(
            (self._done[end] - self._done[start]) / (end - start) for start, end in pairwise(ends)
        )
        return sum(means[1:-1]) / (_PARTS - 2)

    @property
    def overdue_s(self) -> float:
        """Seconds since the last photo got done, while there are any."""
        return (
            self._busy_s + time.perf_counter() - self._counted - self._done[-1]
            if self.photos
            else 0.0
        )

    def suppose(self, seconds_each: float, memory: int) -> None:
        """Set the pace to assume until photos have been measured, and how many to average."""
        self._supposed_s = seconds_each
        done = list(self._done)
        if len(done) == 1:
            done = [done[0] - seconds_each * n for n in range(_SUPPOSED_PHOTOS, -1, -1)]
        self._done = deque(done, memory + 1)
        self._seen = None

    def begin(self, photos: int) -> None:
        """Count photos that begin to wait or to be worked on."""
        seen_s = self._seen_s()
        if not self.photos and seen_s:
            share = self.seconds_each / seen_s
            self._done = deque(
                (self._busy_s - (self._busy_s - at) * share for at in self._done),
                self._done.maxlen,
            )
            self._seen = None
        self._count_time()
        self.photos += photos

    def end(self, photos: int, *, served: bool) -> None:
        """Count photos that are over; `served` if the network has run them.

        The time of photos that were not served counts for the next ones that are, as long as there
        are any. Where none is left it is forgotten: it says nothing of the pace.
        """
        self._count_time()
        self.photos -= photos
        if served:
            self._done.extend([self._busy_s] * photos)
            self._seen = None
        elif not self.photos:
            self._busy_s = self._done[-1]

    def _count_time(self) -> None:
        now = time.perf_counter()
        if self.photos:
            self._busy_s += now - self._counted
        self._counted = now


class Place:
    """The place in the queue that a request holds from its admission to its answer."""

    def __init__(
        self,
        gate: "Gate",
        take: Callable[[int], None],
        deadline: float,
        bulk: bool,
    ) -> None:
        self.take = take
        """Accounts for bytes of the request's body; see `ByteBudget.account`."""
        self.deadline = deadline
        """Second of `time.perf_counter`; may be set until `check`, as may `bulk`."""
        self.bulk = bulk
        self._gate = gate
        self._photos = 0

    def check(self, photos: int = 1) -> None:
        """Check again, now that the body is there and has so many photos.

        Raises:
            Overloaded: they would be done too late, or the place was lost while the body came.
        """
        self._gate.arrived(self)
        self._gate.check(photos, self.deadline - time.perf_counter(), bulk=self.bulk)

    def begin(self, photos: int = 1) -> None:
        """Work on so many of the photos begins."""
        self._photos += photos
        for pace in self._gate.paces(bulk=self.bulk):
            pace.begin(photos)

    def end(self, photos: int = 1, *, served: bool) -> None:
        """Work on so many of the photos is over; `served` if the network has run them."""
        self._photos -= photos
        for pace in self._gate.paces(bulk=self.bulk):
            pace.end(photos, served=served)

    def leave(self) -> None:
        """The request is over; its remaining photos are not waited for."""
        self._gate.left(self)
        if self._photos:
            self.end(self._photos, served=False)


class Gate:
    """Counts places, bytes and photos, and refuses requests beyond the limits."""

    def __init__(self, settings: Settings) -> None:
        self.admitted = 0
        """Requests that have been let in."""
        self._admitted_bulk = 0
        self.body_bytes = ByteBudget(settings.max_bytes_in_flight)
        self._bulk_bytes = ByteBudget(settings.bulk_bytes, self.body_bytes)
        self._settings = settings
        self._pace = Pace(_PHOTOS)
        self._bulk_pace = Pace(_BULK_PHOTOS)
        self._max_batch = 1
        self._arriving: dict[Place, float] = {}

    def expect(self, seconds_an_image: float, max_batch: int) -> None:
        """Take a first measurement: seconds of the network for a photo, and photos in one run."""
        self._max_batch = max_batch
        self._pace.suppose(seconds_an_image, max(_PHOTOS, _BATCHES * max_batch))

    def paces(self, *, bulk: bool) -> tuple[Pace, ...]:
        """The paces that a photo counts for."""
        return (self._pace, self._bulk_pace) if bulk else (self._pace,)

    def wait_s(self, photos: int = 1, *, bulk: bool, arriving: int = 0) -> float:
        """Seconds until the last of so many new photos would be done; 0 if none is ahead.

        Args:
            photos: the new ones.
            bulk: whether these are bulk.
            arriving: photos of the same kind that come before them and are not worked on yet.
        """
        each_s, most = self._pace.seconds_each, self._max_batch
        interactive = self._pace.photos - self._bulk_pace.photos
        if bulk:
            ahead = self._bulk_pace.photos + arriving
            if not ahead and not interactive:
                return 0.0
            pace_s = max(each_s, self._bulk_pace.seconds_each, self._bulk_pace.overdue_s)
            # A batch of others runs already, and the photos of its own batch come with it.
            return (ahead + photos) * pace_s + 2 * min(interactive, most) * each_s
        ahead = interactive + arriving
        ahead += min(self._bulk_pace.photos, 1 + ahead // INTERACTIVE_PER_BULK)
        # As many photos as are ahead may follow and run in the same batch.
        return (ahead + photos + min(ahead, most - 1)) * each_s if ahead else 0.0

    @contextlib.contextmanager
    def enter(self, *, deadline: float, bulk: bool) -> Iterator[Place]:
        """Take a place in the queue.

        Args:
            deadline: second of `time.perf_counter` after which an answer is of no use.
            bulk: all bulk requests together may take half of the places and of the bytes.

        Raises:
            Overloaded: all places are taken, or the answer would come too late.
        """
        self.check_room(deadline=deadline, bulk=bulk)
        body_bytes = self._bulk_bytes if bulk else self.body_bytes
        with self.places(1, bulk=bulk), body_bytes.account(self._memory_full) as take:
            place = Place(self, take, deadline, bulk)
            self._arriving[place] = time.perf_counter()
            try:
                yield place
            finally:
                place.leave()

    def check_room(
        self, *, deadline: float, bulk: bool, coming: int = 0, others_coming: int = 0
    ) -> None:
        """Check that one more can be let in; other arguments and errors are those of `enter`.

        Args:
            coming: requests of its kind that come before it and have no place yet.
            others_coming: requests of the other kind that come before it and have no place yet.
        """
        usable_s = (deadline - time.perf_counter()) * _USABLE
        self.check(1, usable_s, bulk=bulk, arriving=self._count_arriving(bulk) + coming)
        self._find_places(1 + coming, bulk=bulk, others=others_coming)

    @contextlib.contextmanager
    def answer_bytes(self, count: int, *, bulk: bool) -> Iterator[None]:
        """Account for so many bytes of a large answer, as for those of a body.

        Raises:
            Overloaded: there is no room for them.
        """
        body_bytes = self._bulk_bytes if bulk else self.body_bytes
        with body_bytes.account(self._memory_full) as take:
            take(count)
            yield

    @contextlib.contextmanager
    def places(self, count: int, *, bulk: bool) -> Iterator[None]:
        """Take so many places, which a request with several photos needs beside its own.

        Raises:
            Overloaded: fewer are free.
        """
        self._find_places(count, bulk=bulk)
        counted_as_bulk = count if bulk else 0
        self.admitted += count
        self._admitted_bulk += counted_as_bulk
        try:
            yield
        finally:
            self.admitted -= count
            self._admitted_bulk -= counted_as_bulk

    def arrived(self, place: Place) -> None:
        """The body of this request has come.

        Raises:
            Overloaded: it came so slowly that its place was given to others, and none is free.
        """
        if time.perf_counter() - self._arriving[place] >= _ARRIVING_S:
            self._find_places(1, bulk=place.bulk)
        self.left(place)

    def left(self, place: Place) -> None:
        """The request is over, or its body will not come."""
        self._arriving.pop(place, None)

    def _find_places(self, count: int, *, bulk: bool, others: int = 0) -> None:
        admitted, bulk_queue = self.admitted + others + count, self._settings.bulk_queue
        if admitted <= self._settings.max_queue and (
            not bulk or self._admitted_bulk + count <= bulk_queue
        ):
            return
        # Places of those that come slowly do not count. Bulk has a share of its own: counted with
        # all, it would starve while others keep the queue half full.
        in_time = list(self._arriving_in_time())
        is_full = admitted - (len(self._arriving) - len(in_time)) > self._settings.max_queue
        if bulk and not is_full:
            slow = sum(place.bulk for place in self._arriving) - sum(
                place.bulk for place in in_time
            )
            is_full = self._admitted_bulk - slow + count > bulk_queue
        if is_full:
            raise self._overloaded("the queue is full", "queue_full")

    def check(self, photos: int, left_s: float, *, bulk: bool, arriving: int = 0) -> None:
        """Check that so many photos that come now would be done in time.

        Raises:
            Overloaded: so many photos that come now are not done in `left_s`; see `wait_s`.
        """
        wait_s = self.wait_s(photos, bulk=bulk, arriving=arriving)
        if wait_s and wait_s > left_s:
            raise self._overloaded(
                f"by what is ahead the answer would take about {wait_s:.1f} s, longer than the"
                " request may take",
                WOULD_BE_LATE,
            )

    def _count_arriving(self, bulk: bool) -> int:
        return sum(place.bulk is bulk for place in self._arriving_in_time())

    def _arriving_in_time(self) -> Iterator[Place]:
        now = time.perf_counter()
        for place, since in reversed(self._arriving.items()):
            if now - since >= _ARRIVING_S:
                return
            yield place

    def _memory_full(self) -> Overloaded:
        return self._overloaded("the photos in flight fill the memory set aside for them", "memory")

    def _overloaded(self, why: str, reason: str) -> Overloaded:
        retry_s = max(1, math.ceil(self._pace.photos * self._pace.seconds_each))
        return Overloaded(f"The server is busy: {why}.", retry_s, reason)
