"""SIGTERM: what was accepted is answered, readiness says no, and the process ends with 0."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from benchmarks.launch import ServerProcess, serve
from tests.conftest import Sample, until


@dataclass
class Ledger:
    """What became of the requests of one client."""

    answered: int = 0
    refused: bool = False
    lost: str = ""


def masks_of(server: ServerProcess, photos: list[Sample]) -> list[bytes]:
    """What it answers to each while it has nothing else to do."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        answers = [client.post("/segment", content=photo.data) for photo in photos]
    masks = [answer.raise_for_status().content for answer in answers]
    # Or nobody would see that two were mixed up.
    assert len(set(masks)) == len(masks)
    return masks


def keep_sending(
    server: ServerProcess, photo: Sample, mask: bytes, started: threading.Event
) -> Ledger:
    """Send until the port is closed."""
    ledger = Ledger()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while not ledger.refused and not ledger.lost:
            try:
                response = client.post("/segment", files={"file": photo.data})
            except httpx.ConnectError:
                ledger.refused = True
            except httpx.HTTPError as error:
                ledger.lost = repr(error)
            else:
                assert response.status_code == 200
                assert response.content == mask
                ledger.answered += 1
                started.set()
    return ledger


def test_sigterm_under_load_loses_nothing(photos: list[Sample]) -> None:
    with serve("--drain-grace-s", "3") as server, ThreadPoolExecutor(8) as clients:
        masks = masks_of(server, photos[:8])
        started = threading.Event()
        ledgers = [
            clients.submit(keep_sending, server, photo, mask, started)
            for photo, mask in zip(photos, masks, strict=False)
        ]
        assert started.wait(30)
        time.sleep(0.5)
        server.terminate()
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        ready = httpx.get(f"{server.url}/health/ready")
        assert "going down" in ready.json()["detail"]
        live = httpx.get(f"{server.url}/health/live")
        assert live.status_code == 200
        assert live.headers["connection"] == "close"
        results = [ledger.result() for ledger in ledgers]
        assert server.wait() == 0
        assert [ledger.lost for ledger in results] == [""] * 8
        assert all(ledger.answered for ledger in results)


def test_idle_server_ends_with_0() -> None:
    with serve("--drain-grace-s", "0") as server:
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0


def test_a_log_on_a_full_disk_costs_no_answer_and_no_exit_code(photos: list[Sample]) -> None:
    program = """
import os, runpy, sys
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
sys.argv[0] = "server"
runpy.run_module("server", run_name="__main__", alter_sys=True)
"""
    # Python's own buffers are what is tried here.
    with serve(command=["-c", program], environment={"PYTHONUNBUFFERED": ""}) as server:
        for _ in range(100):
            httpx.get(f"{server.url}/health/live").raise_for_status()
        httpx.post(f"{server.url}/segment", content=photos[0].data).raise_for_status()
        server.terminate()
        assert server.wait() == 0


def test_second_signal_ends_at_once() -> None:
    with serve("--drain-grace-s", "600") as server:
        server.terminate()
        # Until then it may not have heard the first one, and two at once count as one.
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        assert server.process.poll() is None
        server.terminate()
        assert server.wait() == 128 + signal.SIGTERM
