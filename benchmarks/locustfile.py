"""Users of the server for locust. Name one class or several, and how many users.

    python -m locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000 ClosedLoop
    python -m locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000 \
        --headless --users 32 --spawn-rate 1 --run-time 60s ClosedLoop        # a ramp
    python -m locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000 \
        --headless --users 9 --run-time 60s --rate 5 Interactive Bulk

ClosedLoop   sends its next photo when it has the mask of the last one; more users, more load
OpenLoop     sends photos at `--rate`, whether or not the earlier ones have been answered
Burst        sends `--burst` photos at once, waits for all masks, pauses, and again
Interactive  an open loop: people who wait for their mask
Bulk         a closed loop that says `Priority: bulk`

Every mask is compared with a prediction made without a server. A wrong one is a failure.
"""

import itertools
import json
import random
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gevent
from gevent.pool import Group
from locust import FastHttpUser, constant, events, task
from locust.env import Environment

from benchmarks.deck import Card, Deck, deal, generated, given
from tests.support.expected import Verdict

MODEL = Path(__file__).parent.parent / "model/weights/slsnet.onnx"

_BLOCK = 4
"""Arrivals of an open loop that together take as long as its rate says."""


@dataclass(frozen=True)
class Answer:
    """One request and its outcome. Times are seconds of `time.perf_counter`."""

    user: str
    """Name of the user's class."""
    kind: str
    """Size and format of the photo."""
    due: float
    """When the request should have been sent. Latency counts from here."""
    sent: float
    answered: float
    status: int
    """HTTP status; 0 if there was no answer."""
    verdict: Verdict | None
    """Verdict on the mask; None without one."""
    stages_ms: Mapping[str, float]
    """Durations in `Server-Timing`, by stage."""
    batch: int
    """Photos that ran through the network together; 0 if the request did not run."""

    @property
    def latency_ms(self) -> float:
        """Time since the request was due, so that a delayed client cannot hide its wait."""
        return (self.answered - self.due) * 1000

    @property
    def service_ms(self) -> float:
        """Time since the request was sent."""
        return (self.answered - self.sent) * 1000


class SegmentUser(FastHttpUser):
    """Sends the deck's photos, and checks the masks. The classes below decide the rhythm."""

    abstract = True
    network_timeout = 120.0
    connection_timeout = 120.0
    default_headers = {"Accept": "image/png"}  # noqa: RUF012  # as locust declares it

    cards: ClassVar[Iterator[Card]]
    precision: ClassVar[str] = "fp32"
    """Precision of the server's network, which decides how much its masks may differ."""

    def send(self, due: float | None = None) -> float:
        """Send the next photo; return how many seconds the server asks the client to stay away.

        Args:
            due: when it should have been sent, in `time.perf_counter`'s seconds; None means now.
        """
        card = next(self.cards)
        sent = time.perf_counter()
        due = sent if due is None else due
        with self.client.post(
            "/segment",
            data=card.body,  # type: ignore[arg-type]  # bytes are what it sends
            headers={"Content-Type": card.content_type},
            name=card.kind,
            catch_response=True,
        ) as response:
            meta = response.request_meta
            answered = sent + meta["response_time"] / 1000
            meta["response_time"] = (answered - due) * 1000
            headers = response.headers or {}
            stages_ms, batch = _server_timing(headers.get("Server-Timing", ""))
            verdict = None
            if response.status_code == 200:
                verdict = card.expected.verdict(response.content or b"", self.precision)
            answer = Answer(
                type(self).__name__,
                card.kind,
                due,
                sent,
                answered,
                response.status_code,
                verdict,
                stages_ms,
                batch,
            )
            meta["context"] = {"answer": answer}
            if verdict == "wrong":
                response.failure("not the mask of this photo")
        return float(headers.get("Retry-After", 0)) if answer.status in (429, 503) else 0


class ClosedLoop(SegmentUser):
    """Sends its next photo when it has the last one's mask, as a program in a loop does."""

    @task
    def segment(self) -> None:
        """Send one photo, then pause for as long as a full server asks."""
        gevent.sleep(self.send())


class Bulk(ClosedLoop):
    """A closed loop that nobody waits for. Its requests say so."""

    default_headers = {"Accept": "image/png", "Priority": "bulk"}  # noqa: RUF012


class OpenLoop(SegmentUser):
    """Photos at a fixed rate, as from many people who know nothing of each other.

    A late answer holds no photo back, and latency counts from when a photo was due. So the cost of
    a stall of server or client is all there (no coordinated omission).
    """

    fixed_count = 1
    concurrency = 4096
    rate: ClassVar[float] = 5.0
    """Photos sent in a second."""

    def on_start(self) -> None:
        self._due = arrivals(self.rate, time.perf_counter())
        self._in_flight = Group()

    @task
    def arrive(self) -> None:
        """Wait for the next photo's time and send it, without waiting for its mask."""
        due = next(self._due)
        while (early_s := due - time.perf_counter()) > 0:
            gevent.sleep(early_s)
        self._in_flight.spawn(self.send, due)

    def on_stop(self) -> None:
        """Send what is overdue, and wait for the slowest: the figures must not omit them."""
        now = time.perf_counter()
        for due in itertools.takewhile(lambda due: due <= now, self._due):
            self._in_flight.spawn(self.send, due)
        self._in_flight.join()


class Interactive(OpenLoop):
    """People who wait for their mask."""


class Burst(SegmentUser):
    """Photos that come all at once, as from a device that is back online."""

    fixed_count = 1
    concurrency = 4096
    wait_time = constant(0.5)
    size: ClassVar[int] = 32

    @task
    def burst(self) -> None:
        """Send all photos, then wait for all masks."""
        due = time.perf_counter()
        together = Group()
        for _ in range(self.size):
            together.spawn(self.send, due)
        together.join()


def arrivals(rate: float, start: float) -> Iterator[float]:
    """When the photos of an open loop are due, in seconds of the clock of `start`.

    They are at random, as from people who know nothing of each other, but four in every 4/`rate`
    seconds, so that even a short run has the rate that it names. They are the same each time.
    """
    chance = random.Random(0)
    while True:
        yield from sorted(start + chance.random() * _BLOCK / rate for _ in range(_BLOCK))
        start += _BLOCK / rate


def prepare(deck: Deck, host: str) -> dict[str, Any]:
    """Let all users send `deck` to `host`; return the host's model card."""
    with urllib.request.urlopen(f"{host}/model", timeout=30) as response:
        card: dict[str, Any] = json.load(response)
    SegmentUser.cards = deal(deck.cards)
    SegmentUser.precision = card["backend"]["precision"]
    return card


def _server_timing(header: str) -> tuple[dict[str, float], int]:
    """Durations (ms) and size of the batch, as the header has them."""
    stages_ms: dict[str, float] = {}
    batch = 0
    for entry in filter(None, header.split(", ")):
        name, _, value = entry.partition(";")
        if value.startswith("dur="):
            stages_ms[name] = float(value.removeprefix("dur="))
        elif name == "batch":
            batch = int(value.removeprefix("desc=").strip('"'))
    return stages_ms, batch


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--images", help="folder of photos; generated ones if not given")
    parser.add_argument("--model", default=str(MODEL), help="the server's network, an ONNX file")
    parser.add_argument("--rate", type=float, default=5.0, help="photos/s of an open loop")
    parser.add_argument("--burst", type=int, default=32, help="photos that come at once")


@events.init.add_listener  # type: ignore[untyped-decorator]
def _set_up(environment: Environment, **_: object) -> None:
    options = environment.parsed_options
    assert options is not None
    OpenLoop.rate, Burst.size = options.rate, options.burst
    model = Path(options.model)
    deck = given(Path(options.images), model) if options.images else generated(model)
    # The loop's clock stood still meanwhile, and would shorten the run time by as much.
    gevent.get_hub().loop.update_now()

    def ask_for_the_model(**_: object) -> None:
        prepare(deck, environment.host or "")

    environment.events.test_start.add_listener(ask_for_the_model)  # type: ignore[no-untyped-call]
