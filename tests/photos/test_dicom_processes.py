"""Objects are read by processes forked from one that has loaded the libraries."""

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

from photos.dicom import process
from photos.image import read_photo
from photos.structure import TakesTooLongError
from tests.support.dicom import dicom_bytes, needs_dicom
from tests.support.launch import serve
from tests.support.lesions import lesion_photo
from tests.support.waiting import until

pytest.importorskip("pydicom", reason="needs requirements-dicom.txt")
needs_dicom()
resource = pytest.importorskip("resource", reason="the system has no such limits")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere none is forked")

PIXELS = lesion_photo(2, 160, 120).pixels
OBJECT = dicom_bytes(PIXELS)
TEMPLATE = "photos.dicom.template"


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
    assert read_photo(OBJECT).width == 160
    return template(os.getpid())


@pytest.fixture
def waiting() -> Iterator[process.Opened]:
    """An object whose process waits to be told to decode it."""
    with process.opened(OBJECT, 128, None) as opened:
        yield opened


def first_of(ours: psutil.Process) -> psutil.Process:
    """What was forked first of what still runs."""
    return min(ours.children(), key=lambda one: (one.create_time(), one.pid))


def test_one_that_is_killed_costs_its_object_alone(
    ours: psutil.Process, waiting: process.Opened
) -> None:
    with process.opened(OBJECT, 128, None) as other:
        first_of(ours).kill()
        with pytest.raises(ValueError, match=f"ended with -{signal.SIGKILL:d}"):
            waiting.decode(128)
        assert other.decode(128).shape == (128, 128, 3)
    assert read_photo(OBJECT).width == 160
    assert template(os.getpid()) == ours


def test_after_a_crash_there_is_another_template(
    ours: psutil.Process, waiting: process.Opened
) -> None:
    with process.opened(OBJECT, 128, None) as other:
        first_of(ours).send_signal(signal.SIGSEGV)
        with pytest.raises(ValueError, match=f"ended with -{signal.SIGSEGV:d}"):
            waiting.decode(128)
        assert read_photo(OBJECT).width == 160
        # The one before ends once it has nothing more to do.
        assert len([one for one in psutil.Process().children() if is_template(one)]) == 2
        assert other.decode(128).shape == (128, 128, 3)
    until(lambda: is_gone(ours))


def test_a_template_that_is_killed_is_replaced(
    ours: psutil.Process, waiting: process.Opened
) -> None:
    ours.kill()
    # At once, while it dies.
    assert read_photo(OBJECT).width == 160
    # What it had forked ends with it, since nobody could end it any more.
    with pytest.raises(ValueError, match=f"ended with -{signal.SIGKILL:d}"):
        waiting.decode(128)
    assert template(os.getpid()) != ours


def test_one_that_stands_still_is_ended_in_time(
    ours: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Private: the real limits would be waited for.
    monkeypatch.setattr(process, "_MAX_S", 0.5)
    monkeypatch.setattr(process, "_END_S", 0.5)
    with pytest.raises(TakesTooLongError), process.opened(OBJECT, 128, None) as opened:  # noqa: PT012
        first_of(ours).suspend()
        ours.suspend()
        opened.decode(128)
    monkeypatch.undo()
    assert read_photo(OBJECT).width == 160


@pytest.mark.usefixtures("ours")
def test_a_module_that_does_not_load_costs_no_other(waiting: process.Opened) -> None:
    # Private: all that are asked for are there.
    broken = process._template(process._START).forked("photos.nothing", ())
    with pytest.raises(ValueError, match="ended with 1"):
        broken.hear()
    broken.end()
    assert waiting.decode(128).shape == (128, 128, 3)


@pytest.mark.usefixtures("ours")
def test_where_files_are_short_none_stays_open() -> None:
    before = psutil.Process().num_fds()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208
    for free in range(1, 7):
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + free, limits[1]))
        try:
            with contextlib.suppress(OSError), process.opened(OBJECT, 128, None) as opened:
                opened.decode(128)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert psutil.Process().num_fds() == before
    assert read_photo(OBJECT).width == 160


def test_many_at_a_time_leave_nothing_open(ours: psutil.Process) -> None:
    def files() -> list[int]:
        return [psutil.Process().num_fds(), ours.num_fds()]

    until(lambda: not ours.children())
    before = files()
    with ThreadPoolExecutor(6) as pool:
        sizes = {(one.width, one.height) for one in pool.map(read_photo, 24 * [OBJECT])}
        cut = [pool.submit(read_photo, OBJECT[: len(OBJECT) // 2]) for _ in range(6)]
        assert all(one.exception() for one in cut)
    assert sizes == {(160, 120)}
    until(lambda: all(now <= was for now, was in zip(files(), before, strict=True)))


@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_server(number: signal.Signals, tmp_path: Path) -> None:
    with serve() as server:
        httpx.post(f"{server.url}/segment", content=OBJECT).raise_for_status()
        theirs = template(server.process.pid)
        server.process.send_signal(number)
        server.wait()
        until(lambda: is_gone(theirs))
