"""Users of the server, for locust: name one, or several, and how many.

    python -m locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000 ClosedLoop
    python -m locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000 \
        --headless --users 32 --spawn-rate 1 --run-time 60s ClosedLoop        # a ramp
    python -m locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000 \
        --headless --users 9 --run-time 60s --rate 5 Interactive Bulk

ClosedLoop   sends its next photo when the last one's mask is there; more users, more load
OpenLoop     sends photos at `--rate`, whether or not those before have been answered
Burst        sends `--burst` photos at once, waits for all masks, pauses, and again
Interactive  an open loop: people who wait for their mask
Bulk         a closed loop that says `Priority: bulk`

Every mask is held against a prediction made without a server; one that is wrong is a failure.
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

from benchmarks.deck import Card, Deck, Verdict, deal, generated, given

MODEL = Path(__file__).parent.parent / "model/weights/slsnet.onnx"

_BLOCK = 4
"""Arrivals of an open loop that together take as long as its rate says."""


@dataclass(frozen=True)
class Answer:
    """One request and what became of it. Times are seconds of `time.perf_counter`."""

    user: str
    """Name of the user's class."""
    kind: str
    """Of the photo: size and format."""
    due: float
    """When it was meant to be sent: latency counts from here."""
    sent: float
    answered: float
    status: int
    """0: no answer."""
    verdict: Verdict | None
    """None without a mask."""
    stages_ms: Mapping[str, float]
    """`Server-Timing`, durations only."""
    batch: int
    """Photos that ran through the network together; 0 if it did not run."""

    @property
    def latency_ms(self) -> float:
        """From when it was meant to be sent, so a client that is held up cannot hide a wait."""
        return (self.answered - self.due) * 1000

    @property
    def service_ms(self) -> float:
        """From when it was sent."""
        return (self.answered - self.sent) * 1000


class SegmentUser(FastHttpUser):
    """Sends the deck's photos and checks the masks; in what rhythm, the classes below say."""

    abstract = True
    network_timeout = 120.0
    connection_timeout = 120.0
    default_headers = {"Accept": "image/png"}  # noqa: RUF012  # as locust declares it

    cards: ClassVar[Iterator[Card]]
    precision: ClassVar[str] = "fp32"
    """Of the server's network: what its masks may differ by."""

    def send(self, due: float | None = None) -> float:
        """Send the next photo; returns how many seconds the server asks to stay away.

        Args:
            due: when it was meant to be sent, `time.perf_counter`; now if None.
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
    """Sends its next photo when the last one's mask is there, like a program in a loop."""

    @task
    def segment(self) -> None:
        """One photo, and the pause that a full server asks for."""
        gevent.sleep(self.send())


class Bulk(ClosedLoop):
    """A closed loop that nobody waits for, and that says so."""

    default_headers = {"Accept": "image/png", "Priority": "bulk"}  # noqa: RUF012


class OpenLoop(SegmentUser):
    """Photos at a fixed rate, as from many people who know nothing of each other.

    A late answer holds nothing back, and latency counts from when a photo was due, so what a stall
    of server or client costs is all there (no coordinated omission).
    """

    fixed_count = 1
    concurrency = 4096
    rate: ClassVar[float] = 5.0
    """Photos a second."""

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
        """Send what is overdue and wait for the slowest: to leave them out would be to omit too."""
        now = time.perf_counter()
        for due in itertools.takewhile(lambda due: due <= now, self._due):
            self._in_flight.spawn(self.send, due)
        self._in_flight.join()


class Interactive(OpenLoop):
    """People who wait for their mask."""


class Burst(SegmentUser):
    """Photos that come all at once, as when a device comes back on line."""

    fixed_count = 1
    concurrency = 4096
    wait_time = constant(0.5)
    size: ClassVar[int] = 32

    @task
    def burst(self) -> None:
        """Send all, then wait for all."""
        due = time.perf_counter()
        together = Group()
        for _ in range(self.size):
            together.spawn(self.send, due)
        together.join()


def arrivals(rate: float, start: float) -> Iterator[float]:
    """When the photos of an open loop are due, seconds of the clock of `start`.

    At random, as from people who know nothing of each other, but four in every 4/`rate` seconds,
    so that a short run too has the rate it names. The same each time.
    """
    chance = random.Random(0)
    while True:
        yield from sorted(start + chance.random() * _BLOCK / rate for _ in range(_BLOCK))
        start += _BLOCK / rate


def prepare(deck: Deck, host: str) -> dict[str, Any]:
    """Let all users send `deck` to `host`; returns its model card."""
    with urllib.request.urlopen(f"{host}/model", timeout=30) as response:
        card: dict[str, Any] = json.load(response)
    SegmentUser.cards = deal(deck.cards)
    SegmentUser.precision = card["backend"]["precision"]
    return card


def _server_timing(header: str) -> tuple[dict[str, float], int]:
    """Durations (ms) and size of the batch."""
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
    # Its clock stood still meanwhile, and would cut the run time short by as much.
    gevent.get_hub().loop.update_now()

    def ask_for_the_model(**_: object) -> None:
        prepare(deck, environment.host or "")

    environment.events.test_start.add_listener(ask_for_the_model)  # type: ignore[no-untyped-call]
