"""Ray: a cluster of two nodes on this machine, and what dies on it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import httpx
import pytest

from benchmarks.launch import free_port
from benchmarks.photos import Expected
from model.image import read_photo
from tests.conftest import CPU_BACKEND, ROOT, Offline, Sample
from tests.server.bulk.test_bulk import masks, recorded, table

pytest.importorskip("ray", reason="needs Ray: pip install -r requirements-ray.txt")

from benchmarks.ray_cluster import SEGMENTER, RayService, ray_service, wait_for
from server.ray_app import app

pytestmark = pytest.mark.slow

BULK_PHOTOS = int(os.environ.get("SLSNET_RAY_PHOTOS", "96"))
"""2,000 take minutes, and say no more."""

# How Ray Data's actors call themselves.
WORKER = "ray::MapWorker"


@pytest.fixture(scope="module")
def deployed() -> Iterator[RayService]:
    with ray_service() as service:
        yield service


@dataclass
class Ledger:
    """What became of the requests of all clients."""

    sent: int = 0
    answered: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def has_answered(self, enough: int) -> bool:
        return self.answered >= enough

    def balances(self) -> bool:
        return not self.wrong and self.sent == self.answered + self.refused


class Load:
    """Clients that send photos and look at the masks, until told to stop."""

    def __init__(self, url: str, photos: list[Sample], offline: Offline, clients: int = 8) -> None:
        self.ledger = Ledger()
        self._url = url
        self._photos = photos
        self._expected = []
        for photo in photos:
            read = read_photo(photo.data)
            self._expected.append(Expected(offline.probability(read), read.width, read.height))
        self._stop = threading.Event()
        self._clients = clients

    def __enter__(self) -> Ledger:
        self._pool = ThreadPoolExecutor(self._clients)
        self._sending = [self._pool.submit(self._send, n) for n in range(self._clients)]
        return self.ledger

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._sending:
            client.result()
        self._pool.shutdown()

    def _send(self, number: int) -> None:
        ledger = self.ledger
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._stop.is_set():
                number = (number + 1) % len(self._photos)
                with ledger.lock:
                    ledger.sent += 1
                trouble = ""
                try:
                    response = client.post(
                        "/segment",
                        content=self._photos[number].data,
                        headers={"Content-Type": "image/jpeg"},
                    )
                except httpx.HTTPError as error:
                    trouble = repr(error)
                else:
                    if response.status_code == 429:
                        # Never accepted.
                        with ledger.lock:
                            ledger.refused += 1
                        continue
                    if response.status_code != 200:
                        trouble = f"{response.status_code}: {response.text}"
                    elif self._expected[number].verdict(response.content, "fp32") == "wrong":
                        trouble = f"a wrong mask of photo {number}"
                with ledger.lock:
                    if trouble:
                        ledger.wrong.append(trouble)
                    else:
                        ledger.answered += 1


def test_the_service_is_the_same_on_ray(deployed: RayService, photos: list[Sample]) -> None:
    with httpx.Client(base_url=deployed.url, timeout=60) as client:
        assert client.get("/health/ready").json() == {"status": "ready", "backend": CPU_BACKEND}
        response = client.post(
            "/segment",
            params={"format": "json"},
            files={"file": photos[0].data},
            headers={"X-Request-ID": "mine"},
        )
        assert response.status_code == 200
        assert response.json()["lesion"]["found"]
        assert response.headers.get_list("X-Request-ID") == ["mine"]
        assert "infer" in response.headers["Server-Timing"]
        batch = client.post("/segment/batch", files=[("a", photos[0].data), ("b", b"no photo")])
        assert sorted(line["status"] for line in map(httpx.Response.json, _lines(batch))) == [
            200,
            415,
        ]
        assert client.get("/nothing").status_code == 404
        assert client.post("/segment", content=b"").status_code == 400
        assert client.head("/model").status_code == 200
        assert client.get("/v2/models/slsnet").json()["name"] == "slsnet"
        metrics = client.get("/metrics").text
    assert metrics.count("slsnet_ready{replica=") == 2, "of every replica"


def _lines(response: httpx.Response) -> list[httpx.Response]:
    return [httpx.Response(200, content=line) for line in response.content.splitlines()]


def test_too_much_is_refused_as_anywhere(deployed: RayService) -> None:
    body = bytes(65 * 2**20)
    response = httpx.post(
        f"{deployed.url}/segment",
        content=body,
        headers={"Content-Type": "image/jpeg"},
        timeout=60,
    )
    assert response.status_code == 413
    assert response.headers["Content-Type"] == "application/problem+json"


def test_a_replica_that_is_killed_under_load_loses_no_request(
    deployed: RayService, photos: list[Sample], offline: Offline
) -> None:
    with Load(deployed.url, photos, offline) as ledger:
        for enough in (40, 100):
            wait_for(partial(ledger.has_answered, enough))
            victim = deployed.processes(SEGMENTER)[0]
            victim.kill()
            # The raylet's child, so it may stay as a zombie for a moment.
            wait_for(lambda: victim not in deployed.processes(SEGMENTER))  # noqa: B023
        wait_for(lambda: len(deployed.processes(SEGMENTER)) == 2)
        before = ledger.answered
        wait_for(lambda: ledger.answered >= before + 20)
    assert ledger.balances(), ledger.wrong


def test_scaling_down_under_load_loses_no_request(
    deployed: RayService, photos: list[Sample], offline: Offline
) -> None:
    with Load(deployed.url, photos, offline) as ledger:
        wait_for(lambda: ledger.answered >= 20)
        deployed.deploy(replicas=1)
        before = ledger.answered
        wait_for(lambda: ledger.answered >= before + 20)
    assert ledger.balances(), ledger.wrong


def test_an_archive_on_the_cluster_killed_and_resumed_has_every_photo_once(
    deployed: RayService, tmp_path: Path, many_photos: list[Sample], data_dir: Path | None
) -> None:
    archive, results = tmp_path / "archive", tmp_path / "results"
    archive.mkdir()
    if data_dir is not None:
        taken = islice(sorted(data_dir.rglob("*.jpg")), BULK_PHOTOS - 1)
        photos = (path.read_bytes() for path in taken)
    else:
        photos = (many_photos[index % 200].data for index in range(BULK_PHOTOS - 1))
    for index, photo in enumerate(photos):
        (archive / f"{index}.jpg").write_bytes(photo)
    (archive / "broken.jpg").write_bytes(many_photos[0].data[:1000])

    def start() -> subprocess.Popen[bytes]:
        flags = ["--ray", deployed.address]
        arguments = [sys.executable, "-m", "server.bulk", str(archive), str(results), *flags]
        return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE)

    with start() as process:
        wait_for(lambda: any(results.rglob("*.png")) or process.poll() is not None)
        # The database is nobody else's to read meanwhile; its journal grows with every row.
        journal = results / "state.sqlite-wal"
        listed = journal.stat().st_size
        enough = listed + BULK_PHOTOS // 6 * 4096
        wait_for(lambda: journal.stat().st_size >= enough or process.poll() is not None)
        assert process.poll() is None
        process.kill()
    assert process.returncode == -signal.SIGKILL
    wait_for(lambda: not deployed.processes(WORKER))
    done = recorded(results)
    written = masks(results)
    before = {name: written[name] for name in written if name_of(name) in done}
    assert 0 < len(before) < BULK_PHOTOS

    with start() as process:
        wait_for(lambda: deployed.processes(WORKER) or process.poll() is not None)
        for worker in deployed.processes(WORKER)[:1]:
            worker.kill()
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    assert process.returncode == 1, errors
    lines = table(results)
    assert len(lines) == BULK_PHOTOS
    statuses = {path for path, line in lines.items() if line["status"] != "ok"}
    assert statuses == {"broken.jpg"}
    assert set(masks(results)) == {line["mask"] for line in lines.values() if line["mask"]}
    assert before.items() <= masks(results).items(), "what was done is not run again"


def name_of(mask: str) -> str:
    return f"{Path(mask).stem}.jpg"


def test_what_ray_does_itself_is_not_set_here() -> None:
    with pytest.raises(ValueError, match="port: set this where Ray Serve has it"):
        app({"port": 8000})


def test_a_cluster_that_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"")
    command = [sys.executable, "-m", "server.bulk", "photos", "results", "--ray"]
    port = free_port()
    found = subprocess.run(
        [*command, f"127.0.0.1:{port}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert found.returncode == 2
    assert f"There is no Ray cluster at 127.0.0.1:{port}" in found.stderr.decode()
