"""Photos come by C-STORE, and their results go on; what is not wanted is refused with a name."""

import logging
import socket
import struct
from pathlib import Path

import pytest

pytest.importorskip("pynetdicom", reason="needs requirements-dicom.txt")

from pydicom.uid import CTImageStorage, EncapsulatedPDFStorage

from server.archive.dicomweb import Archive
from server.archive.journal import Journal
from server.archive.receiver import Allowed, Limits
from tests.support.archives import (
    PATIENT,
    SENDER,
    StubArchive,
    StubServer,
    associated,
    dicom_photo,
    echo,
    running,
    source_of,
    store,
    uid_of,
)
from tests.support.waiting import until


def test_a_photo_comes_and_its_results_are_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "slsnet")
    photos = [dicom_photo(seed) for seed in range(3)]
    with StubServer() as server, StubArchive() as archive:
        destination = Archive(f"{archive.url}/dicom-web", authorization="Bearer secret")
        with running(tmp_path, server.url, {"stow": destination}) as relay:
            assert store(relay.port, photos) == [0, 0, 0]
            relay.settled()
            text = relay.metrics.text().decode()
            held = relay.journal.state().bytes
    sources = [source_of(content) for content in archive.held.values()]
    assert sorted(sources) == sorted(3 * [uid_of(photo) for photo in photos])
    # All results of a photo in one request.
    assert len(archive.asked) == 3
    assert {headers["authorization"] for _, _, headers in archive.asked} == {"Bearer secret"}
    assert {headers["priority"] for _, _, headers in server.asked} == {"bulk"}
    assert 'slsnet_archive_received_total{result="accepted"} 3.0' in text
    assert "slsnet_archive_delivered_total 3.0" in text
    assert held == 0
    assert caplog.records
    for told in (caplog.text, text):
        assert PATIENT.partition("^")[0] not in told and "4711" not in told
        assert not any(uid_of(photo) in told for photo in photos)


def test_a_lone_result_is_stored_too(tmp_path: Path) -> None:
    with StubServer() as server, StubArchive() as archive:
        server.objects = 1
        destination = Archive(f"{archive.url}/dicom-web")
        with running(tmp_path, server.url, {"stow": destination}) as relay:
            assert store(relay.port, [dicom_photo()]) == [0]
            relay.settled()
    assert len(archive.held) == 1


def test_who_may_send(tmp_path: Path) -> None:
    peers = [SENDER, "CAMERA@10.0.0.7", "LOCAL@127.0.0.1"]
    with running(tmp_path, "http://127.0.0.1:9", {}, peers=peers) as relay:
        assert echo(relay.port) == 0
        assert echo(relay.port, sender="LOCAL") == 0
        assert echo(relay.port, sender="STRANGER") == -1
        assert echo(relay.port, title="ANOTHER") == -1
        # Its title is known, and its address is another's.
        assert echo(relay.port, sender="CAMERA") == 0x0124
        assert store(relay.port, [dicom_photo()], sender="CAMERA") == [0x0124]
        assert not relay.journal.state().waiting
        text = relay.metrics.text().decode()
    assert 'slsnet_archive_received_total{result="rejected"} 2.0' in text
    assert 'slsnet_archive_received_total{result="not_allowed"} 1.0' in text


def test_an_unknown_address_is_not_even_listened_to(tmp_path: Path) -> None:
    with running(tmp_path, "http://127.0.0.1:9", {}, peers=[f"{SENDER}@10.0.0.7"]) as relay:
        assert echo(relay.port) == -1


@pytest.mark.parametrize("kind", [CTImageStorage, EncapsulatedPDFStorage])
def test_what_is_no_photo_is_not_negotiated(tmp_path: Path, kind: str) -> None:
    with running(tmp_path, "http://127.0.0.1:9", {}) as relay:
        assert store(relay.port, [dicom_photo(SOPClassUID=kind)]) == [-1]
        assert not relay.journal.state().waiting


def test_a_full_journal_says_so_and_the_sender_keeps_the_object(tmp_path: Path) -> None:
    photo = dicom_photo(0)
    with StubServer() as server, StubArchive() as archive:
        server.answers = [(503, {}, b"")] * 1000
        destination = Archive(f"{archive.url}/dicom-web")
        with running(
            tmp_path, server.url, {"stow": destination}, max_bytes=len(photo) + 2000
        ) as relay:
            assert store(relay.port, [photo]) == [0]
            other = dicom_photo(1)
            assert store(relay.port, [other]) == [0xA700]
            assert 'result="full"} 1.0' in relay.metrics.text().decode()
            server.answers.clear()
            relay.settled()
            assert store(relay.port, [other]) == [0]
            relay.settled()
    assert len(archive.held) == 6


def test_an_object_that_is_too_large_is_refused_while_it_comes(tmp_path: Path) -> None:
    limits = Limits(object_bytes=200_000)
    with running(tmp_path, "http://127.0.0.1:9", {}, limits=limits) as relay:
        large = dicom_photo(jpeg=_jpeg_of(300_000))
        assert store(relay.port, [large]) == [-1]
        assert not relay.journal.state().waiting
        assert 'result="too_large"}' in relay.metrics.text().decode()
        assert store(relay.port, [dicom_photo()]) == [0]


def _jpeg_of(size: int) -> bytes:
    from tests.support.lesions import encode_photo, lesion_photo

    data = encode_photo(lesion_photo(0, 64, 64).pixels)
    return data + bytes(size - len(data))


def test_a_pdu_without_end_is_not_read(tmp_path: Path) -> None:
    with running(tmp_path, "http://127.0.0.1:9", {}) as relay:
        with socket.create_connection(("127.0.0.1", relay.port), 30) as peer:
            # An A-ASSOCIATE-RQ that announces 4 GiB.
            peer.sendall(struct.pack(">BBL", 1, 0, 0xFFFF_FFFF))
            peer.settimeout(30)
            assert peer.recv(1) in (b"", b"\x07"), "it is ended, or aborted"
        assert echo(relay.port) == 0


def test_associations_are_limited(tmp_path: Path) -> None:
    with running(tmp_path, "http://127.0.0.1:9", {}, limits=Limits(associations=2)) as relay:
        verification = [("1.2.840.10008.1.1", None)]
        with (
            associated(relay.port, verification) as first,
            associated(relay.port, verification) as second,
            associated(relay.port, verification) as third,
        ):
            assert first.is_established and second.is_established
            assert third.is_rejected
        until(lambda: echo(relay.port) == 0)


def test_own_results_and_repetitions_are_not_segmented_again(tmp_path: Path) -> None:
    photo = dicom_photo(0)
    with StubServer() as server, StubArchive() as archive:
        destination = Archive(f"{archive.url}/dicom-web")
        with running(tmp_path, server.url, {"stow": destination}) as relay:
            assert store(relay.port, [photo]) == [0]
            relay.settled()
            # The sender did not hear the answer; the archive sends on all that it stores.
            assert store(relay.port, [photo, *archive.held.values()]) == [0, 0, 0, 0]
            relay.settled()
            text = relay.metrics.text().decode()
    assert len(server.asked) == 1 and len(archive.held) == 3
    assert 'result="duplicate"} 1.0' in text and 'result="own"} 3.0' in text


@pytest.mark.parametrize("text", ["", "@10.0.0.1", "A" * 17])
def test_a_peer_needs_a_title(text: str) -> None:
    with pytest.raises(ValueError, match="TITLE"):
        Allowed.of(text)


def test_a_journal_that_fails_takes_nothing(tmp_path: Path) -> None:
    with running(tmp_path, "http://127.0.0.1:9", {}) as relay:
        # Private: root, as whom tests may run, can write where a folder says no.
        relay.journal._database.execute("PRAGMA query_only = ON")  # as a disk that only reads
        assert store(relay.port, [dicom_photo()]) == [0xA700]
        relay.journal._database.execute("PRAGMA query_only = OFF")
        assert store(relay.port, [dicom_photo()]) == [0]
        assert isinstance(relay.journal, Journal)
