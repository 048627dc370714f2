"""Everything at once, and a ledger: each request is answered, and with its own photo's mask."""

import contextlib
import io
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.support.answers import read_png, refused_connections
from tests.support.clients import masks_of, sending
from tests.support.faulty_server import ENDLESS, POISON
from tests.support.launch import ServerProcess, serve
from tests.support.offline import Offline
from tests.support.samples import Sample
from tests.support.waiting import until
from tests.support.wire import connect


def vanish(server: ServerProcess, photo: Sample, sent: int) -> None:
    """A client that sends so many bytes of its body, then is gone."""
    head = (
        b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
        b"Content-Length: %d\r\n\r\n" % len(photo.data)
    )
    with connect(server) as connection:
        connection.sendall(head + photo.data[:sent])


def test_good_clients_notice_nothing_of_bad_ones(photos: list[Sample], offline: Offline) -> None:
    flags = ("--head-timeout-s", "6", "--max-connections", "800")
    with serve(*flags) as server, contextlib.ExitStack() as stack:
        masks = masks_of(server, photos[:4])
        for photo, mask in zip(photos, masks, strict=False):
            np.testing.assert_array_equal(read_png(mask), offline.mask(photo.data))
        with sending(server, photos, masks) as ledgers:
            for _ in range(500):
                slow = stack.enter_context(connect(server))
                slow.sendall(b"POST /segment HTTP/1.1\r\nX-A: ")
            for round_ in range(10):
                vanish(server, photos[5], 100)
                vanish(server, photos[6], len(photos[6].data))
                assert httpx.post(f"{server.url}/segment", content=b"bad").status_code == 415
                if round_ % 4 == 0:
                    os.kill(server.process.pid, signal.SIGHUP)
                before = [ledger.right for ledger in ledgers]
                until(lambda: all(now.right > n for now, n in zip(ledgers, before, strict=True)))  # noqa: B023
            until(lambda: refused_connections(server, "head_timeout") >= 500)
        assert [ledger.wrong for ledger in ledgers] == [[]] * 4
        server.terminate()
        assert server.wait() == 0


def answers(server: ServerProcess) -> dict[str, float]:
    """How often it says it answered `/segment`, by status."""
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    counts: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            if sample.name == "slsnet_requests_total" and sample.labels["path"] == "/segment":
                status = sample.labels["status"]
                counts[status] = counts.get(status, 0) + sample.value
    return counts


def plain(colour: tuple[int, int, int]) -> bytes:
    """A photo of nothing but this."""
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.usefixtures("small_networks")
def test_a_backend_that_never_comes_back_does_not_hold_up_the_end() -> None:
    flags = ("--drain-grace-s", "0", "--drain-timeout-s", "1", "--request-timeout-ms", "5000")
    with serve(*flags, command=["-m", "tests.support.faulty_server"]) as server:
        answer = httpx.post(f"{server.url}/segment", content=plain(ENDLESS))
        assert answer.status_code == 504
        server.terminate()
        assert server.wait() == 1
        assert "something does not end" in server.log()


@pytest.mark.usefixtures("small_networks")
def test_a_backend_that_raises_now_and_then_costs_no_answer_but_the_bad_photos(
    photos: list[Sample],
) -> None:
    poisoned = plain(POISON)

    def alternate(mask: bytes, stop: threading.Event) -> tuple[int, set[int]]:
        """Good and bad in turn: the bad one alone would be a backend that always fails."""
        bad: list[int] = []
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not stop.is_set():
                bad.append(client.post("/segment", content=poisoned).status_code)
                good = client.post("/segment", content=photos[0].data)
                assert good.status_code == 200
                assert good.content == mask
        return len(bad), set(bad)

    with serve(command=["-m", "tests.support.faulty_server"]) as server:
        masks = masks_of(server, photos[:5])
        stop = threading.Event()
        with ThreadPoolExecutor(1) as client, contextlib.ExitStack() as stack:
            stack.callback(stop.set)
            ledgers = stack.enter_context(sending(server, photos[1:5], masks[1:]))
            bad = client.submit(alternate, masks[0], stop)
            until(lambda: server.log().count("one in seven") >= 5 or bad.done())
        sent, statuses = bad.result()
        assert [ledger.wrong for ledger in ledgers] == [[]] * 4
        assert statuses == {500}
        good = sum(ledger.right for ledger in ledgers) + sent + len(masks)
        until(lambda: answers(server) == {"200": good, "500": sent})
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
        server.terminate()
        assert server.wait() == 0


@pytest.mark.usefixtures("small_networks")
def test_a_clock_that_jumps_loses_nothing(photos: list[Sample], tmp_path: Path) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("no libfaketime here")
    clock = tmp_path / "clock"
    clock.write_text("+0", encoding="ascii")
    environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        # Read now and then, not at each look at the clock, of which a server has thousands.
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    today = datetime.now()
    with serve("--drain-grace-s", "0.5", environment=environment) as server:
        masks = masks_of(server, photos[:4])
        with sending(server, photos, masks) as ledgers:
            for days in (1, -1, 1):
                clock.write_text(f"{days * 86400:+d}", encoding="ascii")
                # Over midnight it is a day more.
                dates = {f"\n{today + timedelta(days + more):%Y-%m-%d}" for more in (0, 1)}
                said = len(server.log())
                until(lambda: any(date in server.log()[said:] for date in dates))  # noqa: B023
                until(lambda: server.log()[said:].count("/segment 200") > 20)  # noqa: B023
        assert [ledger.wrong for ledger in ledgers] == [[]] * 4
        good = sum(ledger.right for ledger in ledgers) + len(masks)
        until(lambda: answers(server) == {"200": good})
        server.terminate()
        assert server.wait() == 0


@pytest.mark.usefixtures("small_networks")
def test_a_worker_that_is_killed_loses_only_what_it_held(photos: list[Sample]) -> None:
    with serve("--workers", "2") as server:
        until(lambda: server.log().count(" ready: ") == 2)
        masks = masks_of(server, photos[:4])
        with sending(server, photos, masks) as ledgers:
            until(lambda: all(ledger.right > 2 for ledger in ledgers))
            psutil.Process(server.process.pid).children()[0].kill()
            until(lambda: server.log().count(" ready: ") == 3)
        # Each client had at most one request there, and knows that it was not answered; while the
        # new worker loads its network it says 503.
        lost = [wrong for ledger in ledgers for wrong in ledger.wrong if wrong != "503"]
        assert len(lost) <= 4
        assert all("Error" in wrong for wrong in lost)
        assert not any(ledger.is_refused for ledger in ledgers)
        # What it had counted is counted still; only what it held may be on one side alone.
        right = sum(ledger.right for ledger in ledgers) + len(masks)
        assert abs(answers(server)["200"] - right) <= 4
        server.terminate()
        assert server.wait() == 0
