"""Everything at once, and a ledger: each request is answered, and with its own photo's mask."""

import contextlib
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import numpy as np
import psutil

from benchmarks.launch import ServerProcess, serve
from benchmarks.soak import CLIENTS, soak
from tests.conftest import Offline, Sample, until
from tests.server.test_segment import read_png


@dataclass
class Ledger:
    """What became of the requests of one client."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)


def keep_sending(
    server: ServerProcess, photo: Sample, mask: bytes, stop: threading.Event
) -> Ledger:
    ledger = Ledger()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while not stop.is_set():
            try:
                answer = client.post("/segment", content=photo.data)
            except httpx.HTTPError as error:
                ledger.wrong.append(repr(error))
            else:
                if answer.status_code == 200 and answer.content == mask:
                    ledger.right += 1
                else:
                    ledger.wrong.append(f"{answer.status_code}")
    return ledger


def vanish(server: ServerProcess, photo: Sample, sent: int) -> None:
    """A client that sends so many bytes of its body, then is gone."""
    head = (
        b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
        b"Content-Length: %d\r\n\r\n" % len(photo.data)
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head + photo.data[:sent])


def test_good_clients_notice_nothing_of_bad_ones(photos: list[Sample], offline: Offline) -> None:
    flags = ("--head-timeout-s", "2", "--max-connections", "800")
    with serve(*flags) as server, contextlib.ExitStack() as stack:
        masks = [
            httpx.post(f"{server.url}/segment", content=photo.data, timeout=60).content
            for photo in photos[:4]
        ]
        for photo, mask in zip(photos, masks, strict=False):
            np.testing.assert_array_equal(read_png(mask), offline.mask(photo.data))
        stop = threading.Event()
        clients = stack.enter_context(ThreadPoolExecutor(4))
        stack.callback(stop.set)
        sending = [
            clients.submit(keep_sending, server, photo, mask, stop)
            for photo, mask in zip(photos, masks, strict=False)
        ]
        for _ in range(500):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            slow.sendall(b"POST /segment HTTP/1.1\r\nX-A: ")
        for round_ in range(10):
            vanish(server, photos[5], 100)
            vanish(server, photos[6], len(photos[6].data))
            assert httpx.post(f"{server.url}/segment", content=b"bad").status_code == 415
            if round_ % 4 == 0:
                os.kill(server.process.pid, signal.SIGHUP)
            time.sleep(0.2)
        stop.set()
        ledgers = [future.result() for future in sending]
        assert [ledger.wrong for ledger in ledgers] == [[]] * 4
        assert all(ledger.right for ledger in ledgers)
        server.terminate()
        assert server.wait() == 0


def test_a_worker_that_is_killed_loses_only_what_it_held(photos: list[Sample]) -> None:
    with serve("--workers", "2") as server:
        until(lambda: server.log().count(" ready: ") == 2)
        mask = httpx.post(f"{server.url}/segment", content=photos[0].data, timeout=60).content
        stop = threading.Event()
        with ThreadPoolExecutor(4) as clients:
            sending = [
                clients.submit(keep_sending, server, photos[0], mask, stop) for _ in range(4)
            ]
            time.sleep(0.5)
            psutil.Process(server.process.pid).children()[0].kill()
            until(lambda: server.log().count(" ready: ") == 3)
            stop.set()
            ledgers = [future.result() for future in sending]
        # Each client had at most one request there, and knows that it was not answered; while the
        # new worker loads its network it says 503.
        lost = [wrong for ledger in ledgers for wrong in ledger.wrong if wrong != "503"]
        assert len(lost) <= 4
        assert all("Error" in wrong for wrong in lost)
        assert all(ledger.right for ledger in ledgers)
        server.terminate()
        assert server.wait() == 0


def test_overload_is_refused_and_nothing_grows() -> None:
    # Quicker than in half an hour the queue must fill, and slower than then memory settles. Clients
    # are still connecting in the end, while what each request left would be hundreds by then.
    result = soak(10, overload=4)
    assert result.faults(memory=0.15, late=0.1, growth=CLIENTS) == []
