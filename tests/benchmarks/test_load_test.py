"""The load test itself, for a few seconds: what it reports has to hang together."""

import html
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.launch import ServerProcess
from tests.support.lesions import drawn_photo
from tests.support.waiting import until

NAME = "Jane_Doe_1970"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few photos whose names and metadata nobody must read in a report."""
    folder = tmp_path_factory.mktemp("photos")
    for seed, (suffix, width, height) in enumerate(
        [("jpg", 600, 450), ("jpg", 300, 200), ("png", 200, 300), ("webp", 128, 128)]
    ):
        image_format = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix]
        data = drawn_photo(seed, width, height, image_format)
        (folder / f"{NAME}_{seed}.{suffix}").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def results(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run's report."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks.load", "--images", str(images)]
    command += ["--output", str(folder), "--step-s", "0.5", "--clients", "4", "--burst", "6"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(scope="module")
def report(results: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((results / "report.json").read_text(encoding="utf-8"))
    return figures


def steps(report: dict[str, Any], scenario: str) -> list[dict[str, Any]]:
    return [step for step in report["steps"] if step["scenario"] == scenario]


def test_every_mask_is_checked_and_right(report: dict[str, Any]) -> None:
    assert report["masks"]["wrong"] == 0
    assert report["failures"] == {}
    measured = sum(step["requests"] for step in report["steps"])
    assert sum(report["masks"].values()) >= measured >= 5 * len(report["steps"])


def test_every_load_is_there(report: dict[str, Any]) -> None:
    assert [step["clients"] for step in steps(report, "ramp")] == [1, 4]
    assert [step["load"] for step in steps(report, "open loop")] == [0.5, 0.8, 1.2]
    assert len(steps(report, "burst")) == 1
    assert [step["name"] for step in steps(report, "priority")] == [
        "alone",
        "beside 8 clients",
        "beside 8 clients, `Priority: bulk`",
    ]
    assert {kind["name"] for kind in report["kinds"]} <= set(report["cards"])


def test_a_closed_loop_keeps_all_its_clients_busy(report: dict[str, Any]) -> None:
    """Little's law, as an inequality that no noise breaks."""
    for step in steps(report, "ramp"):
        clients, seconds = step["clients"], step["seconds"]
        # Each client waits for one photo after another: together they wait for the whole step, but
        # for a part of one photo at either end.
        waited = step["requests"] * step["mean_ms"] / 1000
        ends = clients * step["max_ms"] / 1000
        assert 0.7 * clients * seconds - ends < waited < clients * seconds + ends
        assert abs(step["answered_per_s"] * seconds - step["requests"]) <= clients


def test_an_open_loop_offers_the_rate_that_it_names(report: dict[str, Any]) -> None:
    for step in steps(report, "open loop"):
        rate = step["load"] * report["best_per_s"]
        # Four photos come in every 4/rate seconds, wherever within them the window ends.
        assert abs(step["offered_per_s"] - rate) * step["seconds"] <= 5


def test_latency_is_the_sum_of_its_parts_and_percentiles_rise(report: dict[str, Any]) -> None:
    for step in report["steps"]:
        assert 0 < step["p50_ms"] <= step["p95_ms"] <= step["p99_ms"] <= step["max_ms"]
        assert sum(step["stages_ms"].values()) == pytest.approx(step["mean_ms"])
        assert all(value >= 0 for value in step["stages_ms"].values())
        assert step["stages_ms"]["infer"] > 0


def test_photos_a_run_are_reported_and_at_most_those_waiting(report: dict[str, Any]) -> None:
    """On a CPU photos that wait run on a core each, so no batch is formed; a GPU forms them."""
    lone, loaded = steps(report, "ramp")
    assert lone["batch"] == 1
    assert 1 <= loaded["batch"] <= 4
    assert 1 <= steps(report, "burst")[0]["batch"] <= 6


def test_the_knee_follows_from_the_ramp(report: dict[str, Any]) -> None:
    lone, _ = ramp = steps(report, "ramp")
    best = max(step["answered_per_s"] for step in ramp)
    assert report["best_per_s"] == best
    assert report["knee_clients"] == pytest.approx(best * lone["mean_ms"] / 1000)
    assert report["saturated_at_clients"] in (1, 4)


def test_the_report_reads_the_same_in_both_forms_and_stands_alone(results: Path) -> None:
    markdown = (results / "report.md").read_text(encoding="utf-8")
    page = (results / "report.html").read_text(encoding="utf-8")
    plots = re.findall(r"!\[.+\]\((.+\.svg)\)", markdown)
    assert len(plots) == page.count("<svg") == 5
    assert all((results / plot).read_text(encoding="utf-8").startswith("<svg") for plot in plots)
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and "---" not in line]
    assert page.count("<tr>") == len(rows)
    for cell in rows[1].strip("| ").split(" | "):
        assert f"<td>{html.escape(cell)}</td>" in page
    assert not re.search(r"""(src|href)=["']?http|<script|@import""", page)


def test_nothing_written_names_a_photo(results: Path, images: Path) -> None:
    for file in results.iterdir():
        text = file.read_text(encoding="utf-8")
        assert NAME not in text and str(images) not in text


@pytest.fixture
def open_loop(server: ServerProcess, images: Path) -> Iterator[subprocess.Popen[str]]:
    """Locust by hand: four photos a second for 10 s."""
    command = [sys.executable, "-m", "locust", "-f", "benchmarks/locustfile.py", "--headless"]
    command += ["--host", server.url, "--run-time", "10s", "--stop-timeout", "60", "--rate", "4"]
    command += ["--images", str(images), "--json", "OpenLoop"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_stopped_client_still_counts_latency_from_the_due_time(
    open_loop: subprocess.Popen[str], server: ServerProcess
) -> None:
    """Given an open loop, when the client itself stands still for 2 s, then what was due meanwhile
    counts from when it was due, not from when it was sent at last."""
    before = len(server.log())
    until(lambda: server.log().count("POST /segment", before) >= 3)
    open_loop.send_signal(signal.SIGSTOP)
    time.sleep(2)
    open_loop.send_signal(signal.SIGCONT)
    output, errors = open_loop.communicate(timeout=600)
    assert open_loop.returncode == 0, errors
    entries = json.loads(output)
    latencies = [
        float(ms)
        for entry in entries
        for ms, count in entry["response_times"].items()
        for _ in range(count)
    ]
    # Eight were due meanwhile, the first within half a second, and waited a second on average.
    assert max(latencies) > 1500
    assert sum(ms > 500 for ms in latencies) >= 5
