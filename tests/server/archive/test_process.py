"""The process as it is run: killed, stopped, looked at, and told what is wrong with its options."""

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

pytest.importorskip("pynetdicom", reason="needs requirements-dicom.txt")

from server.archive import __main__ as entry
from server.archive.__main__ import main
from server.archive.journal import SEGMENT, Journal
from server.archive.receiver import Receiver
from tests.support import ROOT
from tests.support.archives import (
    PATIENT,
    StubArchive,
    StubServer,
    dicom_photo,
    problem,
    serve_archive,
    source_of,
    store,
    uid_of,
)
from tests.support.launch import free_port
from tests.support.waiting import until

_KILLS = 2


def _is_there(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


# pynetdicom leaves the socket of a peer that went to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_what_was_acknowledged_is_delivered_over_kills(tmp_path: Path) -> None:
    photos = [dicom_photo(seed % 5) for seed in range(12)]
    port = free_port()
    acknowledged: set[str] = set()
    with StubServer() as server, StubArchive() as archive:

        def send() -> None:
            for photo in photos:
                # As a device does: again until it is told that the object is taken.
                while not _is_there(port) or store(port, [photo]) != [0]:
                    time.sleep(0.05)
                acknowledged.add(uid_of(photo))

        sender = threading.Thread(target=send)
        sender.start()
        flags = ("--server", server.url, "--stow", f"{archive.url}/dicom-web")
        for kill in range(_KILLS):
            with serve_archive(tmp_path, *flags, port=port) as process:
                until(lambda: len(acknowledged) > 4 * (kill + 1))  # noqa: B023
                process.process.kill()
        with serve_archive(tmp_path, *flags, port=port) as process:
            sender.join()
            until(lambda: len(archive.held) >= 3 * len(photos))
            until(lambda: "slsnet_archive_journal_bytes 0.0" in process.get("/metrics"))
            process.process.terminate()
            assert process.process.wait(60) == 0
            assert PATIENT not in process.log()
    assert acknowledged == {uid_of(photo) for photo in photos}
    # Three results of each photo, and the same three wherever they were sent twice.
    assert Counter(map(source_of, archive.held.values())) == dict.fromkeys(acknowledged, 3)
    # Sockets that pynetdicom leaves warn when they are collected: here, where that is ignored.
    gc.collect()


def test_a_stop_leaves_what_is_not_done_for_the_next_start(tmp_path: Path) -> None:
    photo = dicom_photo()
    gone = free_port()
    with StubServer() as server:
        flags = ("--server", server.url, "--stow", f"http://127.0.0.1:{gone}/dicom-web")
        with serve_archive(tmp_path, *flags) as process:
            assert store(process.port, [photo]) == [0]
            until(lambda: 'reason="' not in process.get("/metrics") and "stow" in process.log())
            assert process.get("/health/live") == "alive\n"
            assert 'slsnet_archive_waiting{stage="stow"} 1.0' in process.get("/metrics")
            process.process.terminate()
            assert process.process.wait(60) == 0
        with StubArchive(gone) as archive, serve_archive(tmp_path, *flags):
            until(lambda: len(archive.held) == 3)


def test_a_second_signal_ends_at_once_and_loses_nothing(tmp_path: Path) -> None:
    photo = dicom_photo()
    with StubServer() as server, socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        flags = ("--server", server.url, "--stow", f"http://127.0.0.1:{port}/dicom-web")
        with serve_archive(tmp_path, *flags) as process:
            assert store(process.port, [photo]) == [0]
            connection, _ = silent.accept()
            process.process.terminate()
            until(lambda: "stopping" in process.log())
            process.process.terminate()
            assert process.process.wait(600) == 128 + signal.SIGTERM
        connection.close()
        silent.close()
        with StubArchive(port) as archive, serve_archive(tmp_path, *flags):
            until(lambda: len(archive.held) == 3)


def test_it_is_ready_once_it_takes_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    health_port = free_port()
    told = []

    def look() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{health_port}") as client:
            answer = client.get("/health/ready")
        told.append((answer.status_code, answer.text))

    def start(receiver: Receiver, host: str, port: int) -> int:
        look()
        port = usual(receiver, host, port)
        look()
        os.kill(os.getpid(), signal.SIGTERM)
        return port

    usual = Receiver.start
    monkeypatch.setattr(Receiver, "start", start)
    flags = ["--journal", f"{tmp_path}", "--server", "http://127.0.0.1:9", "--any-peer"]
    flags += ["--stow", "http://127.0.0.1:9", "--port", "0", "--health-port", f"{health_port}"]
    # What would outlast this test in its process.
    for name in ("configure", "silence"):
        monkeypatch.setattr(entry, name, lambda *_: None)
    monkeypatch.setattr(os, "umask", lambda _: 0)
    assert main(["serve", *flags]) == 0
    assert told == [(503, "starting\n"), (200, "ready\n")]


def test_dead_letters_by_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(tmp_path) as journal:
        for uid in ("1.1", "1.2", "1.3"):
            journal.accept(uid, uid.encode())
            task = journal.claim(SEGMENT)
            assert task is not None
            journal.failed(task, "refused", "It is no photo.", None)
    assert main(["list", "--journal", str(tmp_path)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("\t")[:3] == ["object", "stage", "reason"]
    assert [line.split("\t")[:3] for line in lines] == [
        [f"{number}", "segment", "refused"] for number in (1, 2, 3)
    ]
    assert main(["discard", "--journal", str(tmp_path), "1"]) == 0
    assert main(["retry", "--journal", str(tmp_path), "2"]) == 0
    assert main(["retry", "--journal", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "1 are erased\n1 are tried again\n1 are tried again\n"
    assert main(["list", "--journal", str(tmp_path / "none")]) == 2
    assert "holds no journal" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--stow", "http://127.0.0.1"], "--peer"),
        (["--any-peer"], "--stow, --send-to"),
        (["--any-peer", "--stow", "ftp://a"], "no address of http"),
        (["--any-peer", "--stow", "http://me:secret@a"], "no password"),
        (["--any-peer", "--send-to", "PACS"], "TITLE@HOST:PORT"),
        (["--any-peer", "--stow", "http://a", "--title", "T" * 17], "16 characters"),
    ],
)
def test_options_that_are_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "--journal", str(tmp_path), "--server", "http://127.0.0.1:8000", *flags])
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert says in told and "secret" not in told


def test_without_its_packages_it_names_them(tmp_path: Path) -> None:
    # A folder in front of the packages, where importing this one fails as if it were missing.
    (tmp_path / "pynetdicom.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'pynetdicom'\", name='pynetdicom')"
    )
    for command in ("server.archive", "server.command archive"):
        ran = subprocess.run(
            [sys.executable, "-m", *command.split(), "list"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 1
        assert "requirements-dicom.txt" in ran.stderr and "pynetdicom" in ran.stderr


def _fetch(
    tmp_path: Path, server: str, archive: str, *flags: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            *(sys.executable, "-m", "server.archive", "fetch", "--journal", str(tmp_path)),
            *("--server", server, "--from", archive, "--min-free-bytes", "1"),
            *("--retry-s", "0.01", *flags),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_what_is_fetched_comes_back(tmp_path: Path) -> None:
    photos = [dicom_photo(seed) for seed in range(3)]
    with StubServer() as server, StubArchive() as archive:
        archive.held = {uid_of(photo): photo for photo in photos}
        other = dicom_photo(9, SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
        archive.held[uid_of(other)] = other
        url = f"{archive.url}/dicom-web"
        # The first search fails: no photo is lost, and the command says so.
        archive.answers = [(503, {}, b"")]
        ran = _fetch(tmp_path, server.url, url, "--all")
        assert ran.returncode == 2 and "The archive answers 503" in ran.stderr
        # The second photo cannot be had at first, and the server refuses one.
        archive.asked.clear()
        archive.answers = [None, None, (500, {}, b"")]
        server.answers = [problem(422, "The object has no pixels.")]
        ran = _fetch(tmp_path, server.url, url, "--all")
        assert ran.returncode == 1
        assert "3 fetched" in ran.stderr and "1 no photos" in ran.stderr
        assert "1 wait for a person" in ran.stderr
        assert PATIENT not in ran.stderr
        # Its own results are none of what it found: the search was over before.
        assert "4 objects match" in ran.stderr
        searches = ["/instances?" in path for _, path, _ in archive.asked]
        assert searches == sorted(searches, reverse=True)
    results = [one for one in archive.stored if one not in map(uid_of, photos)]
    assert len(results) == 6


def test_what_to_fetch_has_to_be_named(tmp_path: Path) -> None:
    ran = _fetch(tmp_path, "http://127.0.0.1:9", "http://127.0.0.1:9")
    assert ran.returncode == 2 and "--study, --series, --date" in ran.stderr
