"""`--share-network yes`: workers speak HTTP and decode, one process runs the network for them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from engines.device import NoGpuError
from engines.tensorrt_api import TensorRTError
from server.backends import gpu
from server.keys import new_key
from server.observe.shared_metrics import Folder
from server.process import supervisor
from server.settings import Settings
from tests.support import MODEL
from tests.support.answers import assert_problem, figures
from tests.support.clients import masks_of, sending, terminate_under_load
from tests.support.launch import ServerProcess, serve
from tests.support.lesions import drawn_photo
from tests.support.samples import Sample
from tests.support.site import Site, inverted
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("small_networks")

SHARED = ("--workers", "2", "--share-network", "yes", "--drain-grace-s", "0.5")


def owner_of(server: ServerProcess) -> psutil.Process:
    (owner,) = server.children("server.process.owner")
    return owner


def all_ready(server: ServerProcess) -> bool:
    """Whether all processes say so: the gauge is the least of theirs."""
    values = figures(server)
    return values.get("slsnet_ready") == 1 and values["slsnet_backend_info"] == 1


def has_said_so(server: ServerProcess) -> bool:
    """Whether the owner's line is in the log, where a test may count on it.

    A thread writes it. An owner that is stopped before that, and killed then, leaves none.
    """
    return " ready: " in server.log()


@pytest.fixture
def shared() -> Iterator[ServerProcess]:
    with serve(*SHARED) as server:
        until(lambda: all_ready(server))
        until(lambda: has_said_so(server))
        try:
            yield server
        finally:
            if server.process.poll() is None:
                left = psutil.Process(server.process.pid).children()
                server.process.kill()
                server.process.wait()
                for child in left:
                    if child.is_running():
                        child.kill()


def segment(server: ServerProcess, photo: Sample) -> httpx.Response:
    return httpx.post(f"{server.url}/segment", content=photo.data, timeout=60)


def test_there_is_one_network_and_one_account(shared: ServerProcess, photos: list[Sample]) -> None:
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda photo: segment(shared, photo), photos * 2))
    assert {answer.status_code for answer in answers} == {200}
    masks = [answer.content for answer in answers]
    assert masks[: len(photos)] == masks[len(photos) :]
    values = figures(shared)
    assert values["slsnet_batch_size_sum"] == 2 * len(photos)
    assert figures(shared, path="/segment")["slsnet_requests_total"] == 2 * len(photos)
    assert values["slsnet_reloads_total"] == 1
    assert shared.log().count(" ready: ") == 1
    for worker in shared.children("server.process.worker"):
        assert not any("onnxruntime" in mapped.path for mapped in worker.memory_maps())
    # One that dies takes nothing with it but its own requests, and comes back.
    first, second = shared.children("server.process.worker")
    first.kill()
    assert segment(shared, photos[0]).content == masks[0]
    until(lambda: len(shared.children("server.process.worker")) == 2)
    assert second in shared.children("server.process.worker")
    until(lambda: all_ready(shared))
    assert masks_of(shared, photos) == masks[: len(photos)]
    assert shared.log().count(" ready: ") == 1


def test_an_owner_that_dies_is_told_at_once_and_replaced(shared: ServerProcess) -> None:
    # Small ones: a body that is refused while it still comes may lose its connection with it.
    no_mask = np.zeros((0, 0), np.bool_)
    photos = [Sample(str(seed), drawn_photo(seed, 300, 200), no_mask) for seed in range(6)]
    masks = masks_of(shared, photos)
    with sending(shared, photos, masks) as ledgers:
        until(lambda: all(ledger.right > 2 for ledger in ledgers))
        owner_of(shared).kill()
        until(lambda: any(ledger.wrong for ledger in ledgers))
        # Any worker may answer, and not all have heard of it at the same moment.
        until(
            lambda: (
                httpx.get(f"{shared.url}/health/ready").status_code == 503
                or shared.log().count(" ready: ") == 2
            )
        )
        until(lambda: shared.log().count(" ready: ") == 2)
        until(lambda: all_ready(shared))
        right = [ledger.right for ledger in ledgers]
        until(lambda: all(now.right > n for now, n in zip(ledgers, right, strict=True)))
    # Nothing but 503 meanwhile: no wrong mask, no lost connection, nothing that hangs.
    assert {word for ledger in ledgers for word in ledger.wrong} == {"503"}
    assert httpx.get(f"{shared.url}/health/ready").status_code == 200
    assert "network's process" in shared.log()
    assert "another one starts" in shared.log()
    # What waited for it is not counted any more.
    until(lambda: figures(shared)["slsnet_requests_in_flight"] == 0)
    assert figures(shared)["slsnet_circuit_open"] == 0


def test_sigterm_loses_nothing(shared: ServerProcess, photos: list[Sample]) -> None:
    everybody = psutil.Process(shared.process.pid).children()
    assert len(everybody) == 3
    terminate_under_load(shared, photos[:6])
    assert not any(child.is_running() for child in everybody)


def test_nobody_outlives_a_supervisor_that_is_killed(shared: ServerProcess) -> None:
    everybody = psutil.Process(shared.process.pid).children()
    shared.process.kill()
    until(lambda: not any(child.is_running() for child in everybody))


def test_a_network_that_cannot_be_loaded_ends_all(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a network")
    flags = (*SHARED, "--model", str(broken))
    with pytest.raises(RuntimeError, match="not ready") as error, serve(*flags):
        pass
    assert str(broken) in str(error.value)
    assert "killed" not in str(error.value)


def test_networks_change_for_all_workers(tmp_path: Path, photos: list[Sample]) -> None:
    model = tmp_path / "slsnet.onnx"
    shutil.copy(MODEL, model)
    key, line = new_key("ops", "admin")
    (tmp_path / "keys").write_text(line, encoding="utf-8")
    flags = (*SHARED, "--model", str(model), "--api-keys-file", str(tmp_path / "keys"))
    with serve(*flags) as server:
        site = Site(server, model, {"X-API-Key": key})
        first = site.version()
        model.write_bytes(b"not a network")
        assert_problem(site.reload(), 422, "from before goes on", "cannot load")
        assert site.version() == first
        model.write_bytes(inverted("turned"))
        assert site.reload().json()["version"] == "turned"
        # Each connection may be another worker's.
        assert {site.version() for _ in range(8)} == {"turned"}
        shutil.copy(MODEL, model)
        os.kill(server.process.pid, signal.SIGHUP)
        until(lambda: {site.version() for _ in range(8)} == {first})
        answer = httpx.post(f"{server.url}/segment", content=photos[0].data, headers=site.headers)
        assert answer.status_code == 200
        server.terminate()
        assert server.wait() == 0


@pytest.mark.slow
def test_an_owner_that_stands_still_is_replaced(photos: list[Sample]) -> None:
    program = """
import os, sys
from server.inference.sharing import feeder
from server.process import supervisor, worker
if sys.argv[1] == "server.process.worker":
    # Nobody sets it, and a test does not wait for so long.
    feeder._SILENT_S = 10.0
    sys.argv.pop(1)
    sys.exit(worker.main())
class Popen(supervisor.subprocess.Popen):
    def __init__(self, command, **options):
        if "server.process.worker" in command:
            command = [command[0], "-c", PROGRAM, *command[2:]]
        super().__init__(command, **options)
supervisor.subprocess.Popen = Popen
from server.__main__ import main
sys.exit(main())
"""
    program = f"PROGRAM = {program!r}\n{program}"
    with serve(*SHARED, command=["-c", program.replace("PROGRAM,", "PROGRAM,")]) as server:
        until(lambda: has_said_so(server))
        owner = owner_of(server)
        owner.suspend()
        # The request that waits is answered too.
        assert segment(server, photos[0]).status_code == 503
        until(lambda: not owner.is_running())
        until(lambda: "gives no sign of life" in server.log())
        until(lambda: server.log().count(" ready: ") >= 2)
        until(lambda: segment(server, photos[0]).status_code == 200)
        server.terminate()
        assert server.wait() == 0


def test_each_gpu_has_an_owner_and_workers_take_turns_at_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937,MIG-c6d4f1ef")
    listener = socket.socket()
    folder = Folder()
    try:
        workers, owners = supervisor.sharing(Settings(workers=3), listener, folder)
    finally:
        folder.remove()
    gpus = [owner.environment["CUDA_VISIBLE_DEVICES"] for owner in owners]
    assert gpus == ["GPU-8932f937", "MIG-c6d4f1ef"]
    assert [len(owner.files) for owner in owners] == [2, 1]
    assert sorted(worker.number for worker in workers) == [0, 1, 2]
    # No two have the same memory or the same place in the metrics.
    assert len({file for worker in workers for file in worker.files}) == 3
    assert len({process.number for process in [*workers, *owners]}) == 5
    for process in [*owners]:
        process.listener.close()
        for file in process.files:
            os.close(file)
    listener.close()


@pytest.mark.parametrize(
    ("setting", "on_gpu", "shares"),
    [("auto", True, True), ("auto", False, False), ("no", True, False), ("yes", False, True)],
)
def test_workers_share_a_network_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, setting: Any, on_gpu: bool, shares: bool
) -> None:
    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        assert command[-2:] == ["server.backends.gpu", "tensorrt"]
        return subprocess.CompletedProcess(command, 0 if on_gpu else 1)

    monkeypatch.setattr(subprocess, "run", answer)
    settings = Settings(workers=2, backend="tensorrt", share_network=setting)
    assert supervisor.shares(settings) is shares


def test_what_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "server.backends.gpu", "onnxruntime"]
    if not gpu.runs_on_gpu("onnxruntime"):
        assert subprocess.run(command, check=False).returncode == 1

    class Fine:
        def check_runs_on(self, _: object) -> None: ...

    monkeypatch.setattr(gpu, "current_gpu", object)
    monkeypatch.setattr(gpu, "find_tensorrt", Fine)
    assert gpu.runs_on_gpu("auto")
    assert gpu.runs_on_gpu("tensorrt")

    def missing() -> None:
        raise TensorRTError("not installed")

    monkeypatch.setattr(gpu, "find_tensorrt", missing)
    import onnxruntime

    for providers in (["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]):
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)  # noqa: B023
        for name in ("auto", "onnxruntime"):
            assert gpu.runs_on_gpu(name) is (len(providers) == 2)

    def no_gpu() -> None:
        raise NoGpuError("none")

    monkeypatch.setattr(gpu, "current_gpu", no_gpu)
    assert not gpu.runs_on_gpu("auto")
