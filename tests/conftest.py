"""Real photos where they are at hand, generated ones elsewhere; and a real server."""

import functools
import inspect
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from unittest import mock

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support import ROOT, launch
from tests.support.forked import Forked
from tests.support.launch import ServerProcess, serve
from tests.support.lesions import encode_photo, lesion_photo
from tests.support.offline import Offline
from tests.support.samples import Sample
from tests.support.waiting import until

# Else each of the hundreds of processes that tests start compiles all of the project for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Nor does any of them need NumPy's threads, one for each core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

launch.forked = Forked


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that none of them is left to one process at the end.

    What is run before a release alone is skipped.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if os.environ.get("THOROUGH", "") in ("", "0"):
        skip = pytest.mark.skip(reason="takes long: `make test THOROUGH=1` runs it")
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def data_dir() -> Path | None:
    """Folder of real dermoscopic data sets, if this machine has one."""
    folder = Path(os.environ.get("SLSNET_DATA", ROOT / "../shared/data"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def photos(data_dir: Path | None) -> list[Sample]:
    """A dozen photos at the size they were taken at."""
    if data_dir is None:
        sizes = [(600, 450), (1024, 768), (767, 1022), (2048, 1536)]
        return [_generated(seed, *sizes[seed % len(sizes)]) for seed in range(12)]
    return [_read_pair(path) for path in islice(_images(data_dir / "native"), 12)]


@pytest.fixture(scope="session")
def many_photos(data_dir: Path | None) -> list[Sample]:
    """200 different photos."""
    if data_dir is None:
        return [_generated(seed, 256 + seed, 256) for seed in range(200)]
    folders = [data_dir / "native", data_dir / "isic2017/ISIC-2017_Training_Data"]
    paths = (path for folder in folders for path in _images(folder))
    return [Sample(path.stem, path.read_bytes(), _NO_MASK) for path in islice(paths, 200)]


@pytest.fixture(scope="session")
def two_lesions() -> bytes:
    """A photo in which the network finds a large lesion and a small one."""
    large, small = lesion_photo(2, 320, 400), lesion_photo(3, 160, 400)
    return encode_photo(np.concatenate([large.pixels, small.pixels], axis=1), "PNG")


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """One server process for all tests that leave it as it was."""
    # A busy machine would take longer than the 30 s of the default for what tests post at once.
    with serve("--request-timeout-ms", "600000") as process:
        yield process


@pytest.fixture(scope="session")
def small_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network's file with which a server starts in half the time: see `tests.support.site`."""
    # Not above: most tests need no onnx.
    from tests.support.site import small

    path = tmp_path_factory.mktemp("network") / "small.onnx"
    path.write_bytes(small())
    return path


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch, small_network: Path) -> None:
    """Servers that the test starts run that network, if no flag names another."""
    monkeypatch.setenv("SLSNET_MODEL", str(small_network))


@pytest.fixture(scope="session", autouse=True)
def _patient_clients() -> None:
    """No test is about how soon an answer comes; httpx's 5 s are too few for a busy machine."""
    timeout: httpx.Timeout = inspect.signature(httpx.Client).parameters["timeout"].default
    timeout.connect = timeout.read = timeout.write = timeout.pool = 60


@pytest.fixture(scope="session", autouse=True)
def _quick_clients() -> Iterator[None]:
    """Clients share the authorities that they trust, which take httpx longer than a request."""
    once = functools.cache(httpx.create_ssl_context)
    with mock.patch("httpx._transports.default.create_ssl_context", once):
        yield


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> None:
    """A test that uses the common server finds it done with what the test before left there."""
    if "server" in request.fixturenames:
        process = request.getfixturevalue("server")
        until(lambda: "\nslsnet_requests_in_flight 0.0" in httpx.get(f"{process.url}/metrics").text)


@pytest.fixture(scope="session")
def offline() -> Offline:
    return Offline()


_NO_MASK = np.zeros((0, 0), np.bool_)


def _images(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jpg"))


def _read_pair(path: Path) -> Sample:
    with Image.open(path.with_name(f"{path.stem}_segmentation.png")) as mask:
        return Sample(path.stem, path.read_bytes(), np.asarray(mask.convert("L")) > 127)


def _generated(seed: int, width: int, height: int) -> Sample:
    photo = lesion_photo(seed, width, height)
    return Sample(f"lesion_{seed:03d}", encode_photo(photo.pixels), photo.mask)
