"""Workers that start beside others take connections, over HTTP and gRPC, once they can answer."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.launch import ServerProcess, free_port, serve
from tests.support.waiting import until

grpc = pytest.importorskip("grpc")
pb = pytest.importorskip("tritonclient.grpc.service_pb2")
stubs = pytest.importorskip("tritonclient.grpc.service_pb2_grpc")

pytestmark = pytest.mark.usefixtures("small_networks")


@contextlib.contextmanager
def _serving(hold: Path, port: int) -> Iterator[ServerProcess]:
    flags = ("--workers", "2", "--share-network", "no", "--grpc-port", str(port))
    with serve(
        *(*flags, "--drain-grace-s", "0"),
        command=["-m", "tests.support.slow_workers"],
        environment={"HOLD": str(hold)},
    ) as server:
        until(lambda: server.log().count(" ready: ") == 2)
        yield server


def _workers(server: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children()


def _all_started(server: ServerProcess, former: list[psutil.Process]) -> bool:
    """Whether there are two workers that have begun to load, and none of the former ones."""
    there, log = _workers(server), server.log()
    begun = [one for one in there if f"Started server process [{one.pid}]" in log]
    return len(begun) == 2 and not any(one in former for one in there)


def _answers(server: ServerProcess, port: int) -> set[object]:
    """What many clients are told, each on a connection of its own."""
    told = set[object]()
    for _ in range(16):
        told.add(httpx.get(f"{server.url}/health/ready").status_code)
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            stub = stubs.GRPCInferenceServiceStub(channel)
            told.add(stub.ServerReady(pb.ServerReadyRequest(), timeout=600).ready)
    return told


def test_only_workers_that_can_answer_take_connections(tmp_path: Path) -> None:
    hold, port = tmp_path / "hold", free_port()
    with _serving(hold, port) as server:
        hold.touch()
        first, second = _workers(server)
        first.kill()
        until(lambda: _all_started(server, [first]))
        assert _answers(server, port) == {200, True}
        # One that is told to stop meanwhile goes as quietly as it came.
        (new,) = (one for one in _workers(server) if one != second)
        new.terminate()
        assert _answers(server, port) == {200, True}
        hold.unlink()
        until(lambda: f"worker {new.pid} ended with 0" in server.log())
        until(lambda: _all_started(server, [first, new]))
        # Where nobody can answer, somebody says so.
        hold.touch()
        former = _workers(server)
        for one in former:
            one.kill()
        until(lambda: _all_started(server, former))
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        assert httpx.get(f"{server.url}/health/ready").status_code == 503
        hold.unlink()
        until(lambda: _answers(server, port) == {200, True})
        server.terminate()
        assert server.wait() == 0
