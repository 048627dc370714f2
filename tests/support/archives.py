"""DICOM photos, and what stands in for SLSNet Server and for an archive where a test needs them to
answer in a certain way.
"""

import asyncio
import contextlib
import json
import subprocess
import tempfile
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DermoscopicPhotographyImageStorage,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from pynetdicom import AE
from pynetdicom.association import Association

from server.archive.journal import Journal
from server.archive.metrics import Metrics
from server.archive.multipart import encode, files
from server.archive.receiver import Allowed, Limits, Receiver
from server.archive.relay import Destination, Patience, Relay
from server.archive.segmenting import SegmentingServer
from tests.support.launch import free_port, started
from tests.support.lesions import encode_photo, lesion_photo
from tests.support.waiting import until

__all__ = [
    "PATIENT",
    "SENDER",
    "TITLE",
    "ArchiveProcess",
    "Running",
    "StubArchive",
    "StubServer",
    "associated",
    "dicom_photo",
    "echo",
    "files",
    "problem",
    "running",
    "serve_archive",
    "source_of",
    "store",
    "uid_of",
]

PATIENT = "Nobody^Special"
"""Must be in no log, metric or error."""

TITLE, SENDER = "SLSNET", "DERMATOSCOPE"

_VERIFICATION = "1.2.840.10008.1.1"

_Answer = tuple[int, dict[str, str], bytes]


def dicom_photo(seed: int = 0, *, jpeg: bytes | None = None, **more: Any) -> bytes:
    """A dermoscopic photo, as a DICOM file.

    Args:
        seed: of the drawn lesion.
        jpeg: a photo to be stored as it is, instead.
        more: attributes beside the usual ones, or other values for them.
    """
    photo = lesion_photo(seed, 96, 72)
    data = jpeg or encode_photo(photo.pixels)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.SOPClassUID = DermoscopicPhotographyImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID = PATIENT, "4711-secret"
    dataset.PatientBirthDate, dataset.PatientSex = "19700101", "O"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.StudyDate = dataset.ContentDate = dataset.AcquisitionDateTime = "20261128"
    dataset.StudyTime = dataset.ContentTime = "120000"
    dataset.AccessionNumber, dataset.StudyID, dataset.ReferringPhysicianName = "", "1", ""
    dataset.Modality, dataset.Manufacturer = "DMS", "Nobody"
    dataset.SeriesNumber = dataset.InstanceNumber = 1
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    width, height = _size(data)
    dataset.Rows, dataset.Columns = height, width
    dataset.SamplesPerPixel, dataset.PlanarConfiguration = 3, 0
    dataset.PhotometricInterpretation = "YBR_FULL_422"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.LossyImageCompression = "01"
    dataset.PixelData = encapsulate([data])
    for name, value in more.items():
        setattr(dataset, name, value)
    return _written(dataset)


def _size(data: bytes) -> tuple[int, int]:
    from PIL import Image

    with Image.open(BytesIO(data)) as image:
        return image.size


def _written(dataset: Dataset) -> bytes:
    out = BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def uid_of(content: bytes) -> str:
    """The SOP Instance UID of a DICOM file."""
    return str(pydicom.dcmread(BytesIO(content)).SOPInstanceUID)


def source_of(content: bytes) -> str:
    """The SOP Instance UID of the photo that the stub's result was made of."""
    return str(pydicom.dcmread(BytesIO(content)).SourceImageSequence[0].ReferencedSOPInstanceUID)


def _result(photo: Dataset) -> bytes:
    """What the stub makes of a photo: with a new UID each time."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    for name in ("PatientName", "PatientID", "StudyInstanceUID", "StudyDate"):
        setattr(made, name, photo[name].value)
    made.SeriesInstanceUID, made.Modality = generate_uid(), "OT"
    source = Dataset()
    source.ReferencedSOPClassUID = photo.SOPClassUID
    source.ReferencedSOPInstanceUID = photo.SOPInstanceUID
    made.SourceImageSequence = [source]
    made.Rows = made.Columns = 2
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 8
    made.HighBit, made.PixelRepresentation = 7, 0
    made.PixelData = bytes(4)
    return _written(made)


class _Stub:
    """A web server on 127.0.0.1 that answers with `self.answer`, until it is stopped."""

    def __init__(self, port: int = 0) -> None:
        self.answers: list[_Answer | None] = []
        """What it answers first, one after the other; None for its usual answer."""
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        """Method, path and headers of the requests so far."""
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                stub.asked.append((self.command, self.path, headers))
                first = stub.answers.pop(0) if stub.answers else None
                answer = first or stub.answer(self.command, self.path, headers, body)
                status, more, content = answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **more}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

            do_POST = do_GET  # noqa: N815 - as the base class calls it

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._http = Quiet(("127.0.0.1", port), Handler)
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> _Answer:
        raise NotImplementedError

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class StubServer(_Stub):
    """Answers `POST /segment?format=dicom` as SLSNet Server does; makes `objects` objects."""

    objects = 3

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> _Answer:
        assert method == "POST" and path.startswith("/segment?format=dicom&objects=")
        assert headers["content-type"] == "application/dicom"
        photo = pydicom.dcmread(BytesIO(body))
        results = [_result(photo) for _ in range(self.objects)]
        if len(results) == 1:
            return 200, {"Content-Type": "application/dicom"}, results[0]
        kind, content = encode(results)
        return 200, {"Content-Type": kind}, content


def problem(status: int, detail: str, **headers: str) -> _Answer:
    """What SLSNet Server answers if something is wrong."""
    document = {"type": "about:blank", "status": status, "detail": detail}
    return (
        status,
        {"Content-Type": "application/problem+json", **headers},
        json.dumps(document).encode(),
    )


class StubArchive(_Stub):
    """A DICOMweb archive in memory."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.held: dict[str, bytes] = {}
        """Objects by their UIDs."""
        self.stored: list[str] = []
        """UIDs of all objects that came, also again."""
        self.refuses: Callable[[Dataset], int] = lambda _: 0
        """Gives an object's failure reason; 0 for none."""

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> _Answer:
        where, _, query = path.partition("?")
        if (method, where) == ("POST", "/dicom-web/studies"):
            return self._store(headers, body)
        if (method, where) == ("GET", "/dicom-web/instances"):
            return self._search(dict(urllib.parse.parse_qsl(query)))
        if method == "GET" and where.startswith("/dicom-web/studies/"):
            uid = where.rpartition("/")[2]
            if uid not in self.held:
                return 404, {}, b""
            kind, content = encode([self.held[uid]])
            return 200, {"Content-Type": kind}, content
        return 404, {}, b""

    def _store(self, headers: Mapping[str, str], body: bytes) -> _Answer:
        contents = files(headers["content-type"], body)
        failed, stored = [], []
        for content in contents:
            dataset = pydicom.dcmread(BytesIO(content))
            if reason := self.refuses(dataset):
                failed.append({"00081197": {"vr": "US", "Value": [reason]}})
                continue
            stored.append({"00081155": {"vr": "UI", "Value": [str(dataset.SOPInstanceUID)]}})
            self.stored.append(str(dataset.SOPInstanceUID))
            self.held[str(dataset.SOPInstanceUID)] = content
        told = {"00081198": failed, "00081199": stored}
        document = {tag: {"vr": "SQ", "Value": items} for tag, items in told.items() if items}
        status = 409 if len(failed) == len(contents) else 202 if failed else 200
        return status, {"Content-Type": "application/dicom+json"}, json.dumps(document).encode()

    def _search(self, query: Mapping[str, str]) -> _Answer:
        found = []
        for content in self.held.values():
            dataset = pydicom.dcmread(BytesIO(content))
            wanted = {n: v for n, v in query.items() if n not in ("limit", "offset")}
            if any(str(dataset[name].value) != value for name, value in wanted.items()):
                continue
            found.append(
                {
                    tag: {"vr": "UI", "Value": [str(dataset[tag].value)]}
                    for tag in ("00080016", "00080018", "0020000D", "0020000E")
                }
            )
        start, count = int(query["offset"]), int(query["limit"])
        page = json.dumps(found[start : start + count]).encode()
        return 200, {"Content-Type": "application/dicom+json"}, page


def store(
    port: int,
    contents: Sequence[bytes],
    *,
    title: str = TITLE,
    sender: str = SENDER,
    on_answer: Callable[[str, int], None] = lambda _uid, _status: None,
) -> list[int]:
    """Send objects by C-STORE; return the statuses, -1 for no answer or no association.

    Args:
        on_answer: called with each object's UID and status as soon as it is known.
    """
    datasets = [pydicom.dcmread(BytesIO(content)) for content in contents]
    kinds = {(one.SOPClassUID, one.file_meta.TransferSyntaxUID) for one in datasets}
    statuses = []
    with associated(port, kinds, title=title, sender=sender) as association:
        for dataset in datasets:
            status = -1
            if association.is_established:
                with contextlib.suppress(ValueError, RuntimeError):
                    status = int(association.send_c_store(dataset).get("Status", -1))
            statuses.append(status)
            on_answer(str(dataset.SOPInstanceUID), status)
    return statuses


def echo(port: int, *, title: str = TITLE, sender: str = SENDER) -> int:
    """The status of a C-ECHO, -1 for no answer or no association."""
    with associated(port, [(_VERIFICATION, None)], title=title, sender=sender) as association:
        if not association.is_established:
            return -1
        return int(association.send_c_echo().get("Status", -1))


@contextlib.contextmanager
def associated(
    port: int, kinds: Iterable[tuple[str, str | None]], *, title: str = TITLE, sender: str = SENDER
) -> Iterator[Association]:
    """An association, established or not, for SOP classes in transfer syntaxes (None: usual)."""
    entity = AE(ae_title=sender)
    for kind in kinds:
        entity.add_requested_context(*kind)
    association = entity.associate("127.0.0.1", port, ae_title=title)
    try:
        yield association
    finally:
        if association.is_established:
            association.release()
        # pynetdicom leaves it to the garbage collector if the peer went first.
        if association.dul.socket is not None and association.dul.socket.socket is not None:
            association.dul.socket.socket.close()


@dataclass
class Running:
    """A receiver and a relay, in threads of the test's process."""

    port: int
    journal: Journal
    metrics: Metrics
    take: Callable[[bytes], None]
    """Takes an object as if it had come by C-STORE."""

    def settled(self) -> None:
        """Wait until nothing is left to be tried, and all is counted."""
        # What is claimed is private: nobody else needs to know.
        until(lambda: not self.journal.state().waiting and not self.journal._claimed)


@contextlib.contextmanager
def running(
    folder: Path,
    server: str,
    destinations: Mapping[str, Destination],
    *,
    peers: Sequence[str] = (SENDER,),
    limits: Limits | None = None,
    give_up_s: float = 3600,
    listens: bool = True,
    **options: Any,
) -> Iterator[Running]:
    """What `python -m server.archive serve` runs, with short pauses; `options` of the journal."""
    ready: Future[Running] = Future()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def work() -> None:
        with Journal(folder, **options) as journal:
            metrics = Metrics(journal)
            segmenter = SegmentingServer(server, objects="seg,overlay,sr")
            patience = Patience(0.01, 0.05, give_up_s)
            relay = Relay(journal, segmenter, destinations, metrics, patience=patience)
            receiver = Receiver(
                journal,
                title=TITLE,
                peers=[Allowed.of(peer) for peer in peers],
                limits=limits or Limits(),
                counted=lambda result: metrics.received.labels(result).inc(),
                arrived=lambda: _ring(loop, relay),
            )

            def take(content: bytes) -> None:
                journal.accept(uid_of(content), content)
                _ring(loop, relay)

            async with relay.working(5):
                port = receiver.start("127.0.0.1", 0) if listens else 0
                ready.set_result(Running(port, journal, metrics, take))
                await stop.wait()
                await asyncio.to_thread(receiver.stop, 0.5)

    thread = threading.Thread(target=lambda: _run(loop, work(), ready))
    thread.start()
    try:
        yield ready.result(60)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        assert not thread.is_alive()


def _ring(loop: asyncio.AbstractEventLoop, relay: Relay) -> None:
    loop.call_soon_threadsafe(relay.arrived)


def _run(loop: asyncio.AbstractEventLoop, work: Any, ready: Future[Running]) -> None:
    try:
        loop.run_until_complete(work)
        loop.run_until_complete(loop.shutdown_default_executor())
    except BaseException as error:
        if not ready.done():
            ready.set_exception(error)
        raise
    finally:
        loop.close()


@dataclass
class ArchiveProcess:
    """A running `python -m server.archive serve`."""

    process: subprocess.Popen[bytes]
    port: int
    health_port: int
    log_file: Path

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}{path}") as answer:
            text: str = answer.read().decode()
        return text


@contextlib.contextmanager
def serve_archive(journal: Path, *flags: str, port: int = 0) -> Iterator[ArchiveProcess]:
    """A process with these flags, ready; killed in the end if it still runs."""
    port, health_port = port or free_port(), free_port()
    with tempfile.NamedTemporaryFile(suffix=".log") as output:
        arguments = [
            *("-m", "server.archive", "serve", "--journal", str(journal)),
            *("--port", str(port), "--health-port", str(health_port), "--peer", SENDER),
            *("--min-free-bytes", "1", "--retry-s", "0.05", "--longest-retry-s", "0.2", *flags),
        ]
        with started(arguments, output) as process:
            archive = ArchiveProcess(process, port, health_port, Path(output.name))

            def is_ready() -> bool:
                assert process.poll() is None, archive.log()
                with contextlib.suppress(OSError):
                    return "ready" in archive.get("/health/ready")
                return False

            try:
                until(is_ready)
                yield archive
            finally:
                if process.poll() is None:
                    process.kill()
