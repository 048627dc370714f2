"""Many clients at once: nobody gets another's mask, and each photo runs once."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support.answers import figures, read_png
from tests.support.held import serve_held
from tests.support.launch import ServerProcess
from tests.support.offline import Offline
from tests.support.samples import Sample
from tests.support.waiting import until
from tests.support.wire import connect

CLIENTS = 8


def batch_statistics(server: ServerProcess) -> tuple[float, float]:
    """Images and batches that ran so far."""
    values = figures(server)
    return values["slsnet_batch_size_sum"], values["slsnet_batch_size_count"]


@pytest.mark.parametrize("count", [64, pytest.param(200, marks=pytest.mark.thorough)])
def test_photos_from_8_clients_equal_the_offline_prediction(
    server: ServerProcess, many_photos: list[Sample], offline: Offline, count: int
) -> None:
    images_before, batches_before = batch_statistics(server)

    def send(photos: list[Sample]) -> list[bytes]:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            return [
                client.post("/segment", files={"file": photo.data}).raise_for_status().content
                for photo in photos
            ]

    with ThreadPoolExecutor(CLIENTS) as clients:
        shares = [many_photos[start:count:CLIENTS] for start in range(CLIENTS)]
        answers = list(clients.map(send, shares))

    images, batches = batch_statistics(server)
    assert images - images_before == count
    # On a CPU a photo that waits gets a thread of its own, not a place in a batch.
    assert batches - batches_before == count
    for photos, masks in zip(shares, answers, strict=True):
        for photo, mask in zip(photos, masks, strict=True):
            np.testing.assert_array_equal(read_png(mask), offline.mask(photo.data), photo.name)


@pytest.mark.usefixtures("small_networks")
def test_photos_that_nobody_waits_for_any_more_are_not_run(
    tmp_path: Path, photos: list[Sample]
) -> None:
    data = photos[0].data
    request = (
        b"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
        b"Content-Length: %d\r\n\r\n" % len(data)
    )

    # Clients that are patient enough for any machine: who would wait too long is refused at once.
    patient = ("--decode-threads", "1", "--request-timeout-ms", "600000")
    with (
        serve_held(tmp_path, *patient) as (server, hold),
        ThreadPoolExecutor(2) as client,
    ):
        url = f"{server.url}/segment"
        with hold():
            # One runs, and the next is with the network's threads already.
            first = [client.submit(httpx.post, url, content=data, timeout=600) for _ in range(2)]
            until(lambda: figures(server)["slsnet_requests_in_flight"] == 2)
            gone = [connect(server) for _ in range(32)]
            for connection in gone:
                connection.sendall(request + data)
            until(lambda: figures(server)["slsnet_queue_depth"] >= 32)
            for connection in gone:
                connection.close()
            # As long as this machine's pace asks for, or it would be refused and never queued.
            for timeout_ms in (500 * 2**n for n in range(10)):
                headers = {"X-Request-Timeout-Ms": str(timeout_ms)}
                late = httpx.post(url, content=data, headers=headers, timeout=600)
                if late.status_code != 429:
                    break
            assert late.status_code == 504
        assert [answer.result().status_code for answer in first] == [200, 200]
        until(lambda: figures(server)["slsnet_requests_in_flight"] == 0)
        assert figures(server, reason="client_gone")["slsnet_dropped_total"] == 32
        assert figures(server, reason="deadline")["slsnet_dropped_total"] == 1
        assert batch_statistics(server) == (2, 2)
        assert figures(server)["slsnet_bytes_in_flight"] == 0


def test_a_bad_photo_among_good_ones_fails_alone(
    server: ServerProcess, photos: list[Sample], offline: Offline
) -> None:
    def send(index: int) -> httpx.Response:
        data = photos[index].data
        if index == 3:
            data = data[: len(data) // 2]
        return httpx.post(f"{server.url}/segment", content=data, timeout=60)

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(send, range(8)))
    assert [answer.status_code for answer in answers] == [422 if n == 3 else 200 for n in range(8)]
    for index in (2, 4):
        mask = read_png(answers[index].content)
        np.testing.assert_array_equal(mask, offline.mask(photos[index].data))


@pytest.mark.usefixtures("small_networks")
def test_photos_are_not_decoded_long_before_the_network_can_run_them(
    tmp_path: Path, photos: list[Sample]
) -> None:
    def sent(client: ThreadPoolExecutor, url: str, data: bytes) -> list[Future[httpx.Response]]:
        return [client.submit(httpx.post, url, content=data, timeout=600) for _ in range(48)]

    patient = ("--decode-threads", "1", "--request-timeout-ms", "600000", "--max-batch", "1")
    with serve_held(tmp_path, *patient) as (server, hold), ThreadPoolExecutor(50) as client:
        url = f"{server.url}/segment"
        with hold():
            good = sent(client, url, photos[0].data)
            # The network has two, and as many as can follow are decoded; no thread does more.
            until(lambda: figures(server)["slsnet_queue_depth"] == 46)
            broken = client.submit(httpx.post, url, content=photos[0].data[:2000], timeout=600)
            # It waits too: nobody has come to look at it yet.
            until(lambda: figures(server)["slsnet_queue_depth"] == 47)
            assert figures(server)["slsnet_queue_age_seconds"] > 0
            assert not broken.done()
        assert {answer.result().status_code for answer in good} == {200}
        assert broken.result().status_code == 422
        assert figures(server)["slsnet_queue_depth"] == 0
