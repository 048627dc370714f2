"""Who is let in: nobody in vain, nobody kept out for nothing."""

import contextlib
import random
import socket
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle, islice

import httpx
import pytest

from server.inference import admission
from server.inference.admission import Gate, Place
from server.inference.errors import Overloaded
from server.settings import Settings
from tests.support.answers import figures
from tests.support.launch import ServerProcess, serve
from tests.support.samples import Sample
from tests.support.waiting import until
from tests.support.wire import connect


class Clock:
    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(admission, "time", clock)
    return clock


@dataclass
class Request:
    arrived: float
    deadline: float
    stack: contextlib.ExitStack
    place: Place


@dataclass
class Server:
    """One that takes `seconds_each` for a photo and runs up to `max_batch` of them together."""

    clock: Clock
    seconds_each: float
    max_batch: int = 8
    gate: Gate = field(default_factory=lambda: Gate(Settings()))
    in_time: int = 0
    late: int = 0
    refused: int = 0

    def run(self, seconds: float, load: float, deadline_s: float, seed: int) -> None:
        """Requests come at random, `load` times as many as it can serve."""
        choose = random.Random(seed)
        queue: deque[Request] = deque()
        batch: list[Request] = []
        end = self.clock.now + seconds
        arrival, done = self.clock.now, float("inf")
        while min(arrival, done) < end:
            self.clock.now = min(arrival, done)
            if arrival <= done:
                arrival += choose.expovariate(load / self.seconds_each)
                self._arrive(queue, deadline_s)
            else:
                for request in batch:
                    self._answer(request)
                batch, done = [], float("inf")
            if not batch and queue:
                batch = [queue.popleft() for _ in range(min(self.max_batch, len(queue)))]
                done = self.clock.now + len(batch) * self.seconds_each
        for request in [*batch, *queue]:
            request.stack.close()

    def _arrive(self, queue: deque[Request], deadline_s: float) -> None:
        now = self.clock.now
        with contextlib.ExitStack() as stack:
            try:
                place = stack.enter_context(self.gate.enter(deadline=now + deadline_s, bulk=False))
                place.check()
            except Overloaded as refusal:
                self.refused += refusal.retry_after_s >= 1
                return
            place.begin()
            queue.append(Request(now, now + deadline_s, stack.pop_all(), place))

    def _answer(self, request: Request) -> None:
        request.place.end(served=True)
        request.stack.close()
        if self.clock.now <= request.deadline:
            self.in_time += 1
        else:
            self.late += 1


@pytest.mark.parametrize("load", [1.2, 1.5, 4.0])
@pytest.mark.parametrize("deadline_s", [0.5, 2.0, 10.0])
@pytest.mark.parametrize(("seconds_each", "max_batch"), [(0.05, 8), (0.05, 1), (0.002, 64)])
def test_under_overload_who_is_let_in_is_served_in_time(
    clock: Clock, load: float, deadline_s: float, seconds_each: float, max_batch: int
) -> None:
    server = Server(clock, seconds_each, max_batch)
    server.gate.expect(seconds_each, max_batch)
    # The queue has to fill first.
    seconds = max(30.0, 3 * deadline_s / (load - 1))
    server.run(seconds, load, deadline_s, seed=1)
    assert server.late <= 0.01 * (server.in_time + server.late)
    # Nor is anyone refused whom it could have served.
    assert server.in_time > 0.9 * seconds / seconds_each
    assert server.refused > 0.3 * (load - 1) * server.in_time


@pytest.mark.parametrize("load", [0.1, 0.5, 0.7])
def test_without_overload_nobody_is_refused(clock: Clock, load: float) -> None:
    server = Server(clock, 0.05)
    server.run(120, load, 2.0, seed=2)
    assert server.refused <= 0.005 * server.in_time
    assert server.late == 0


def test_admission_follows_a_server_that_gets_slower_and_faster(clock: Clock) -> None:
    server = Server(clock, 0.05)
    server.gate.expect(0.05, server.max_batch)
    server.run(30, 1.5, 2.0, seed=3)
    for seconds_each in (0.15, 0.02):
        server.seconds_each = seconds_each
        # It has to notice first.
        server.run(10, 1.5, 2.0, seed=4)
        server.in_time = server.late = 0
        server.run(30, 1.5, 2.0, seed=5)
        assert server.late <= 0.01 * server.in_time
        assert server.in_time > 0.9 * 30 / seconds_each


def enter(gate: Gate, clock: Clock, timeout_s: float, *, bulk: bool = False) -> Iterator[Place]:
    with gate.enter(deadline=clock.now + timeout_s, bulk=bulk) as place:
        yield place


def is_let_in(gate: Gate, clock: Clock, timeout_s: float, *, bulk: bool = False) -> bool:
    try:
        next(enter(gate, clock, timeout_s, bulk=bulk))
    except Overloaded:
        return False
    return True


def pass_through(
    gate: Gate, clock: Clock, seconds: float, *, photos: int = 1, served: bool = True
) -> None:
    """So many come together and each takes so long."""
    with contextlib.ExitStack() as stack:
        places = [
            stack.enter_context(gate.enter(deadline=clock.now + 30, bulk=False))
            for _ in range(photos)
        ]
        for place in places:
            place.begin()
        for place in places:
            clock.now += seconds
            place.end(served=served)


@pytest.mark.parametrize("served", [True, False])
def test_one_outlier_does_not_shape_the_pace(clock: Clock, served: bool) -> None:
    gate = Gate(Settings())
    gate.expect(0.02, 8)
    for _ in range(40):
        pass_through(gate, clock, 0.02)
    pass_through(gate, clock, 16.0, served=served)
    for _ in range(40):
        with contextlib.ExitStack() as stack:
            # While one is worked on, another can be done within the second.
            place = stack.enter_context(gate.enter(deadline=clock.now + 30, bulk=False))
            place.begin()
            assert is_let_in(gate, clock, 1.0)
            clock.now += 0.02
            place.end(served=True)


def test_an_idle_server_forgets_a_bad_minute_in_seconds(clock: Clock) -> None:
    gate = Gate(Settings())
    gate.expect(0.02, 8)
    for _ in range(12):
        pass_through(gate, clock, 1.0, photos=4)
    pace = gate.paces(bulk=False)[0]
    assert pace.seconds_each == pytest.approx(1.0)
    clock.now += 6
    assert pace.seconds_each < 0.05
    # And not because it is idle: those that come now find it so.
    pass_through(gate, clock, 0.02, photos=4)
    assert pace.seconds_each < 0.05


def test_a_server_that_stays_slow_is_known_to_be(clock: Clock) -> None:
    gate = Gate(Settings())
    gate.expect(0.02, 8)
    for _ in range(12):
        pass_through(gate, clock, 0.5, photos=4)
        clock.now += 0.05
    assert gate.paces(bulk=False)[0].seconds_each > 0.4


def test_nobody_ahead_or_nothing_known_is_no_reason_to_refuse(clock: Clock) -> None:
    gate = Gate(Settings(max_queue=8))
    # Nothing has been measured: places alone count.
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            place = stack.enter_context(gate.enter(deadline=clock.now + 0.001, bulk=False))
            place.check()
            place.begin()
        assert not is_let_in(gate, clock, 60)
    # Much slower than the deadline, but idle.
    gate.expect(5.0, 8)
    assert is_let_in(gate, clock, 0.001)
    assert is_let_in(gate, clock, 0.001, bulk=True)


def test_the_first_of_many_that_came_together_does_not_stand_for_all(clock: Clock) -> None:
    gate = Gate(Settings())
    gate.expect(0.02, 8)
    with contextlib.ExitStack() as stack:
        places = [
            stack.enter_context(gate.enter(deadline=clock.now + 30, bulk=False)) for _ in range(32)
        ]
        for place in places:
            place.check()
            place.begin()
        # All of them were being decoded when this one got done.
        clock.now += 1.1
        places[0].end(served=True)
        assert is_let_in(gate, clock, 30)


def test_what_refused_photos_took_keeps_nobody_out(clock: Clock) -> None:
    gate = Gate(Settings())
    gate.expect(0.05, 1)
    # Broken photos cost seconds each, one after another, and a good one comes after every third.
    for n in range(120):
        is_good = n % 4 == 3
        with gate.enter(deadline=clock.now + 30, bulk=False) as place:
            place.check()
            place.begin()
            clock.now += 0.05 if is_good else 5
            place.end(served=is_good)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            place = stack.enter_context(gate.enter(deadline=clock.now + 30, bulk=False))
            place.check()
            place.begin()
        assert gate.wait_s(bulk=False) < 1


def test_slow_bodies_keep_nobody_out(clock: Clock) -> None:
    gate = Gate(Settings())
    gate.expect(0.1, 1)
    with contextlib.ExitStack() as stack:
        places = [
            stack.enter_context(gate.enter(deadline=clock.now + 30, bulk=False)) for _ in range(100)
        ]
        assert not is_let_in(gate, clock, 5)
        clock.now += 2
        assert is_let_in(gate, clock, 0.2)
        # When they come at last they may find that others were quicker.
        for place in places[:50]:
            place.check()
            place.begin()
        places[50].deadline = clock.now + 1
        with pytest.raises(Overloaded, match="longer than the request may take"):
            places[50].check()


def test_slow_bodies_hold_no_places(clock: Clock) -> None:
    gate = Gate(Settings(max_queue=4))
    with contextlib.ExitStack() as stack:

        def come() -> Place:
            return stack.enter_context(gate.enter(deadline=clock.now + 30, bulk=False))

        slow = [come() for _ in range(4)]
        assert not is_let_in(gate, clock, 30)
        clock.now += 2
        quick = [come() for _ in range(3)]
        for place in quick:
            place.check()
        # One place is left, for whoever of the slow ones is there first.
        slow[0].check()
        with pytest.raises(Overloaded, match="queue is full"):
            slow[1].check()
        assert not is_let_in(gate, clock, 30)
    assert gate.admitted == 0
    assert is_let_in(gate, clock, 30)


def test_bulk_has_half_of_the_places_whoever_has_the_others(clock: Clock) -> None:
    gate = Gate(Settings(max_queue=8))
    with contextlib.ExitStack() as stack:

        def come(*, bulk: bool) -> None:
            stack.enter_context(gate.enter(deadline=clock.now + 30, bulk=bulk))

        for _ in range(5):
            come(bulk=False)
        for _ in range(3):
            come(bulk=True)
        for bulk in (True, False):
            with pytest.raises(Overloaded, match="queue is full"):
                come(bulk=bulk)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            come(bulk=True)
        with pytest.raises(Overloaded, match="queue is full"):
            come(bulk=True)
        # Bodies that come too slowly give their places to others of their kind.
        clock.now += 2
        come(bulk=True)
        for _ in range(7):
            come(bulk=False)
        with pytest.raises(Overloaded, match="queue is full"):
            come(bulk=False)
    assert gate.admitted == 0


def test_bulk_leaves_half_of_the_bytes_to_others(clock: Clock) -> None:
    gate = Gate(Settings(max_bytes_in_flight=100))
    with contextlib.ExitStack() as stack:

        def come(*, bulk: bool) -> Place:
            return stack.enter_context(gate.enter(deadline=clock.now + 30, bulk=bulk))

        bulk, other = come(bulk=True), come(bulk=False)
        bulk.take(50)
        with pytest.raises(Overloaded, match="memory"):
            bulk.take(1)
        other.take(50)
        with pytest.raises(Overloaded, match="memory"):
            other.take(1)
        bulk.take(-50)
        other.take(50)
        # The half that is not taken may be full of others'.
        with pytest.raises(Overloaded, match="memory"):
            bulk.take(1)
    assert gate.body_bytes.used == 0


def announce(server: ServerProcess, path: str, content_type: str, size: int) -> socket.socket:
    """A client that sends a request's head and the first byte of its body."""
    connection = connect(server)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {size}\r\n\r\n-".encode()
    )
    return connection


def test_announced_bytes_that_do_not_come_keep_nobody_out(
    server: ServerProcess, photos: list[Sample]
) -> None:
    form = "multipart/form-data; boundary=b"
    bodies = [("/segment", "image/jpeg", 64 * 2**20)] * 10
    bodies += [("/segment/batch", form, 256 * 2**20)] * 2
    with contextlib.ExitStack() as stack:
        for path, content_type, size in bodies:
            stack.enter_context(announce(server, path, content_type, size))
        until(lambda: figures(server)["slsnet_requests_in_flight"] == len(bodies))
        assert httpx.post(f"{server.url}/segment", content=photos[0].data).status_code == 200


@pytest.mark.usefixtures("small_networks")
def test_silent_bodies_keep_nobody_out(photos: list[Sample]) -> None:
    photo = photos[0].data
    # They stay for as long as the test.
    flags = ("--max-queue", "4", "--stall-timeout-s", "600", "--request-timeout-ms", "600000")
    with serve(*flags) as server, contextlib.ExitStack() as stack:
        url = f"{server.url}/segment"
        silent = [
            stack.enter_context(announce(server, "/segment", "image/jpeg", 1000)) for _ in range(4)
        ]
        until(lambda: figures(server)["slsnet_requests_in_flight"] == 4)
        until(lambda: httpx.post(url, content=photo).status_code == 200)
        assert figures(server)["slsnet_requests_in_flight"] == 4
        # Who was slow is served when all of it is there.
        silent[0].sendall(bytes(999))
        assert silent[0].recv(4096).startswith(b"HTTP/1.1 415 ")


def test_bulk_expects_others_to_go_first(clock: Clock) -> None:
    gate = Gate(Settings())
    gate.expect(0.1, 4)
    with contextlib.ExitStack() as stack:
        for bulk in (True, False, False, False, False, False, False):
            place = stack.enter_context(gate.enter(deadline=clock.now + 30, bulk=bulk))
            place.check()
            place.begin()
        # Of bulk one goes along at most: (6 + 1 + itself + 3 that may follow) * 0.1 s.
        assert gate.wait_s(bulk=False) == pytest.approx(1.1)
        assert is_let_in(gate, clock, 1.6)
        assert not is_let_in(gate, clock, 1.1)
        # No bulk photo gets done for so long.
        clock.now += 3
        assert gate.wait_s(bulk=True) > 6
        assert not is_let_in(gate, clock, 6, bulk=True)
        assert is_let_in(gate, clock, 10, bulk=True)


def test_a_photo_that_cannot_be_served_in_time_is_refused_before_its_body_is_read(
    server: ServerProcess, photos: list[Sample]
) -> None:
    stop = threading.Event()

    def keep_sending(photo: Sample) -> set[int]:
        statuses = set()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not stop.is_set():
                statuses.add(client.post("/segment", content=photo.data).status_code)
        return statuses

    head = (
        b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
        b"X-Request-Timeout-Ms: 20\r\nContent-Length: 1000000\r\n\r\n"
    )
    with ThreadPoolExecutor(32) as clients, contextlib.ExitStack() as stack:
        stack.callback(stop.set)
        sending = [clients.submit(keep_sending, photo) for photo in islice(cycle(photos), 32)]
        until(lambda: figures(server)["slsnet_expected_wait_seconds"] > 0.2)
        answers: list[bytes] = []

        def is_refused() -> bool:
            with connect(server) as connection:
                connection.sendall(head)
                answers.append(connection.recv(4096))
            return answers[-1].startswith(b"HTTP/1.1 429 ")

        # On a slow machine the 20 ms may pass before the server has looked at the head.
        until(is_refused)
        stop.set()
        # All the others may take their 30 s.
        assert set().union(*(future.result() for future in sending)) == {200}
    assert b"retry-after: " in answers[-1].lower()
    assert 'reason="would_be_late"' in httpx.get(f"{server.url}/metrics").text
    # Nobody is ahead any more.
    answered = httpx.post(
        f"{server.url}/segment", content=photos[0].data, headers={"X-Request-Timeout-Ms": "20000"}
    )
    assert answered.status_code == 200
