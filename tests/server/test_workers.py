"""`--workers`: several processes on one port that crash, drain and are counted as one server."""

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from server.observe.shared_metrics import Folder
from tests.support import MODEL, ROOT
from tests.support.answers import figures
from tests.support.clients import masks_of, sending, terminate_under_load
from tests.support.launch import ServerProcess, free_port, serve
from tests.support.samples import Sample
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("small_networks")


# Nor would they share a network if they had looked for a GPU first, in a process of its own.
PAIR = ("--workers", "2", "--share-network", "no")


@pytest.fixture
def pair() -> Iterator[ServerProcess]:
    with serve(*PAIR, "--drain-grace-s", "0.5") as server:
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
    assert re.search(r"ERROR.* worker \d+ ended with -9; another one starts", pair.log())
    send(photos[0])
    assert figures(pair)["slsnet_batch_size_sum"] == 2 * len(photos) + 1

    def in_flight() -> float:
        values = figures(pair)
        return values["slsnet_requests_in_flight"] + values["slsnet_bytes_in_flight"]

    # Of the worker that was killed nothing is left; of the others it is what they saw last.
    until(lambda: in_flight() == 0)


def test_a_worker_that_replaces_another_accepts_nobody_before_it_can_answer(
    photos: list[Sample],
) -> None:
    # The whole network: a small one is loaded before anybody can notice.
    with serve(*PAIR, "--model", str(MODEL)) as server:
        until(lambda: server.log().count(" ready: ") == 2)
        assert _statuses_while_workers_are_replaced(server, photos) == {200}


def _statuses_while_workers_are_replaced(server: ServerProcess, photos: list[Sample]) -> set[int]:
    stop, statuses = threading.Event(), set[int]()

    def send(photo: Sample) -> None:
        while not stop.is_set():
            # The one that is killed loses what it holds.
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.post(f"{server.url}/segment", content=photo.data, timeout=60)
                statuses.add(answer.status_code)

    def a_new_one_has_clients() -> bool:
        started = [worker for worker in workers(server) if worker not in known]
        with contextlib.suppress(psutil.NoSuchProcess):
            return any(
                one.status == psutil.CONN_ESTABLISHED
                for worker in started
                for one in worker.net_connections("tcp")
            )
        return False

    with ThreadPoolExecutor(4) as clients:
        sent = [clients.submit(send, photo) for photo in photos[:4]]
        try:
            for _ in range(2):
                known = workers(server)
                known[0].kill()
                until(a_new_one_has_clients)
        finally:
            stop.set()
        for one in sent:
            one.result()
    return statuses


def test_workers_take_turns_at_the_gpus_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937,MIG-c6d4f1ef")
    with serve("--workers", "3") as server:
        until(lambda: len(workers(server)) == 3)
        named = [worker.environ()["CUDA_VISIBLE_DEVICES"] for worker in workers(server)]
        assert sorted(named) == ["GPU-8932f937", "GPU-8932f937", "MIG-c6d4f1ef"]


def test_sigterm_drains_all_workers_and_loses_nothing(
    pair: ServerProcess, photos: list[Sample]
) -> None:
    folder = metrics_folder(pair)
    children = workers(pair)
    terminate_under_load(pair, photos[:6])
    assert not any(child.is_running() for child in children)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("sharing", "grace_s"),
    [("no", "5"), ("yes", "5"), pytest.param("no", "0", marks=pytest.mark.thorough)],
)
def test_sigterm_while_a_worker_starts_loses_nothing(
    sharing: str, grace_s: str, photos: list[Sample]
) -> None:
    flags = ("--workers", "2", "--share-network", sharing, "--drain-grace-s", grace_s)
    with serve(*flags, "--model", str(MODEL)) as server:
        until(lambda: figures(server)["slsnet_ready"] == 1)
        # Of the two the one that serves now goes on, and the other starts while clients come.
        until(lambda: server.log().count("Started server process") == 2)
        masks = masks_of(server, photos[:4])
        (first, *_) = server.children("server.process.worker")
        first.kill()
        until(lambda: first not in server.children("server.process.worker"))
        with sending(server, photos[:4], masks) as ledgers:
            until(lambda: len(server.children("server.process.worker")) == 2)
            server.terminate()
            until(lambda: all(ledger.is_refused for ledger in ledgers))
            assert server.wait() == 0
    assert [ledger.wrong for ledger in ledgers] == [[]] * 4
    assert sum(ledger.right for ledger in ledgers) > 0


def test_a_worker_that_is_stopped_alone_leaves_the_port_to_the_others(pair: ServerProcess) -> None:
    first = workers(pair)[0]
    first.terminate()
    while first.is_running() and first.status() != psutil.STATUS_ZOMBIE:
        assert httpx.get(f"{pair.url}/health/live").status_code == 200
    until(lambda: pair.log().count(" ready: ") == 3)
    assert httpx.get(f"{pair.url}/health/live").status_code == 200
    assert f"{first.pid} ended with 0; another one starts" in pair.log()
    assert "ERROR" not in pair.log()


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
    flags = (*PAIR, "--model", str(broken))
    with pytest.raises(RuntimeError, match="not ready") as error, serve(*flags):
        pass
    assert str(broken) in str(error.value)


def test_sighup_reaches_all_workers(pair: ServerProcess) -> None:
    os.kill(pair.process.pid, signal.SIGHUP)
    until(lambda: pair.log().count(" ready: ") == 4)
    assert len(workers(pair)) == 2
    assert isinstance(pair.process, subprocess.Popen)


def test_new_worker_reuses_metric_files_of_the_crashed_one(
    pair: ServerProcess, photos: list[Sample]
) -> None:
    def samples(name: str) -> float:
        return figures(pair)[name]

    folder = metrics_folder(pair)
    files = set(folder.iterdir())
    # All that the library makes, and as large as they get.
    assert len({file.name.rsplit("_", 1)[0] for file in files}) == 7
    httpx.post(f"{pair.url}/segment", content=photos[0].data, timeout=60)
    counted = samples("slsnet_requests_total")
    started = samples("process_start_time_seconds")
    first = workers(pair)[0]
    first.kill()
    until(lambda: pair.log().count(" ready: ") == 3)
    assert set(folder.iterdir()) == files
    assert all(file.stat().st_blocks * 512 >= file.stat().st_size for file in files)
    assert samples("slsnet_requests_total") >= counted
    until(lambda: samples("process_start_time_seconds") > started)


def test_what_a_killed_server_left_in_memory_goes_when_another_starts(pair: ServerProcess) -> None:
    folder = metrics_folder(pair)
    children = workers(pair)
    pids = [pair.process.pid, *(child.pid for child in children)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    with serve(*PAIR, "--drain-grace-s", "0") as other:
        # Not while anybody lives.
        assert folder.exists()
        other.terminate()
        assert other.wait() == 0
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(child.is_running() for child in children))
    # Any other server that starts on this machine may be the one that removes it.
    with serve(*PAIR, "--drain-grace-s", "0") as other:
        assert not folder.exists()
        other.terminate()
        assert other.wait() == 0


def small_memory(kib: int) -> list[str]:
    """Python's arguments for a server whose /dev/shm is this large."""
    mount = f"mount -t tmpfs -o size={kib}k tmpfs /dev/shm"
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare (util-linux)")
    if subprocess.run([*unshare, mount], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    serving = [*unshare, f'{mount} && exec "$@"', "sh", sys.executable, "-m", "server"]
    return ["-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])", *serving]


def test_no_memory_for_metrics_is_told_at_the_start() -> None:
    with (
        pytest.raises(RuntimeError, match="look at /dev/shm") as error,
        serve(*PAIR, command=small_memory(1000)),
    ):
        pass
    assert "Traceback" not in str(error.value)


def test_metric_file_without_room_is_not_created(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Folder()
    try:
        folder.reserve(0)
        before = sorted(folder.path.iterdir())

        def refuse(*_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(OSError, match="No space"):
            folder.reserve(1)
        assert sorted(folder.path.iterdir()) == before
    finally:
        folder.remove()


def test_memory_that_is_full_takes_no_worker(photos: list[Sample]) -> None:
    with serve(*PAIR, "--drain-grace-s", "0.5", command=small_memory(2000)) as server:
        until(lambda: server.log().count(" ready: ") == 2)
        filler = Path(f"/proc/{server.process.pid}/root/dev/shm/filler")
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for path in ("/segment", "/segment/batch", "/v2/models/slsnet/infer", "/docs", "/none"):
            for body in (photos[0].data, b"bad", b""):
                httpx.post(f"{server.url}{path}", content=body, timeout=60)
        assert "ended with" not in server.log()
        # The room of one that is gone may be taken; it waits, and is back once there is some.
        children = workers(server)
        children[0].kill()
        until(lambda: "ended with" in server.log())
        answer = httpx.post(f"{server.url}/segment", content=photos[0].data, timeout=60)
        assert answer.status_code == 200
        filler.unlink()
        until(lambda: server.log().count(" ready: ") == 3)
        server.terminate()
        assert server.wait() == 0


def lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_hung_worker_does_not_hold_up_a_second_signal(pair: ServerProcess) -> None:
    hung = workers(pair)[0]
    hung.suspend()
    pair.terminate()
    until(lambda: sum(map(lives, workers(pair))) == 1)
    assert pair.process.poll() is None
    pair.terminate()
    assert pair.wait() == 128 + signal.SIGKILL
    assert not hung.is_running()


@pytest.mark.slow
def test_a_hung_worker_is_killed_once_the_drain_is_over() -> None:
    flags = (*PAIR, "--drain-grace-s", "0", "--drain-timeout-s", "1")
    with serve(*flags) as server:
        until(lambda: server.log().count(" ready: ") == 2)
        hung = workers(server)[0]
        hung.suspend()
        server.terminate()
        assert server.wait() == 128 + signal.SIGKILL
        assert not hung.is_running()


def test_a_crash_before_says_nothing_of_the_drain(pair: ServerProcess) -> None:
    workers(pair)[0].kill()
    until(lambda: "another one starts" in pair.log())
    pair.terminate()
    assert pair.wait() == 0


def test_a_signal_to_a_starting_worker_is_kept(tmp_path: Path) -> None:
    """Signals come the moment that a worker is there."""
    program = """
import os, signal, sys
from server.process import supervisor
from server.__main__ import main
start = supervisor._Supervisor._start
def start_and_tell(self, place):
    start(self, place)
    os.kill(os.getpid(), signal.SIGHUP)
    if place.number == 1:
        os.kill(os.getpid(), signal.SIGTERM)
supervisor._Supervisor._start = start_and_tell
sys.exit(main())
"""
    flags = (*PAIR, "--port", str(free_port()), "--drain-grace-s", "0.5")
    result = subprocess.run(
        [sys.executable, "-c", program, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "ended with" not in result.stderr
    assert result.stderr.count("Finished server process") == 2


def test_a_worker_that_cannot_be_started_is_tried_again() -> None:
    program = """
import subprocess, sys
import server.process.supervisor
from server.__main__ import main
popen, calls = subprocess.Popen, []
def flaky(*arguments, **options):
    calls.append(arguments)
    if len(calls) == 2:
        raise BlockingIOError("too many processes")
    return popen(*arguments, **options)
subprocess.Popen = flaky
sys.exit(main())
"""
    with serve(*PAIR, "--drain-grace-s", "0", command=["-c", program]) as server:
        until(lambda: server.log().count(" ready: ") == 2)
        assert "again in 0.5 s: too many processes" in server.log()
        assert "ended with" not in server.log()
        server.terminate()
        assert server.wait() == 0


def test_a_signal_counts_once_that_comes_as_the_supervisor_begins_to_hear_it() -> None:
    program = """
import os, runpy, signal, sys
hear = signal.set_wakeup_fd
def hear_one(file):
    signal.set_wakeup_fd = hear
    hear(file)
    os.kill(os.getpid(), signal.SIGTERM)
signal.set_wakeup_fd = hear_one
sys.argv[0] = "server"
runpy.run_module("server", run_name="__main__", alter_sys=True)
"""
    command = [sys.executable, "-c", program, *PAIR, "--port", str(free_port())]
    # A second one would kill the workers as they start.
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=600).returncode == 0
