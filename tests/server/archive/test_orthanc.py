"""With a real archive: photos come from it and results go back, over kills of each process."""

import gc
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest

pytest.importorskip("pynetdicom", reason="needs requirements-dicom.txt")

import pydicom

from tests.support import ROOT
from tests.support.archives import (
    ArchiveProcess,
    StubServer,
    dicom_photo,
    serve_archive,
    source_of,
    store,
    uid_of,
)
from tests.support.dicom import needs_dicom
from tests.support.launch import ServerProcess, free_port
from tests.support.orthanc import Orthanc
from tests.support.waiting import until


def _sources(orthanc: Orthanc) -> Counter[str]:
    """How many results it holds of each photo."""
    return Counter(
        source_of(content)
        for content in orthanc.held()
        if "SourceImageSequence" in pydicom.dcmread(BytesIO(content))
    )


def _flags(server: StubServer, orthanc: Orthanc) -> list[str]:
    stow = f"{orthanc.url}/dicom-web"
    return ["--server", server.url, "--stow", stow, "--peer", orthanc.title]


def test_it_sends_photos_and_holds_their_results(tmp_path: Path) -> None:
    port = free_port()
    orthanc = Orthanc(tmp_path / "orthanc", port)
    photos = [dicom_photo(seed) for seed in range(2)]
    with (
        StubServer() as server,
        orthanc.running(),
        serve_archive(tmp_path / "journal", *_flags(server, orthanc), port=port),
    ):
        report = orthanc.send([orthanc.add(photo) for photo in photos])
        assert report["FailedInstancesCount"] == 0
        until(lambda: len(orthanc.held()) == 2 + 3 * 2)
        assert _sources(orthanc) == {uid_of(photo): 3 for photo in photos}
        # Results are of the patient's own study.
        studies = {
            str(pydicom.dcmread(BytesIO(content)).StudyInstanceUID) for content in orthanc.held()
        }
        assert len(studies) == 2


@pytest.mark.slow
def test_the_real_servers_results_come_back(tmp_path: Path, server: ServerProcess) -> None:
    needs_dicom()
    port = free_port()
    orthanc = Orthanc(tmp_path / "orthanc", port)
    flags = ["--server", server.url, "--stow", f"{orthanc.url}/dicom-web", "--peer", orthanc.title]
    with orthanc.running():
        with serve_archive(tmp_path / "journal", *flags, port=port) as process:
            orthanc.send([orthanc.add(dicom_photo())])
            until(lambda: "slsnet_archive_delivered_total 1.0" in process.get("/metrics"))
        held = [pydicom.dcmread(BytesIO(content)) for content in orthanc.held()]
        # The overlay is a Secondary Capture, but no photo, also for another journal.
        where = ["--server", server.url, "--from", f"{orthanc.url}/dicom-web"]
        told = _run(["fetch", "--journal", str(tmp_path / "other"), "--all", *where])
        assert len(held) == 4
    assert "4 objects match: 1 fetched, 1 known already, 2 no photos" in told
    assert {one.Modality for one in held} == {"DMS", "SEG", "OT", "SR"}
    assert len({one.StudyInstanceUID for one in held}) == 1


def _run(command: list[str]) -> str:
    """What the command says."""
    ran = subprocess.run(
        [sys.executable, "-m", "server.archive", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def test_photos_are_fetched_from_it(tmp_path: Path) -> None:
    orthanc = Orthanc(tmp_path / "orthanc", free_port())
    old = dicom_photo(0, StudyDate="20200101")
    photos = [dicom_photo(seed) for seed in range(3)]
    with StubServer() as server, orthanc.running():
        for photo in (old, *photos):
            orthanc.add(photo)
        command = [
            *("fetch", "--journal", str(tmp_path / "journal"), "--server", server.url),
            *("--from", f"{orthanc.url}/dicom-web", "--date", "20261101-20261130"),
            *("--min-free-bytes", "1"),
        ]
        assert "3 objects match: 3 fetched" in _run(command)
        assert _sources(orthanc) == {uid_of(photo): 3 for photo in photos}
        # The same command once more: there are results now, and nothing to do.
        assert "12 objects match: 0 fetched, 12 known already" in _run(command)
        assert len(server.asked) == 3


class _Sender(threading.Thread):
    """Sends as a device does: each photo again until it is told that it is taken."""

    def __init__(self, port: int, photos: list[bytes]) -> None:
        super().__init__()
        self._port = port
        self._photos = photos
        self.acknowledged: list[str] = []

    def run(self) -> None:
        for photo in self._photos:
            while not self._is_there() or store(self._port, [photo]) != [0]:
                time.sleep(0.05)
            self.acknowledged.append(uid_of(photo))

    def _is_there(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port)).close()
        except OSError:
            return False
        return True


# pynetdicom leaves the socket of a peer that went to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_received_is_answered_over_kills_of_each(tmp_path: Path) -> None:
    port = free_port()
    orthanc = Orthanc(tmp_path / "orthanc", port)
    photos = [dicom_photo(seed) for seed in range(9)]
    sender = _Sender(port, photos)
    journal = tmp_path / "journal"

    def drained(process: ArchiveProcess) -> bool:
        return "slsnet_archive_journal_bytes 0.0" in process.get("/metrics")

    with StubServer() as server:
        flags = _flags(server, orthanc)
        with orthanc.running() as archive, serve_archive(journal, *flags, port=port) as process:
            sender.start()
            until(lambda: len(sender.acknowledged) >= 3)
            archive.kill()
            until(lambda: len(sender.acknowledged) >= 5)
            process.process.kill()
        server_port = server.port
    # All three are gone.
    with orthanc.running(), serve_archive(journal, *flags, port=port) as process:
        until(lambda: len(sender.acknowledged) >= 7)
        with StubServer(server_port):
            sender.join()
            until(lambda: drained(process))
            assert _sources(orthanc) == dict.fromkeys(sender.acknowledged, 3)
    assert sorted(sender.acknowledged) == sorted(map(uid_of, photos))
    # Sockets that pynetdicom leaves warn when they are collected: here, where that is ignored.
    gc.collect()
