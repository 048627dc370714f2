"""A short load test with its report: `make bench`, or `python -m benchmarks.load`.

It starts a server, sends it generated photos or those of `--images`, compares every mask with a
prediction made without a server, and writes report.html, report.md and report.json. In turn:

- ramp: closed-loop clients, twice as many at each step, until further ones only wait longer;
- open loop at 0.5, 0.8 and 1.2 of the throughput that the ramp found; latency counts from when a
  photo was due;
- bursts: photos that come all at once;
- interactive photos alone, beside clients in a loop, and beside clients that say `Priority: bulk`.

It ends with 1 if a mask is wrong, or a request failed otherwise than by a refusal (429). Client and
server share the machine: the figures hold for it, and for its other work at that time.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gevent
import locust  # first, since it turns all connections into gevent's
from locust.env import Environment
from locust.runners import LocalRunner

from benchmarks.deck import Deck, bare_network_ms, generated, given
from benchmarks.latency import machine
from benchmarks.load_figures import Kind, Machine, Report, Scenario, Step
from benchmarks.load_report import write_report
from benchmarks.locustfile import (
    MODEL,
    Answer,
    Bulk,
    Burst,
    ClosedLoop,
    Interactive,
    OpenLoop,
    prepare,
)
from benchmarks.percentiles import percentile
from common.program import Help
from server.cores import available_cores
from server.observe.stages import STAGES
from tests.support.launch import serve

RESULTS = Path(__file__).parent / "results"
CLIENTS = (1, 2, 4, 8, 16, 32)
OPEN_LOADS = (0.5, 0.8, 1.2)
INTERACTIVE_LOAD = 0.25
"""Share of the ramp's best throughput, as in `OPEN_LOADS`."""
BESIDE = 8
"""Number of clients in a loop beside the interactive ones."""

_FEWEST = 5
"""Answers that a step needs to say anything. On a slow machine it lasts longer for them."""


@dataclass(frozen=True)
class Window:
    """A stretch of the run, in seconds of `time.perf_counter`."""

    start: float
    end: float
    generator_cores: float
    """Cores that this process, rather than the server, used meanwhile."""


class Users:
    """Users of some classes against one server, as many as are started."""

    def __init__(self, host: str, *classes: type[locust.User]) -> None:
        self.answers: dict[type[locust.User], list[Answer]] = {user: [] for user in classes}
        """Answers by class of user. They are complete once the users are stopped."""
        self._errors: list[Exception] = []
        by_name = {user.__name__: answers for user, answers in self.answers.items()}

        def on_request(context: dict[str, Answer], **_: object) -> None:
            by_name[context["answer"].user].append(context["answer"])

        def on_error(exception: Exception, **_: object) -> None:
            self._errors.append(exception)

        environment = Environment(user_classes=list(classes), host=host, stop_timeout=300)
        environment.events.request.add_listener(on_request)  # type: ignore[no-untyped-call]
        environment.events.user_error.add_listener(on_error)  # type: ignore[no-untyped-call]
        self._runner: LocalRunner = environment.create_local_runner()

    def start(self, count: int) -> None:
        """Let this many users run in all, from now on."""
        self._runner.start(count, spawn_rate=100)

    def wait_for(self, count: int, user: type[locust.User]) -> None:
        """Wait until users of this class have had this many more answers.

        Raises:
            Exception: a user met an error, which is raised again.
        """
        enough = len(self.answers[user]) + count
        while len(self.answers[user]) < enough:
            if self._errors:
                raise self._errors[0]
            gevent.sleep(0.01)

    def measure(self, seconds: float, user: type[locust.User]) -> Window:
        """Wait this long, and until users of this class have had a few answers."""
        start, cpu, before = time.perf_counter(), time.process_time(), len(self.answers[user])
        gevent.sleep(seconds)
        self.wait_for(max(0, before + _FEWEST - len(self.answers[user])), user)
        end = time.perf_counter()
        return Window(start, end, (time.process_time() - cpu) / (end - start))

    def stop(self) -> None:
        """Stop the users once everything that was sent is answered."""
        self._runner.quit()


class Load:
    """Runs scenarios against one server, one after another."""

    def __init__(self, host: str, step_s: float) -> None:
        self.host = host
        self.step_s = step_s
        self.answers: list[Answer] = []
        """Answers of all scenarios."""

    def warm_up(self) -> None:
        """Send some load that is not measured."""
        with self._users(ClosedLoop) as users:
            users.start(4)
            users.wait_for(8, ClosedLoop)

    def ramp(self, clients: Sequence[int]) -> tuple[list[Step], list[Kind]]:
        """Add clients to a closed loop; each step counts once all of them have had an answer."""
        windows = []
        with self._users(ClosedLoop) as users:
            for count in clients:
                users.start(count)
                users.wait_for(count, ClosedLoop)
                windows.append(users.measure(self.step_s, ClosedLoop))
        answers = users.answers[ClosedLoop]
        steps = [
            _step("ramp", _clients(count), window, answers, clients=count)
            for count, window in zip(clients, windows, strict=True)
        ]
        return steps, _kinds(_answered(answers, windows[0]))

    def open_loop(self, load: float, best_per_s: float) -> Step:
        """Send photos at a fixed rate, whatever becomes of the earlier ones."""
        OpenLoop.rate = load * best_per_s
        with self._users(OpenLoop) as users:
            users.start(1)
            window = users.measure(self.step_s, OpenLoop)
        name = f"{load:g} × saturation"
        return _step("open loop", name, window, users.answers[OpenLoop], load=load)

    def bursts(self, size: int) -> Step:
        """Send photos all at once, some times over."""
        Burst.size = size
        with self._users(Burst) as users:
            users.start(1)
            window = users.measure(self.step_s, Burst)
        return _step("burst", f"{size} at once", window, users.answers[Burst])

    def interactive(
        self, best_per_s: float, beside: type[ClosedLoop] | None = None, called: str = ""
    ) -> Step:
        """Send a light open loop, alone or beside clients that never rest."""
        Interactive.rate = INTERACTIVE_LOAD * best_per_s
        with self._users(Interactive, *([beside] if beside else [])) as users:
            users.start(1 + BESIDE if beside else 1)
            if beside:
                users.wait_for(BESIDE, beside)
            # Twice as long, because a light load has few requests.
            window = users.measure(2 * self.step_s, Interactive)
        return _step(
            "priority",
            f"beside {_clients(BESIDE)}{called}" if beside else "alone",
            window,
            users.answers[Interactive],
            others=users.answers[beside] if beside else (),
            load=INTERACTIVE_LOAD,
        )

    @contextlib.contextmanager
    def _users(self, *classes: type[locust.User]) -> Iterator[Users]:
        users = Users(self.host, *classes)
        try:
            yield users
        finally:
            users.stop()
        for answers in users.answers.values():
            self.answers += answers


def run(
    deck: Deck, host: str, where: Machine, *, clients: Sequence[int], burst: int, step_s: float
) -> Report:
    """Run all scenarios in turn.

    Args:
        host: URL of a ready server.
        where: the machine of the test.
        clients: numbers of clients in the ramp, rising from 1.
        burst: photos that a burst sends at once.
        step_s: measured seconds of each load.
    """
    card = prepare(deck, host)
    load = Load(host, step_s)
    load.warm_up()
    steps, kinds = load.ramp(clients)
    best_per_s = max(step.answered_per_s for step in steps)
    steps += [load.open_loop(share, best_per_s) for share in OPEN_LOADS]
    steps.append(load.bursts(burst))
    steps += [
        load.interactive(best_per_s),
        load.interactive(best_per_s, ClosedLoop),
        load.interactive(best_per_s, Bulk, ", `Priority: bulk`"),
    ]
    backend = card["backend"]
    failures: dict[str, int] = {}
    for answer in load.answers:
        if answer.status not in (200, 429):
            failures[str(answer.status)] = failures.get(str(answer.status), 0) + 1
    return Report(
        machine=where,
        model=f"{card['name']} {card['version']}, weights {card['weights_sha256'][:12]}",
        backend=f"{backend['name']} {backend['version']}, {backend['device']},"
        f" {backend['precision']}",
        photos=deck.source,
        cards=deck.kinds,
        network_ms=bare_network_ms(deck, backend["name"]),
        steps=steps,
        kinds=kinds,
        masks={
            verdict: sum(answer.verdict == verdict for answer in load.answers)
            for verdict in ("identical", "rounding", "wrong")
        },
        failures=failures,
        burst=burst,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the server, and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("--images", type=Path, help="folder of photos; generated if not given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the report")
    parser.add_argument("--model", type=Path, default=MODEL, help="the network, an ONNX file")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=CLIENTS, help="of the ramp's steps"
    )
    parser.add_argument("--burst", type=int, default=32, help="photos that come at once")
    parser.add_argument("--step-s", type=float, default=4, help="seconds measured of each load")
    parser.add_argument("flags", nargs="*", help="more flags for the server, after --")
    options = parser.parse_args(arguments)
    where = Machine(machine(), os.getloadavg()[0] <= available_cores() / 2)
    print("predicting the masks", file=sys.stderr)
    try:
        deck = given(options.images, options.model) if options.images else generated(options.model)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with serve("--model", str(options.model.resolve()), *options.flags) as server:
        print(f"loading {server.url}", file=sys.stderr)
        report = run(
            deck,
            server.url,
            where,
            clients=sorted({1, *options.clients}),
            burst=options.burst,
            step_s=options.step_s,
        )
    print(write_report(report, options.output))
    print(f"\n{options.output / 'report.html'}", file=sys.stderr)
    return 0 if report.is_good else 1


def _step(
    scenario: Scenario,
    name: str,
    window: Window,
    answers: Sequence[Answer],
    *,
    others: Sequence[Answer] = (),
    clients: int = 0,
    load: float = 0,
) -> Step:
    seconds = window.end - window.start
    # In a closed loop, photos due near the end belong to the next step, which has more clients.
    counted = _answered(answers, window) if clients else _due(answers, window)
    served = [answer for answer in counted if answer.verdict]
    if not served:
        raise RuntimeError(f"{scenario}, {name}: of {len(counted)} photos none was served.")
    latency = [answer.latency_ms for answer in served]
    stages = {
        stage: statistics.fmean(answer.stages_ms.get(stage, 0) for answer in served)
        for stage in STAGES
    }
    mean = statistics.fmean(latency)
    # A run of n photos comes back in n answers, so each answer stands for 1/n of a run. Runs are
    # shared with the clients beside.
    ran = [answer.batch for answer in (*served, *_due(others, window)) if answer.batch]
    return Step(
        scenario=scenario,
        name=name,
        clients=clients,
        load=load,
        seconds=seconds,
        requests=len(counted),
        offered_per_s=len(counted) / seconds,
        answered_per_s=_per_s(answers, window),
        others_per_s=_per_s(others, window),
        mean_ms=mean,
        p50_ms=percentile(latency, 0.5),
        p95_ms=percentile(latency, 0.95),
        p99_ms=percentile(latency, 0.99),
        max_ms=max(latency),
        late_p99_ms=percentile([1000 * (answer.sent - answer.due) for answer in counted], 0.99),
        stages_ms={**stages, "outside": mean - sum(stages.values())},
        batch=len(ran) / sum(1 / batch for batch in ran),
        refused=sum(answer.status == 429 for answer in counted),
        failed=sum(answer.status not in (200, 429) for answer in counted),
        generator_cores=window.generator_cores,
    )


def _kinds(answers: Sequence[Answer]) -> list[Kind]:
    kinds = []
    for name in dict.fromkeys(answer.kind for answer in answers):
        served = [answer for answer in answers if answer.kind == name and answer.verdict]
        if served:
            kinds.append(
                Kind(
                    name,
                    len(served),
                    statistics.median(a.latency_ms for a in served),
                    statistics.median(a.stages_ms["decode"] for a in served),
                    statistics.median(a.stages_ms["encode"] for a in served),
                    statistics.median(a.latency_ms - a.stages_ms["infer"] for a in served),
                )
            )
    return sorted(kinds, key=lambda kind: kind.not_network_ms)


def _due(answers: Sequence[Answer], window: Window) -> list[Answer]:
    return [answer for answer in answers if window.start <= answer.due < window.end]


def _answered(answers: Sequence[Answer], window: Window) -> list[Answer]:
    return [answer for answer in answers if window.start <= answer.answered < window.end]


def _per_s(answers: Sequence[Answer], window: Window) -> float:
    """Masks a second, whenever their photos were due.

    A photo that was in the network at an edge of the window counts in part. A batch is answered
    all at once, which would make the count of a short window jump by the batch's size.
    """
    masks = 0.0
    for answer in answers:
        if answer.verdict:
            end = answer.answered - answer.stages_ms["encode"] / 1000
            infer_s = answer.stages_ms["infer"] / 1000
            within = min(end, window.end) - max(end - infer_s, window.start)
            masks += max(0.0, within) / infer_s
    return masks / (window.end - window.start)


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"


if __name__ == "__main__":
    sys.exit(main())
