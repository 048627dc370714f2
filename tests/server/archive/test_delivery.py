"""Servers and archives that are down, slow or refuse: named, nothing lost, tried again where it
makes sense.
"""

import asyncio
import contextlib
import gc
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("pynetdicom", reason="needs requirements-dicom.txt")

from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, SecondaryCaptureImageStorage
from pynetdicom import AE, evt
from pynetdicom.dimse_primitives import C_STORE

from server.archive import relay as relay_module
from server.archive.dicomweb import Archive, Instance
from server.archive.failures import Failure
from server.archive.multipart import encode, files
from server.archive.sending import Peer, Sender
from tests.support.archives import (
    PATIENT,
    Running,
    StubArchive,
    StubServer,
    dicom_photo,
    problem,
    running,
)
from tests.support.launch import free_port
from tests.support.waiting import until


@pytest.fixture
def slsnet() -> Iterator[StubServer]:
    with StubServer() as stub:
        yield stub


@pytest.fixture
def archive() -> Iterator[StubArchive]:
    with StubArchive() as stub:
        yield stub


def _to(archive: StubArchive, timeout_s: float = 60) -> dict[str, Any]:
    return {"stow": Archive(f"{archive.url}/dicom-web", timeout_s=timeout_s)}


def _reasons(relay: Running, stage: str) -> set[str]:
    """Of the failures so far."""
    return {
        sample.labels["result"]
        for family in relay.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "slsnet_archive_attempts_total" and sample.labels["stage"] == stage
    } - {"ok"}


def test_a_server_that_fails_is_asked_again(
    tmp_path: Path, slsnet: StubServer, archive: StubArchive
) -> None:
    slsnet.answers = [
        problem(429, "The queue is full.", **{"Retry-After": "0"}),
        problem(503, "The network is still being loaded."),
        problem(504, "The deadline passed."),
        problem(500, "The network failed."),
        problem(401, "There is no key."),
        problem(404, "There is nothing here."),
        (302, {"Location": "/elsewhere"}, b""),
        (200, {"Content-Type": "text/html"}, b"<p>Hello"),
        (200, {"Content-Type": "application/dicom"}, b"no DICOM"),
    ]
    with running(tmp_path, slsnet.url, _to(archive), listens=False) as relay:
        relay.take(dicom_photo())
        relay.settled()
        assert _reasons(relay, "segment") == {
            *("busy", "failed", "key_refused", "wrong_address", "redirected")
        }
        assert not relay.journal.dead_letters()
    assert len(slsnet.asked) == 10 and len(archive.held) == 3


def test_a_photo_that_the_server_refuses_waits_for_a_person(
    tmp_path: Path, slsnet: StubServer, archive: StubArchive
) -> None:
    statuses = [400, 413, 415, 422]
    slsnet.answers = [problem(status, "The object has no pixels.") for status in statuses]
    with running(tmp_path, slsnet.url, _to(archive), listens=False) as relay:
        for seed in range(4):
            relay.take(dicom_photo(seed))
        relay.settled()
        letters = relay.journal.dead_letters()
        assert {(one.stage, one.reason) for one in letters} == {("segment", "refused")}
        assert {one.detail for one in letters} == {
            f"The server answers {status}: The object has no pixels." for status in statuses
        }
        assert relay.journal.retry([letters[0].object, letters[1].object]) == 2
        relay.settled()
        assert len(relay.journal.dead_letters()) == 2
    assert len(archive.held) == 6


def test_an_archive_that_fails_gets_the_same_objects_again(
    tmp_path: Path, slsnet: StubServer, archive: StubArchive
) -> None:
    archive.answers = [
        (503, {"Retry-After": "0"}, b""),
        (500, {}, PATIENT.encode()),
        (401, {"WWW-Authenticate": "Basic"}, b""),
        (404, {}, b""),
    ]
    with running(tmp_path, slsnet.url, _to(archive), listens=False) as relay:
        relay.take(dicom_photo())
        relay.settled()
        assert _reasons(relay, "stow") == {"busy", "failed", "key_refused", "wrong_address"}
    assert len(slsnet.asked) == 1, "results are made once"
    assert len(archive.asked) == 5 and len(archive.held) == 3


@pytest.mark.parametrize(
    "body", [b"<html>Log in</html>", b"", b"{}", b'{"00081199": {"vr": "SQ", "Value": [{}]}}']
)
def test_success_that_names_no_objects_is_none(
    tmp_path: Path, slsnet: StubServer, archive: StubArchive, body: bytes
) -> None:
    archive.answers = [(200, {}, body)]
    with running(tmp_path, slsnet.url, _to(archive), listens=False) as relay:
        relay.take(dicom_photo())
        relay.settled()
        assert _reasons(relay, "stow") == {"wrong_address"}
    assert len(archive.held) == 3, "it is sent again, not erased"


def test_an_archive_that_lists_without_pages_is_listed_once(archive: StubArchive) -> None:
    identity = {tag: {"Value": ["1.2"]} for tag in ("00080016", "00080018", "0020000D", "0020000E")}
    page = json.dumps([identity, {**identity, "00080018": {"Value": [7]}}, {}, "?"]).encode()
    archive.answers = [(200, {}, page)] * 3

    async def found() -> list[Instance]:
        web = Archive(f"{archive.url}/dicom-web")
        try:
            return [instance async for instance in web.search({})]
        finally:
            await web.aclose()

    assert asyncio.run(found()) == [Instance("1.2", "1.2", "1.2", "1.2")]
    assert len(archive.asked) == 2


def test_an_archive_that_refuses_waits_for_a_person(
    tmp_path: Path, slsnet: StubServer, archive: StubArchive, caplog: pytest.LogCaptureFixture
) -> None:
    archive.answers = [(400, {}, PATIENT.encode()), (409, {}, b""), (202, {}, b"")]
    with running(tmp_path, slsnet.url, _to(archive), listens=False) as relay:
        for seed in range(3):
            relay.take(dicom_photo(seed))
        relay.settled()
        letters = relay.journal.dead_letters()
        assert [(one.stage, one.reason) for one in letters] == [("stow", "refused")] * 3
        told = " ".join(one.detail for one in letters)
        assert all(f"{status}" in told for status in (400, 409, 202))
        assert PATIENT not in told + caplog.text, "an archive may say anything"
        relay.journal.retry()
        relay.settled()
    assert len(archive.held) == 9 and len(slsnet.asked) == 3


def test_an_archive_says_why_of_each_object(
    tmp_path: Path, slsnet: StubServer, archive: StubArchive
) -> None:
    # Out of resources, and a failure while it worked; a duplicate, twice.
    refusals = [0xA700, 0x0110, 0, 0x0111, 0x0111, 0]
    archive.refuses = lambda _: refusals.pop(0) if refusals else 0
    with running(tmp_path, slsnet.url, _to(archive), listens=False) as relay:
        relay.take(dicom_photo())
        relay.settled()
        assert len(archive.asked) == 2 and _reasons(relay, "stow") == {"busy"}
        refusals += [0xA700, 0x0122, 0]
        relay.take(dicom_photo(1))
        relay.settled()
        (letter,) = relay.journal.dead_letters()
    assert len(archive.asked) == 3
    assert letter.detail == "The archive refuses 2 of 3 objects, reason 0122, A700."


def test_an_archive_that_is_down_or_slow(tmp_path: Path, slsnet: StubServer) -> None:
    port = free_port()
    hole = socket.create_server(("127.0.0.1", port))
    url = f"http://127.0.0.1:{port}/dicom-web"
    with running(
        tmp_path, slsnet.url, {"stow": Archive(url, timeout_s=0.2)}, listens=False
    ) as relay:
        relay.take(dicom_photo())
        until(lambda: "timeout" in _reasons(relay, "stow"))
        hole.close()
        until(lambda: "unreachable" in _reasons(relay, "stow"))
        with StubArchive(port) as archive:
            relay.settled()
            assert len(archive.held) == 3


def test_an_answer_that_comes_by_drops_is_too_slow() -> None:
    hung_up = asyncio.Event()

    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        hung_up.set()

    async def store() -> None:
        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        (port,) = (one.getsockname()[1] for one in server.sockets)
        archive = Archive(f"http://127.0.0.1:{port}", timeout_s=0.5)
        try:
            async with asyncio.timeout(60):
                await archive.store([b"an object"])
        finally:
            await archive.aclose()
            await hung_up.wait()
            server.close()
            await server.wait_closed()

    with pytest.raises(Failure, match="The archive is too slow") as failure:
        asyncio.run(store())
    assert not failure.value.final


def test_hours_of_failures_end(
    tmp_path: Path, slsnet: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{free_port()}/dicom-web"
    later_s = 0
    # Hours pass after the second attempt, however long the first two took.
    clock = SimpleNamespace(time=lambda: time.time() + later_s)
    monkeypatch.setattr(relay_module, "time", clock)
    with running(
        tmp_path, slsnet.url, {"stow": Archive(url)}, give_up_s=3600, listens=False
    ) as relay:

        def attempts() -> float:
            labels = {"stage": "stow", "result": "unreachable"}
            name = "slsnet_archive_attempts_total"
            return relay.metrics.registry.get_sample_value(name, labels) or 0

        relay.take(dicom_photo())
        until(lambda: attempts() >= 2)
        later_s = 4 * 3600
        relay.settled()
        (letter,) = relay.journal.dead_letters()
    assert (letter.stage, letter.reason) == ("stow", "unreachable")
    assert letter.attempts > 1


class _Peer:
    """An application entity that stores; statuses are what it answers first.

    It calls `before` for each object.
    """

    def __init__(self, *statuses: int, before: Callable[[], object] = lambda: None) -> None:
        self.held: list[str] = []
        self._before = before
        self._statuses = list(statuses)
        entity = AE(ae_title="PACS")
        syntaxes = [ExplicitVRLittleEndian, JPEGBaseline8Bit]
        entity.add_supported_context(SecondaryCaptureImageStorage, syntaxes)
        server = entity.start_server(
            ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
        )
        assert server is not None
        self._server = server
        self.peer = Peer("PACS", "127.0.0.1", self._server.server_address[1])

    def _store(self, event: evt.Event) -> int:
        self._before()
        status = self._statuses.pop(0) if self._statuses else 0
        if not status:
            self.held.append(str(cast(C_STORE, event.request).AffectedSOPInstanceUID))
        return status

    def __enter__(self) -> "_Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()


def test_results_go_by_c_store_too(
    tmp_path: Path, slsnet: StubServer, archive: StubArchive
) -> None:
    with _Peer(0xA700, 0x0110) as pacs:
        destinations = {**_to(archive), "send": Sender(pacs.peer, "SLSNET")}
        with running(tmp_path, slsnet.url, destinations, listens=False) as relay:
            relay.take(dicom_photo())
            relay.settled()
            assert _reasons(relay, "send") == {"busy"}
        assert {*pacs.held} == {*archive.held}
    assert len(slsnet.asked) == 1


def test_a_peer_that_refuses_waits_for_a_person(tmp_path: Path, slsnet: StubServer) -> None:
    with (
        _Peer(0xC123) as pacs,
        running(tmp_path, slsnet.url, {"send": Sender(pacs.peer, "SLSNET")}) as relay,
    ):
        relay.take(dicom_photo())
        relay.settled()
        (letter,) = relay.journal.dead_letters()
        assert (letter.reason, "C123" in letter.detail) == ("refused", True)


@pytest.mark.parametrize("accepts", [False, True])
def test_a_peer_that_never_answers_holds_up_no_stop(accepts: bool) -> None:
    reached, ended = threading.Event(), threading.Event()
    photo = dicom_photo(SOPClassUID=SecondaryCaptureImageStorage)

    def wait() -> None:
        reached.set()
        ended.wait(600)

    async def scenario(port: int) -> None:
        sender = Sender(Peer("PACS", "127.0.0.1", port), "SLSNET", timeout_s=3600)
        sending = asyncio.create_task(sender.store([photo]))
        await asyncio.to_thread(reached.wait, 600)
        sending.cancel()
        await asyncio.wait([sending])
        # As `asyncio.run` does: no thread is left that waits for the peer.
        await asyncio.wait_for(asyncio.get_running_loop().shutdown_default_executor(), 600)

    def accept() -> None:
        with silent.accept()[0]:
            wait()

    with socket.create_server(("127.0.0.1", 0)) as silent, _Peer(before=wait) as pacs:
        silence = threading.Thread(target=accept)
        if not accepts:
            silence.start()
        try:
            asyncio.run(scenario(pacs.peer.port if accepts else silent.getsockname()[1]))
        finally:
            ended.set()
        if not accepts:
            silence.join()


# pynetdicom leaves the socket of a peer that is not there to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_peer_does_not_take_is_named() -> None:
    with _Peer() as pacs, pytest.raises(Failure, match="kinds") as raised:
        asyncio.run(Sender(pacs.peer, "SLSNET").store([dicom_photo()]))
    assert raised.value.final
    gone = Peer("PACS", "127.0.0.1", free_port())
    with pytest.raises(Failure) as raised:
        asyncio.run(Sender(gone, "SLSNET").store([dicom_photo()]))
    assert raised.value.reason == "unreachable" and not raised.value.final
    # Sockets that pynetdicom leaves warn when they are collected: here, where that is ignored.
    gc.collect()


def test_a_fault_of_ours_stops_one_object_alone(
    tmp_path: Path, slsnet: StubServer, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty:
        faults = 1

        async def store(self, _: Any) -> None:
            self.faults -= 1
            if self.faults >= 0:
                raise ZeroDivisionError(PATIENT)

        async def aclose(self) -> None:
            pass

    with running(tmp_path, slsnet.url, {"stow": Faulty()}, listens=False) as relay:
        relay.take(dicom_photo(0))
        relay.take(dicom_photo(1))
        relay.settled()
        (letter,) = relay.journal.dead_letters()
    assert letter.reason == "unexpected" and "ZeroDivisionError" in letter.detail
    assert PATIENT not in letter.detail + caplog.text


@pytest.mark.parametrize("contents", [[b"one"], [b"\r\n", b"", b"--x\r\n\r\ntwo\r\n"]])
def test_files_in_one_body(contents: list[bytes]) -> None:
    assert files(*encode(contents)) == contents


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/html", b""),
        ("multipart/related", b""),
        ("multipart/related; boundary=x", b"--x\r\n\r\ncut"),
        ("multipart/related; boundary=x", b"--x no end of the head\r\n--x--"),
    ],
)
def test_a_body_that_is_none(kind: str, body: bytes) -> None:
    with pytest.raises(ValueError, match=r"type|end"):
        files(kind, body)


def test_a_peer_is_read() -> None:
    assert Peer.of("PACS@pacs.example:104") == Peer("PACS", "pacs.example", 104)
    assert Peer.of("PACS@[::1]:104") == Peer("PACS", "::1", 104)
    for text in ("PACS", "PACS@host", "PACS@host:0", "@host:104", "P" * 17 + "@host:104"):
        with pytest.raises(ValueError, match="TITLE@HOST:PORT"):
            Peer.of(text)
