"""Ray: a cluster of two nodes on this machine, and what dies on it."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from photos.image import read_photo
from tests.support import ROOT
from tests.support.expected import Expected
from tests.support.launch import free_port
from tests.support.offline import CPU_BACKEND, Offline
from tests.support.results import masks, recorded, table
from tests.support.samples import Sample
from tests.support.waiting import until

pytest.importorskip("ray", reason="needs Ray: pip install -r requirements-ray.txt")

import ray
from ray.serve.schema import ServeDeploySchema

from server.ray_app import app
from server.settings import Settings
from tests.support.ray_cluster import SEGMENTER, RayService, ray_service

pytestmark = pytest.mark.slow

BULK_PHOTOS = int(os.environ.get("SLSNET_RAY_PHOTOS", "96"))
"""2,000 take minutes (docs/ray.md)."""

# How Ray Data's actors call themselves.
WORKER = "ray::MapWorker"

CPUS = 3
"""Of each node: two for the service, and one for an actor, which takes seconds to start."""

AT_WORK = 2 * CPUS * 3 * 16
"""Photos at most: CPUs of the cluster × blocks that an actor has or has just done × photos."""


@pytest.fixture(scope="module")
def deployed() -> Iterator[RayService]:
    with ray_service(CPUS) as service:
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
        timeout=600,
    )
    assert response.status_code == 413
    assert response.headers["Content-Type"] == "application/problem+json"


def test_a_replica_that_is_killed_under_load_loses_no_request(
    deployed: RayService, photos: list[Sample], offline: Offline
) -> None:
    with Load(deployed.url, photos, offline) as ledger:
        for enough in (16, 40):
            until(partial(ledger.has_answered, enough))
            victim = deployed.processes(SEGMENTER)[0]
            victim.kill()
            # The raylet's child, so it may stay as a zombie for a moment.
            until(lambda: victim not in deployed.processes(SEGMENTER))  # noqa: B023
        until(lambda: len(deployed.processes(SEGMENTER)) == 2)
        before = ledger.answered
        until(lambda: ledger.answered >= before + 10)
    assert ledger.balances(), ledger.wrong


@pytest.mark.thorough
def test_scaling_down_under_load_loses_no_request(
    deployed: RayService, photos: list[Sample], offline: Offline
) -> None:
    with Load(deployed.url, photos, offline) as ledger:
        until(lambda: ledger.answered >= 20)
        deployed.deploy(replicas=1)
        before = ledger.answered
        until(lambda: ledger.answered >= before + 20)
    assert ledger.balances(), ledger.wrong


@pytest.mark.thorough
def test_load_brings_another_replica_and_loses_no_request(
    deployed: RayService, photos: list[Sample], offline: Offline
) -> None:
    deployed.deploy(replicas=1, max_replicas=2, target_ongoing_requests=2, upscale_delay_s=1)
    with Load(deployed.url, photos, offline) as ledger:
        until(lambda: len(deployed.processes(SEGMENTER)) == 2)
        before = ledger.answered
        until(lambda: ledger.answered >= before + 20)
    assert ledger.balances(), ledger.wrong


@pytest.mark.thorough
def test_a_folder_goes_to_gpus_alone_and_waits_for_them(
    deployed: RayService, photos: list[Sample], tmp_path: Path
) -> None:
    folder, results = tmp_path / "folder", tmp_path / "results"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index}.jpg").write_bytes(photos[index % len(photos)].data)
    with deployed.another_node(num_cpus=1, num_gpus=1) as raylet:
        holder: Any = ray.remote(num_gpus=1)(Holder).remote()
        ray.get(holder.holds.remote())
        with bulk(folder, results, deployed, "--ray-gpus", "1") as process:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, b"")
            waiting = next((line for line in lines if line.startswith(b"waiting")), b"")
            assert b"1 CPUs and 1 GPUs" in waiting
            ray.kill(holder)
            until(lambda: deployed.processes(WORKER) or process.poll() is not None)
            while process.poll() is None:
                for worker in deployed.processes(WORKER):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        assert worker.ppid() in (raylet.pid, 1)
                time.sleep(0.2)
            errors = process.stderr.read().decode()
    assert process.returncode == 0, errors
    assert {line["status"] for line in table(results).values()} == {"ok"}
    assert len(table(results)) == 40


class Holder:
    """Takes what it asked for, and does nothing with it."""

    def holds(self) -> bool:
        return True


def bulk(folder: Path, results: Path, service: RayService, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "server.bulk", str(folder), str(results)]
    command += ["--ray", service.address, *flags]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def test_a_photo_that_kills_whatever_is_at_work_on_it_is_recorded_and_stops_nothing(
    deployed: RayService, photos: list[Sample], tmp_path: Path
) -> None:
    folder, results = tmp_path / "folder", tmp_path / "results"
    folder.mkdir()
    for name in (*map(str, range(20)), "deadly"):
        (folder / f"{name}.jpg").write_bytes(photos[0].data)
    deadly = """
import os, signal, sys
from server.bulk import cluster
from server.bulk.__main__ import main

class Dying(cluster._Actor):
    async def _segment(self, tasks):
        if any(task.path == "deadly.jpg" for task in tasks):
            os.kill(os.getpid(), signal.SIGKILL)
        return await super()._segment(tasks)

cluster._Actor = Dying
cluster._RETRIES = 1
sys.exit(main())
"""
    command = [sys.executable, "-c", deadly, str(folder), str(results)]
    command += ["--ray", deployed.address]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=3600)
    assert found.returncode == 1, found.stderr.decode()
    wrong = {path: line for path, line in table(results).items() if line["status"] != "ok"}
    assert set(wrong) == {"deadly.jpg"}
    assert wrong["deadly.jpg"]["status"] == "failed"
    assert "2 actors died" in wrong["deadly.jpg"]["error"]


@pytest.mark.thorough
def test_a_folder_on_the_cluster_killed_and_resumed_has_every_photo_once(
    deployed: RayService, tmp_path: Path, many_photos: list[Sample], data_dir: Path | None
) -> None:
    folder, results = tmp_path / "folder", tmp_path / "results"
    folder.mkdir()
    if data_dir is not None:
        taken = islice(sorted(data_dir.rglob("*.jpg")), BULK_PHOTOS - 1)
        photos = (path.read_bytes() for path in taken)
    else:
        photos = (many_photos[index % 200].data for index in range(BULK_PHOTOS - 1))
    for index, photo in enumerate(photos):
        (folder / f"{index}.jpg").write_bytes(photo)
    (folder / "broken.jpg").write_bytes(many_photos[0].data[:1000])

    with bulk(folder, results, deployed) as process:
        until(lambda: any(results.rglob("*.png")) or process.poll() is not None)
        # The database is nobody else's to read meanwhile; every row is written to its journal.
        journal = results / "state.sqlite-wal"
        listed = journal.stat().st_mtime_ns

        def a_third_is_done() -> bool:
            count = sum(1 for _ in results.rglob("*.png"))
            return count >= BULK_PHOTOS / 3 and journal.stat().st_mtime_ns > listed

        until(lambda: a_third_is_done() or process.poll() is not None)
        assert process.poll() is None
        process.kill()
    assert process.returncode == -signal.SIGKILL
    until(lambda: not deployed.processes(WORKER))
    done = recorded(results)
    written = masks(results)
    before = {name: written[name] for name in written if name_of(name) in done}
    assert 0 < len(before) < BULK_PHOTOS
    resumed = time.monotonic()

    with bulk(folder, results, deployed) as process:
        until(lambda: deployed.processes(WORKER) or process.poll() is not None)
        for worker in deployed.processes(WORKER)[:1]:
            worker.kill()
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    assert process.returncode == 1, errors
    took_s = time.monotonic() - resumed
    lines = table(results)
    assert set(lines) == {path.name for path in folder.iterdir()}
    assert len(lines) == BULK_PHOTOS
    statuses = {path for path, line in lines.items() if line["status"] != "ok"}
    assert statuses == {"broken.jpg"}
    assert set(masks(results)) == {line["mask"] for line in lines.values() if line["mask"]}
    after = masks(results)
    assert before.items() <= after.items(), "what was done is not run again"
    again = sum(after.get(name) != moment for name, moment in written.items())
    assert again <= AT_WORK, "no more than was at work is run again"
    print(
        f"{len(done)} of {BULK_PHOTOS} rows at the kill, {again} photos run again;"
        f" the rest took {took_s:.0f} s, {(BULK_PHOTOS - len(done)) / took_s:.1f} photos/s"
    )


def name_of(mask: str) -> str:
    return f"{Path(mask).stem}.jpg"


def test_the_shipped_configuration_is_one_that_serve_takes() -> None:
    """The tests above change its address, its proxies and how many replicas there are."""
    config = yaml.safe_load((ROOT / "docker/ray/serve.yaml").read_text())
    application = ServeDeploySchema(**config).applications[0]
    module, name = application.import_path.split(":")
    assert getattr(importlib.import_module(module), name) is app
    Settings(**application.args)
    assert {each.name for each in application.deployments} == {"Gateway", "Segmenter"}
    longest_s = Settings().bulk_timeout_ms / 1000
    assert config["http_options"]["request_timeout_s"] > longest_s


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
