"""`--workers`: several processes on one port that crash, drain and are counted as one server."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.launch import ServerProcess, serve
from tests.conftest import Sample, until
from tests.server.test_drain import Ledger, keep_sending, masks_of
from tests.server.test_load import figures


@pytest.fixture
def pair() -> Iterator[ServerProcess]:
    with serve("--workers", "2", "--drain-grace-s", "0.5") as server:
        until(lambda: server.log().count(" ready: ") == 2)
        try:
            yield server
        finally:
            children = workers(server)
            if server.process.poll() is None:
                server.process.kill()
                server.process.wait()
            for child in children:
                if child.is_running():
                    child.kill()


def workers(server: ServerProcess) -> list[psutil.Process]:
    try:
        return psutil.Process(server.process.pid).children()
    except psutil.NoSuchProcess:
        return []


def metrics_folder(server: ServerProcess) -> Path:
    return Path(workers(server)[0].environ()["PROMETHEUS_MULTIPROC_DIR"])


def test_metrics_are_of_all_workers_and_survive_one(
    pair: ServerProcess, photos: list[Sample]
) -> None:
    def send(photo: Sample) -> None:
        answer = httpx.post(f"{pair.url}/segment", content=photo.data, timeout=60)
        assert answer.status_code == 200

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(send, photos * 2))
    assert figures(pair)["slsnet_batch_size_sum"] == 2 * len(photos)
    first = workers(pair)[0]
    first.kill()
    until(lambda: len(workers(pair)) == 2 and first not in workers(pair))
    until(lambda: pair.log().count(" ready: ") == 3)
    assert "another one starts" in pair.log()
    send(photos[0])
    assert figures(pair)["slsnet_batch_size_sum"] == 2 * len(photos) + 1

    def in_flight() -> float:
        values = figures(pair)
        return values["slsnet_requests_in_flight"] + values["slsnet_bytes_in_flight"]

    # Of the worker that was killed nothing is left; of the others it is what they saw last.
    until(lambda: in_flight() == 0)
    text = httpx.get(f"{pair.url}/metrics").text
    pids = {process.pid for process in workers(pair)}
    until(
        lambda: all(
            f'process_open_fds{{pid="{pid}"}}' in httpx.get(f"{pair.url}/metrics").text
            for pid in pids
        )
    )
    assert f'process_open_fds{{pid="{first.pid}"}}' not in text


def test_sigterm_drains_all_workers_and_loses_nothing(
    pair: ServerProcess, photos: list[Sample]
) -> None:
    folder = metrics_folder(pair)
    children = workers(pair)
    masks = masks_of(pair, photos[:6])
    with ThreadPoolExecutor(6) as clients:
        started = threading.Event()
        sending = [
            clients.submit(keep_sending, pair, photo, mask, started)
            for photo, mask in zip(photos, masks, strict=False)
        ]
        assert started.wait(30)
        time.sleep(0.5)
        pair.terminate()
        ledgers: list[Ledger] = [future.result() for future in sending]
        assert pair.wait() == 0
    assert [ledger.lost for ledger in ledgers] == [""] * 6
    assert all(ledger.answered for ledger in ledgers)
    assert not any(child.is_running() for child in children)
    assert not folder.exists()


def test_no_worker_outlives_a_supervisor_that_is_killed(pair: ServerProcess) -> None:
    folder = metrics_folder(pair)
    children = workers(pair)
    assert len(children) == 2
    pair.process.kill()
    until(lambda: not any(child.is_running() for child in children))
    until(lambda: not folder.exists())
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{pair.url}/health/live")
    # They drained, whatever number of times they were told.
    assert pair.log().count("Finished server process") == 2


def test_workers_that_cannot_start_end_the_supervisor(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a network")
    flags = ("--workers", "2", "--model", str(broken))
    with pytest.raises(RuntimeError, match="not ready") as error, serve(*flags):
        pass
    assert str(broken) in str(error.value)


def test_sighup_reaches_all_workers(pair: ServerProcess) -> None:
    os.kill(pair.process.pid, signal.SIGHUP)
    until(lambda: pair.log().count(" ready: ") == 4)
    assert len(workers(pair)) == 2
    assert isinstance(pair.process, subprocess.Popen)
