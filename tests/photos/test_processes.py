"""Photos are read by processes forked from one that has loaded the decoders."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from photos.image import read_photo
from photos.processes import parent
from photos.structure import TakesTooLongError
from tests.support.dicom import dicom_bytes, needs_dicom
from tests.support.launch import serve
from tests.support.lesions import lesion_photo
from tests.support.phones import encode_phone, is_here, needs
from tests.support.waiting import until

resource = pytest.importorskip("resource", reason="the system has no such limits")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere none is forked"),
    pytest.mark.skipif(not is_here("AVIF"), reason="needs the library for AVIF"),
]

PIXELS = lesion_photo(2, 160, 120).pixels
PHOTO = encode_phone(PIXELS, "AVIF") if is_here("AVIF") else b""
TEMPLATE = str(Path(parent.__file__).with_name("template.py"))

ECHO = """
import sys

from photos.processes.child import taken, told


def main():
    data = taken()
    told({"bytes": len(data)})
    if sys.stdin.buffer.read(1):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    return 0
"""


def is_gone(one: psutil.Process) -> bool:
    return not one.is_running() or one.status() == psutil.STATUS_ZOMBIE


def is_template(one: psutil.Process) -> bool:
    return not is_gone(one) and TEMPLATE in one.cmdline()


def template(of: int) -> psutil.Process:
    (found,) = filter(is_template, psutil.Process(of).children())
    return found


@pytest.fixture
def ours() -> psutil.Process:
    """The template of this process."""
    assert read_photo(PHOTO).width == 160
    return template(os.getpid())


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """What processes of these tests run."""
    file = tmp_path / "echo.py"
    file.write_text(ECHO)
    return file


@contextlib.contextmanager
def asked(echo: Path, max_s: float = 60) -> Iterator[parent.Process]:
    """A process that has told what it got, and waits to be asked for it."""
    with parent.running(echo, max_s=max_s) as process:
        process.give(b"abc")
        assert process.hear() == {"bytes": 3}
        yield process


def answer(process: parent.Process) -> bytes:
    process.send(b"\n")
    return process.rest(3)


@pytest.fixture
def waiting(echo: Path) -> Iterator[parent.Process]:
    with asked(echo) as process:
        yield process


def first_of(ours: psutil.Process) -> psutil.Process:
    """What was forked first of what still runs."""
    return min(ours.children(), key=lambda one: (one.create_time(), one.pid))


def test_all_formats_have_one_template(ours: psutil.Process) -> None:
    for name in ("HEIC", "AVIF"):
        needs(name)
        assert read_photo(encode_phone(PIXELS, name)).width == 160
    needs_dicom()
    assert read_photo(dicom_bytes(PIXELS)).width == 160
    assert template(os.getpid()) == ours


def test_elsewhere_each_loads_its_decoder_itself(
    ours: psutil.Process, echo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with asked(echo) as process:
        assert not ours.children()
        assert answer(process) == b"abc"
    assert read_photo(PHOTO).width == 160


def test_one_that_is_killed_costs_its_photo_alone(
    ours: psutil.Process, echo: Path, waiting: parent.Process
) -> None:
    with asked(echo) as other:
        first_of(ours).kill()
        # The system kills one for its memory.
        with pytest.raises(MemoryError):
            answer(waiting)
        assert answer(other) == b"abc"
    assert read_photo(PHOTO).width == 160
    assert template(os.getpid()) == ours


def test_after_a_crash_there_is_another_template(
    ours: psutil.Process, echo: Path, waiting: parent.Process
) -> None:
    with asked(echo) as other:
        first_of(ours).send_signal(signal.SIGSEGV)
        with pytest.raises(ValueError, match=f"ended with -{signal.SIGSEGV:d}"):
            answer(waiting)
        assert read_photo(PHOTO).width == 160
        # The one before ends once it has nothing more to do.
        assert len([one for one in psutil.Process().children() if is_template(one)]) == 2
        assert answer(other) == b"abc"
    until(lambda: is_gone(ours))


def test_a_template_that_is_killed_is_replaced(
    ours: psutil.Process, waiting: parent.Process
) -> None:
    ours.kill()
    # At once, while it dies.
    assert read_photo(PHOTO).width == 160
    # What it had forked ends with it, since nobody could end it any more.
    with pytest.raises(MemoryError):
        answer(waiting)
    assert template(os.getpid()) != ours


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_begun_is_done_while_the_whole_service_is_asked_to_end(
    ours: psutil.Process, waiting: parent.Process, number: signal.Signals
) -> None:
    for one in (first_of(ours), ours):
        one.send_signal(number)
    assert answer(waiting) == b"abc"
    assert read_photo(PHOTO).width == 160
    assert template(os.getpid()) == ours


def test_one_that_stands_still_is_ended_in_time(
    ours: psutil.Process, echo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Private: the real limit would be waited for.
    monkeypatch.setattr(parent, "_END_S", 0.5)
    with pytest.raises(TakesTooLongError), asked(echo, max_s=0.5) as process:  # noqa: PT012
        first_of(ours).suspend()
        ours.suspend()
        answer(process)
    monkeypatch.undo()
    assert read_photo(PHOTO).width == 160


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGXCPU])
def test_what_crashes_behind_its_answer_is_not_trusted(echo: Path, number: signal.Signals) -> None:
    crash = f"    import os\n    os.kill(os.getpid(), {number:d})\n    return 0"
    echo.write_text(ECHO.replace("    return 0", crash))
    error = ValueError if number == signal.SIGSEGV else TakesTooLongError
    with asked(echo) as process, pytest.raises(error):
        answer(process)


@pytest.mark.parametrize(
    ("line", "more"),
    [
        ('told({"bytes": len(data)})', "sys.stdout.buffer.write(20_000 * b'x')"),
        ("sys.stdout.buffer.write(data)", "sys.stdout.buffer.write(data + b'x')"),
    ],
)
def test_what_says_too_much_is_damaged_and_not_too_large(echo: Path, line: str, more: str) -> None:
    # It does not end by itself.
    more += "; sys.stdout.buffer.flush(); sys.stdin.buffer.read()"
    echo.write_text(ECHO.replace(line, more))
    with pytest.raises(ValueError, match="more than it should"), asked(echo) as process:
        answer(process)


@pytest.mark.usefixtures("ours")
def test_a_file_that_does_not_load_costs_no_other(tmp_path: Path, waiting: parent.Process) -> None:
    with (
        parent.running(tmp_path / "nothing.py") as broken,
        pytest.raises(ValueError, match="ended with 1"),
    ):
        broken.hear()
    assert answer(waiting) == b"abc"


@pytest.mark.usefixtures("ours")
def test_where_files_are_short_none_stays_open(echo: Path) -> None:
    before = psutil.Process().num_fds()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208
    for free in range(1, 7):
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + free, limits[1]))
        try:
            with contextlib.suppress(OSError), asked(echo) as process:
                answer(process)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert psutil.Process().num_fds() == before
    assert read_photo(PHOTO).width == 160


def test_many_at_a_time_leave_nothing_open(ours: psutil.Process) -> None:
    def files() -> list[int]:
        return [psutil.Process().num_fds(), ours.num_fds()]

    until(lambda: not ours.children())
    before = files()
    with ThreadPoolExecutor(6) as pool:
        sizes = {(one.width, one.height) for one in pool.map(read_photo, 24 * [PHOTO])}
        cut = [pool.submit(read_photo, PHOTO[: len(PHOTO) // 2]) for _ in range(6)]
        assert all(one.exception() for one in cut)
    assert sizes == {(160, 120)}
    until(lambda: all(now <= was for now, was in zip(files(), before, strict=True)))


@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_server(number: signal.Signals) -> None:
    with serve() as server:
        httpx.post(f"{server.url}/segment", content=PHOTO).raise_for_status()
        theirs = template(server.process.pid)
        server.process.send_signal(number)
        server.wait()
        until(lambda: is_gone(theirs))
