"""Objects are read by processes forked from one that has loaded the libraries."""

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
from tests.support.dicom import dicom_bytes, needs_dicom
from tests.support.launch import serve
from tests.support.lesions import lesion_photo
from tests.support.waiting import until

pytest.importorskip("pydicom", reason="needs requirements-dicom.txt")
needs_dicom()
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere none is forked")

PIXELS = lesion_photo(2, 160, 120).pixels
OBJECT = dicom_bytes(PIXELS)
TEMPLATE = "photos.dicom.template"


def template(of: int) -> psutil.Process:
    (found,) = (one for one in psutil.Process(of).children() if TEMPLATE in one.cmdline())
    return found


def is_gone(one: psutil.Process) -> bool:
    return not one.is_running() or one.status() == psutil.STATUS_ZOMBIE


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


def test_one_that_is_killed_costs_its_object_alone(
    ours: psutil.Process, waiting: process.Opened
) -> None:
    with process.opened(OBJECT, 128, None) as other:
        first, *_ = sorted(ours.children(), key=lambda one: (one.create_time(), one.pid))
        first.kill()
        with pytest.raises(ValueError, match=f"ended with -{signal.SIGKILL:d}"):
            waiting.decode(128)
        assert other.decode(128).shape == (128, 128, 3)
    assert read_photo(OBJECT).width == 160
    assert template(os.getpid()) == ours


def test_a_template_that_is_killed_is_replaced(
    ours: psutil.Process, waiting: process.Opened
) -> None:
    ours.kill()
    ours.wait()
    # What it had forked ends with it, since nobody could end it any more.
    with pytest.raises(ValueError, match=f"ended with -{signal.SIGKILL:d}"):
        waiting.decode(128)
    assert read_photo(OBJECT).width == 160
    assert template(os.getpid()) != ours


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
