"""The comparison with other servers: its client, its figures, and all of it in a small plan."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

import benchmarks.pages
import benchmarks.peers.__main__ as command_line
from benchmarks.peers.__main__ import QUICK, Job, Run, done, jobs, main
from benchmarks.peers.client import LOST, Answer, Load, at_once, closed_loop, open_loop, post
from benchmarks.peers.entrants import ENTRANTS, OURS, Entrant
from benchmarks.peers.figures import (
    STOCK,
    Aim,
    Bare,
    Comparison,
    Missing,
    Network,
    Overload,
    PhotoPath,
    Setting,
    Step,
    Visit,
    bad_photo_of,
    overload_of,
    step_of,
    stop_of,
)
from benchmarks.peers.measure import Deck, Masks, measure_bare
from benchmarks.peers.overload import Round, table
from benchmarks.peers.processes import Running, Unavailable
from benchmarks.peers.report import write_report
from benchmarks.percentiles import percentile
from photos.image import encode_png
from tests.support import ROOT
from tests.support.waiting import until

OK = b"HTTP/1.1 200 OK\r\n"
LATER = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n"


class Scripted:
    """Answers each path with its pieces, one after another; no pieces end the connection."""

    def __init__(self, answers: dict[str, Sequence[bytes]]) -> None:
        self._answers = answers
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listening.getsockname()[1]
        self.requests: list[bytes] = []
        self.answered = 0
        """Whole answers that were sent."""
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb") as stream:
            while line := stream.readline():
                length = 0
                while (header := stream.readline()) not in (b"\r\n", b""):
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                self.requests.append(stream.read(length))
                pieces = self._answers[line.split()[1].decode()]
                if not pieces:
                    return
                for piece in pieces:
                    try:
                        connection.sendall(piece)
                    except OSError:
                        return
                    time.sleep(0.002)
                self.answered += 1


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    servers = []

    def start(**answers: Sequence[bytes]) -> Scripted:
        servers.append(Scripted({f"/{path}": pieces for path, pieces in answers.items()}))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ask(path: str, body: bytes = b"photo") -> bytes:
    return post(f"/{path}", body, {"Content-Type": "image/jpeg"})


def test_answers_are_read_however_they_arrive(scripted: Callable[..., Scripted]) -> None:
    whole = OK + b"Content-Type: image/png\r\nContent-Length: 4\r\n\r\nmask"
    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n3;x=1\r\nmas\r\n1\r\nk\r\n0\r\n\r\n"
    server = scripted(
        whole=[whole],
        bytewise=[whole[i : i + 1] for i in range(len(whole))],
        chunked=[chunked],
        pieces=[chunked[:20], chunked[20:70], chunked[70:]],
        later=[LATER],
        cut=[whole[:-1], b""],
        ended=[],
    )
    paths = ["whole", "bytewise", "chunked", "pieces", "later", "ended"]
    answers = at_once(server.port, [ask(path) for path in paths])
    assert [answer.status for answer in answers] == [200, 200, 200, 200, 429, LOST]
    assert [answer.body for answer in answers[:4]] == [b"mask"] * 4
    assert [answer.retry_after for answer in answers] == [False] * 4 + [True, False]
    assert server.requests == [b"photo"] * len(paths)
    assert at_once(server.port, [ask("cut")], timeout_s=0.3)[0].status == LOST


def test_a_closed_loop_counts_what_ends_within_it(scripted: Callable[..., Scripted]) -> None:
    server = scripted(mask=[OK + b"Content-Length: 4\r\n\r\nmask"], later=[LATER])
    load = closed_loop(
        server.port, [ask("mask"), ask("later")], clients=3, seconds=0.2, lead_s=0.1, fewest=4
    )
    assert len(load.answers) >= 4
    assert {answer.status for answer in load.answers} == {200, 429}
    assert all(load.started <= answer.ended for answer in load.answers)
    assert all(answer.due < answer.ended for answer in load.answers)
    # More were sent: in the lead, and when the time was up.
    assert len(server.requests) > len(load.answers)
    assert any(answer.body == b"mask" for answer in load.answers)


def test_a_closed_loop_leaves_no_work_behind(scripted: Callable[..., Scripted]) -> None:
    """Given an answer that takes longer than the stretch, when that ends, it is waited for."""
    head = OK + b"Content-Length: 200\r\n\r\n"
    server = scripted(slow=[head, *[b"m"] * 200])
    load = closed_loop(server.port, [ask("slow")], clients=2, seconds=0.05)
    assert not load.answers
    assert len(server.requests) == 2
    until(lambda: server.answered == 2)


def test_a_server_that_hangs_up_is_asked_on_a_new_connection(
    scripted: Callable[..., Scripted],
) -> None:
    closes = OK + b"Connection: close\r\nContent-Length: 4\r\n\r\nmask"
    server = scripted(closes=[closes], ended=[])
    load = closed_loop(server.port, [ask("closes"), ask("ended")], clients=2, seconds=0.1, fewest=6)
    assert {answer.status for answer in load.answers} == {200, LOST}


def test_an_open_loop_sends_what_is_due_and_counts_from_then(
    scripted: Callable[..., Scripted],
) -> None:
    server = scripted(mask=[OK + b"Content-Length: 4\r\n\r\n", b"mask"])
    load = open_loop(server.port, [ask("mask")], per_s=50, seconds=0.4)
    assert len(load.answers) + load.unsent == 20
    dues = sorted(answer.due - load.started for answer in load.answers)
    assert dues == pytest.approx([n / 50 for n in range(20)])
    # Nobody answers: what is due beyond the connections is not sent.
    silent = socket.create_server(("127.0.0.1", 0))
    with silent:
        port = silent.getsockname()[1]
        load = open_loop(port, [ask("")], per_s=50, seconds=0.2, connections=2, drain_s=0.1)
    assert load.unsent == 8
    assert [answer.status for answer in load.answers] == [LOST] * 2


def load_of(*answers: Answer, started: float = 10, ended: float = 12, unsent: int = 0) -> Load:
    return Load(started, ended, cpu_s=0.5, unsent=unsent, answers=list(answers))


def test_a_percentile_is_a_value_that_happened() -> None:
    values = list(range(1, 101))
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([7.0], 0.99) == 7
    assert percentile([1, 2, 3], 0.99) == 3
    assert percentile([], 0.5) == 0


def test_a_step_counts_masks_and_their_latency_alone() -> None:
    step = step_of(
        load_of(
            Answer(0, 10, 10.1, 200), Answer(1, 10, 10.3, 200), Answer(2, 10, 10.01, 429),
            Answer(3, 10, 11, LOST),
        ),
        8,
    )  # fmt: skip
    assert (step.clients, step.requests, step.failed) == (8, 4, 2)
    assert step.per_s == 1
    assert step.p50_ms == pytest.approx(100)
    assert step.p99_ms == pytest.approx(300)
    assert step.generator_cores == 0.25


def test_an_overload_tells_refused_from_lost_and_late() -> None:
    overload = overload_of(
        load_of(
            Answer(0, 10, 10.5, 200),
            Answer(0, 10.5, 13, 200),  # after the load, which lasted until 12
            Answer(0, 11, 11.1, 429, retry_after=True),
            Answer(0, 11, 11.2, 503),
            Answer(0, 11, 22, LOST),
            unsent=3,
        ),
        per_s=4,
        seconds=2,
    )
    assert (overload.served, overload.served_per_s) == (2, 0.5)
    assert overload.refused == {"429": 1, "503": 1}
    assert (overload.with_retry_after, overload.lost, overload.unsent) == (1, 1, 3)
    assert overload.drained_s == 10


def test_bad_photo_and_its_neighbours_are_reported_separately() -> None:
    def together(*statuses: int) -> list[Answer]:
        return [Answer(i, 0, 1, status) for i, status in enumerate(statuses)]

    bad = bad_photo_of([(0, together(422, 200, 200)), (2, together(200, 422, 422))])
    assert (bad.times, bad.good_failed, bad.statuses) == (2, 1, {"422": 2})


def test_stop_counts_answers_after_the_signal() -> None:
    stop = stop_of(
        load_of(
            Answer(0, 10, 10.5, LOST),
            Answer(0, 10, 11.5, 200),
            Answer(0, 10, 11.6, 503),
            Answer(0, 11, 11.7, LOST),
        ),
        11,
        seconds=0.7,
        exit_code=0,
        survivors=2,
        still_answers=True,
    )
    assert (stop.answered_after, stop.refused, stop.lost) == (1, 1, 1)


def test_masks_may_have_rough_edges_but_no_other_shape() -> None:
    y, x = np.mgrid[:90, :120]
    mask = np.hypot(x - 60, y - 45) < 30
    rough = np.kron(mask[::3, ::3], np.ones((3, 3), bool))
    masks = Masks(ENTRANTS[0], [mask])

    def answer(found: np.ndarray) -> Answer:
        buffer = BytesIO()
        Image.fromarray(found).save(buffer, "PNG")
        return Answer(0, 0, 1, 200, buffer.getvalue())

    ours = encode_png(np.packbits(mask, axis=1), 120, 90)
    masks.check([Answer(0, 0, 1, 200, ours), answer(mask), answer(rough)])
    assert (masks.checked, masks.wrong) == (3, 0)
    assert masks.least_iou < 1
    # Neither refused nor kept: not looked at.
    masks.check([Answer(0, 0, 1, 422, b"{}"), Answer(0, 0, 1, 200)])
    assert masks.checked == 3
    masks.check([answer(~mask), answer(mask[:, :60]), Answer(0, 0, 1, 200, b"no image")])
    assert (masks.checked, masks.wrong, masks.least_iou) == (6, 3, 0)


@pytest.mark.parametrize("entrant", ENTRANTS, ids=lambda entrant: entrant.name)
def test_every_entrant_is_complete(entrant: Entrant) -> None:
    request = entrant.ask(b"\xff\xd8 photo")
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /") and b"Host: " in head
    assert f"Content-Length: {len(body)}".encode() in head
    if not entrant.is_ours:
        assert entrant.version and entrant.settings and entrant.source.startswith("https://")
        assert (ROOT / "benchmarks/peers/servers" / entrant.script).is_file()
        pins = entrant.requirements.read_text(encoding="utf-8").splitlines()
        assert all("==" in pin for pin in pins)


SETTING = Setting("a machine", "abc", "a network", "photos", "2 processes", 1, (1, 1, 1, 1), 1)


def visit_of(entrant: str, network: Network, turn: int, per_s: float, p50_ms: float) -> Visit:
    steps = [
        Step(clients, 100, per_s * share, p50_ms * clients, 2 * p50_ms * clients, 0, 0.1)
        for clients, share in ((1, 0.5), (8, 1), (32, 1), (128, 0.9))
    ]
    return Visit(entrant, network, turn, 1, 100, "", 0.01, steps, 8, 0, 0.97)


@pytest.fixture
def comparison() -> Comparison:
    """Turns of which the second is twice as slow for everybody."""
    visits = [
        visit_of(name, network, turn, per_s / turn, p50_ms)
        for turn in (1, 2)
        for network in ("stub 0 ms", "stub 5 ms", "real")
        for name, per_s, p50_ms in (
            (OURS, 300, 6),
            ("fastapi", 100, 7),
            ("litserve", 150, 17),
            ("triton", 400, 8),
        )
    ]
    bare = [
        Bare(turn, name, {"1": per_s / turn, "8": 1.25 * per_s / turn}, 0.01)
        for turn in (1, 2)
        for name, per_s in ((OURS, 250), ("slsnet-openvino", 125), (STOCK, 100))
    ]
    paths = [PhotoPath(turn, 100 * turn, 600 * turn, 0.01) for turn in (1, 2)]
    return Comparison(SETTING, visits, bare, paths=paths)


def test_ratios_are_of_the_same_turn_and_aims_follow_from_them(comparison: Comparison) -> None:
    found = {aim.measure: aim for aim in comparison.aims()}
    python = found["stub 0 ms, throughput ÷ the best Python peer's (LitServe)"]
    assert python.found == pytest.approx(2) and python.is_met
    triton = found["same ÷ Triton core's"]
    assert triton.found == pytest.approx(0.75) and not triton.is_met
    assert found["same ÷ mosec's"].found is None and not found["same ÷ mosec's"].is_met
    # FastAPI is quicker, but does not batch; Triton does, and waits for nobody.
    lone, lone_waiting = (aim for name, aim in found.items() if name.startswith("lone"))
    assert "Triton" in lone.measure
    assert lone.found == pytest.approx((6 - 5) / (8 - 5)) and lone.is_met
    assert "LitServe" in lone_waiting.measure
    assert lone_waiting.found == pytest.approx((6 - 5) / (17 - 5)) and lone_waiting.is_met
    assert found["real network, throughput ÷ its bare loop's, both with OpenVINO"].found is None
    bare = found["real network, throughput ÷ its bare loop's"]
    assert bare.found == pytest.approx(300 / (1.25 * 250))
    assert found["real, throughput of 128 clients ÷ of 8"].found == pytest.approx(0.9)
    engine = found["bare loop's throughput ÷ that of stock ONNX Runtime, fp32"]
    assert engine.found == pytest.approx(2.5)
    large = next(aim for name, aim in found.items() if name.startswith("6000×4000"))
    assert large.found == pytest.approx(6) and large.is_met


def test_a_disturbed_visit_is_made_again(comparison: Comparison) -> None:
    order = list(jobs([ENTRANTS[0]], ("stub 0 ms",), 1))
    assert not [job for job in order if job.key not in done(comparison)]
    visit = comparison.of(OURS, "stub 0 ms")[0]
    comparison.visits = [replace(visit, others_cores=1.0)]
    assert [job.key for job in order if job.key not in done(comparison)] == [order[0].key]
    comparison.put(Missing("triton", "stub 0 ms", 1, "did not start"))
    comparison.put(replace(visit, others_cores=0.5))
    comparison.put(replace(visit, others_cores=0.7))
    comparison.put(Missing(OURS, "stub 0 ms", 1, "did not start again"))
    assert [visit.others_cores for visit in comparison.visits] == [0.5]
    assert [missing.entrant for missing in comparison.missing] == ["triton"]
    comparison.put(visit_of("triton", "stub 0 ms", 1, 100, 6))
    assert len(comparison.visits) == 2 and not comparison.missing


def test_disturbed_measurement_without_server_is_repeated(comparison: Comparison) -> None:
    order = list(jobs([ENTRANTS[0]], ("real",), 1))
    assert [job.kind for job in order] == ["path", "stock", "bare", "visit"]
    assert not [job for job in order if job.key not in done(comparison)]
    for others_cores in (0.5, 0.7):
        for bare in comparison.bare[:]:
            comparison.bare.remove(bare)
            comparison.put_bare(replace(bare, others_cores=others_cores))
        for path in comparison.paths[:]:
            comparison.paths.remove(path)
            comparison.put_path(replace(path, others_cores=others_cores))
        left = [job.kind for job in order if job.key not in done(comparison)]
        assert left == ["path", "stock", "bare"]
    known = len(comparison.bare)
    comparison.put_bare(replace(comparison.bare[0], others_cores=0.9))
    assert len(comparison.bare) == known
    assert {bare.others_cores for bare in comparison.bare} == {0.7}
    comparison.put_path(replace(comparison.paths[0], others_cores=0.1))
    assert sorted(path.others_cores for path in comparison.paths) == [0.1, 0.7]


def test_a_peer_that_does_not_start_is_not_waited_for_again(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = []

    def fail(entrant: Entrant, *_: object, **__: object) -> Visit:
        visits.append(entrant.name)
        raise Unavailable("no mask")

    monkeypatch.setattr(command_line, "visit", fail)
    fastapi, mosec = (next(e for e in ENTRANTS if e.name == n) for n in ("fastapi", "mosec"))
    run = Run(QUICK, Deck([], {}, Path()), None, ["fastapi", "mosec"], Comparison(SETTING))
    for job in (Job(1, "real", fastapi), Job(1, "stub 0 ms", fastapi), Job(1, "real", mosec)):
        run.do(job)
    assert visits == ["fastapi", "mosec"]
    assert [missing.reason for missing in run.comparison.missing] == ["no mask"] * 3


def test_a_server_that_starts_others_while_it_is_killed_is_ended_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    server = Running(process, 1, "mark", tmp_path / "output.txt")
    seen, killed = iter([[1001], [1002, 1003], []]), list[int]()

    monkeypatch.setattr(server, "pids", lambda: next(seen))
    monkeypatch.setattr(os, "kill", lambda pid, _signal: killed.append(pid))
    server.stop()
    assert killed == [1001, 1002, 1003]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_that_touches_nothing_measured_leaves_a_comparison_valid(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    def commit(name: str, text: str = "x") -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        git("add", ".")
        git("commit", "--quiet", "-m", name)
        return command_line.measured_commit()

    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    assert command_line.measured_commit() == "unknown"
    git("init", "--quiet")
    first = commit("server/a.py")
    assert commit("docs/a.md") == first
    assert commit("server/b.py") != first
    (tmp_path / "server/b.py").write_text("changed")
    assert command_line.measured_commit().endswith("+")


def test_aim_is_a_lower_or_an_upper_bound() -> None:
    assert Aim("", 1.5, 1.5).is_met and not Aim("", 1.5, 1.49).is_met
    assert Aim("", 1 / 3, 0.3, at_most=True).is_met
    assert not Aim("", 1 / 3, 0.34, at_most=True).is_met
    assert Aim("", 1 / 3, None, at_most=True).wanted == "≤ 0.33"


def test_the_report_says_where_a_peer_is_ahead(comparison: Comparison, tmp_path: Path) -> None:
    comparison.visits = [visit for visit in comparison.visits if visit.turn == 1]
    markdown = write_report(comparison, tmp_path)
    ahead = markdown[markdown.index("## Where a peer is ahead") :]
    ahead = ahead[: ahead.index("\n## ")]
    assert (
        "| masks/s, 8 clients | stub 0 ms | Triton core + Python backend | 400 | 300 | 1.33 |"
        in (ahead)
    )
    assert "LitServe" not in ahead
    assert "| same ÷ Triton core's | ≥ 1.00 | 0.75 | **missed** |" in markdown
    assert "| same ÷ mosec's | ≥ 1.00 | – | – |" in markdown
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2


def test_each_measured_figure_can_put_a_peer_ahead(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given turns that differ by two thirds, when a peer is ahead by less, then it is not."""
    # The plots take seconds, and the test before has drawn them.
    monkeypatch.setattr(benchmarks.pages, "_svg", lambda _: "<svg></svg>")

    def troubled(visit: Visit, *, idle: float, per_s: float, seconds: float | None) -> Visit:
        overload = overload_of(Load(0, 1, answers=[]), 1, 1)
        stop = stop_of(Load(), 0, seconds=seconds, exit_code=0, survivors=0, still_answers=False)
        return replace(
            visit,
            others_cores=0.0,
            idle_cores=idle,
            overload=replace(overload, served_per_s=per_s),
            stop=stop,
        )

    assert comparison.spread == pytest.approx((1 - 1 / 2) / 0.75)
    ours = comparison.of(OURS, "stub 5 ms")[0]
    triton = comparison.of("triton", "stub 5 ms")[0]
    litserve = comparison.of("litserve", "stub 5 ms")[0]
    comparison.put(troubled(ours, idle=0.02, per_s=100, seconds=2))
    comparison.put(troubled(triton, idle=0, per_s=200, seconds=0.5))
    comparison.put(troubled(litserve, idle=0.015, per_s=130, seconds=None))
    markdown = write_report(comparison, tmp_path)
    ahead = markdown[markdown.index("## Where a peer is ahead") :]
    ahead = ahead[: ahead.index("\n## ")]
    name = "stub 5 ms | Triton core + Python backend"
    assert f"| idle, % of a core | {name} | 0.50 | 2.00 | 4.00 |" in ahead
    assert f"| masks/s at twice its load | {name} | 200 | 100 | 2.00 |" in ahead
    assert f"| ended after SIGTERM, s | {name} | 0.50 | 2.00 | 4.00 |" in ahead
    assert "LitServe" not in ahead
    assert "masks/s, 8 clients" not in ahead


def test_every_turn_begins_with_another_server_and_goes_on_where_it_stopped(
    comparison: Comparison,
) -> None:
    entrants = [e for e in ENTRANTS if e.name in (OURS, "slsnet-openvino", "fastapi", "triton")]
    order = list(jobs(entrants, ("stub 0 ms", "real"), 2))
    order = [job for job in order if job.kind in ("visit", "bare")]
    assert [job.entrant.name for job in order if job.network == "stub 0 ms"] == [
        OURS, "fastapi", "triton", "triton", OURS, "fastapi",
    ]  # fmt: skip
    assert [str(job) for job in order[-6:]] == [
        "turn 2, real, triton",
        "turn 2, real, slsnet bare",
        "turn 2, real, slsnet",
        "turn 2, real, slsnet-openvino bare",
        "turn 2, real, slsnet-openvino",
        "turn 2, real, fastapi",
    ]
    left = [str(job) for job in order if job.key not in done(comparison)]
    assert left == ["turn 1, real, slsnet-openvino", "turn 2, real, slsnet-openvino"]


def test_a_network_that_does_not_run_here_is_left_out(tmp_path: Path) -> None:
    (ours,) = (entrant for entrant in ENTRANTS if entrant.name == OURS)
    with pytest.raises(Unavailable, match=r"does not run here: .*nothing\.onnx"):
        measure_bare(ours, 1, 0.1, tmp_path / "nothing.onnx")


def run(results: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.peers", "--output", str(results), "--quick"]
    command += ["--servers", OURS, "fastapi", "--here", "fastapi", "--networks", "stub 5 ms"]
    return subprocess.run(
        [*command, "--step-s", "0.1", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.thorough
def test_this_server_beside_the_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given a run that is stopped after its first visit, when it is run again, then it goes on."""
    first = run(tmp_path, "--stop-after-s", "0.001")
    assert first.returncode == 0, first.stderr
    assert "1 visits are left" in first.stderr
    second = run(tmp_path)
    assert second.returncode == 0, second.stderr
    found = TypeAdapter(Comparison).validate_json((tmp_path / "report.json").read_bytes())
    assert [visit.entrant for visit in found.visits] == [OURS, "fastapi"]
    assert not found.missing
    for visit in found.visits:
        assert visit.masks_checked > 0 and visit.masks_wrong == 0
        assert [step.clients for step in visit.steps] == [1, 8, 32, 128]
        # One batch of at most eight at a time, 5 ms each.
        assert all(0 < step.per_s < 8 / 0.005 for step in visit.steps)
        assert all(0 < step.p50_ms <= step.p99_ms for step in visit.steps)
        assert visit.steps[0].p50_ms > 5
        assert visit.memory_mib > 10 and visit.seconds_to_ready > 0
        assert visit.overload and visit.idle_cores is not None
        assert visit.bad_photo and visit.bad_photo.good_failed == 0
        assert visit.bad_photo.statuses == {"422": visit.bad_photo.times}
        assert visit.stop and visit.stop.survivors == 0 and not visit.stop.still_answers
    ours = found.visits[0]
    assert "stub" in ours.backend
    assert ours.stop and (ours.stop.exit_code, ours.stop.lost) == (0, 0)
    assert ours.overload and ours.overload.lost == 0
    assert set(ours.overload.refused) <= {"429"}
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## Where a peer is ahead" in markdown
    # What is of other settings is not mixed in.
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path), "--quick", "--step-s", "2"])
    assert "another step_s" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_ends_the_server_under_test_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.peers", "--output", str(tmp_path / "results")]
    command += ["--servers", OURS, "--networks", "stub 0 ms", "--step-s", "100"]
    folder = tmp_path / "tmp"
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE) as run:
        until(lambda: bool(list(folder.glob("peer-*/output.txt"))))
        mark = next(folder.glob("peer-*")).name
        server = Running(run, 0, mark, folder)
        until(lambda: bool(server.pids()))
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM
        assert not server.pids()
    assert not list(folder.glob("peer-*"))


_STARTS_LOOPS = """
from benchmarks.peers.client import at_once
from benchmarks.peers.processes import end_on_signals

end_on_signals()
print(flush=True)
while True:
    try:
        at_once(1, [b""])
    except OSError:
        pass
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_during_start_of_the_bare_loop_is_not_lost(number: signal.Signals) -> None:
    command = [sys.executable, "-c", _STARTS_LOOPS]
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(8)]
    try:
        for run in runs:
            assert run.stdout is not None
            run.stdout.readline()
            run.send_signal(number)
        assert [run.wait(60) for run in runs] == [128 + number] * len(runs)
    finally:
        for run in runs:
            run.kill()
            run.communicate()


@pytest.mark.slow
def test_stock_onnx_runtime_runs_in_the_bare_loop() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers.bare", "0.1", "--stock"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    per_s = json.loads(run.stdout)
    assert set(per_s) == {"1", "8"}
    assert all(value > 0 for value in per_s.values())


@pytest.mark.slow
def test_the_bare_loop_runs_in_as_many_processes_as_the_server() -> None:
    flags = ["--workers", "2", "--threads", "1", "--max-batch", "2", "--backend", "onnxruntime"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers.bare", "0.2", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    per_s = json.loads(run.stdout)
    assert set(per_s) == {"1", "2"}
    assert all(value > 0 for value in per_s.values())


def test_goodput_under_overload_is_told_beside_the_best_peer() -> None:
    def found(entrant: str, best_per_s: float, served_per_s: float, unsent: int) -> Round:
        at_twice = Overload(2 * best_per_s, 2, 0, served_per_s, 1, 2, {"429": 7}, 7, 0, unsent, 0)
        return Round(entrant, best_per_s, {2.0: at_twice}, {2.0: 0.25})

    rounds = [found("slsnet", 100, served, 0) for served in (70, 90, 80)]
    rounds += [found("mosec", 50, 40, 100), found("litserve", 50, 20, 0)]
    _, _, ours, mosec, litserve = table(rounds, [2.0]).splitlines()
    assert ours == "| slsnet | 2× | 200 | 80 | 0.80 | 2.00 | 2 | 7 | 0 | 0.25 |"
    # All its connections waited, or the load could not send more.
    assert mosec == "| mosec | 2× | 100, 50% sent | 40 | 0.80 | 1.00 | 2 | 7 | 0 | 0.25 |"
    assert litserve.startswith("| litserve | 2× | 100 | 20 | 0.40 | 0.50 |")
