"""Which network answers: told by the bytes that were loaded, not by what a file says of itself."""

import asyncio
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from common.stamp import StampError, check_digest, stamped, trial_images, unstamped
from model.export import stamp
from server.backends import BackendInfo, Images
from server.backends.onnxruntime import OnnxRuntimeBackend
from server.inference.service import Service
from server.observe.metrics import Metrics
from server.settings import Settings
from tests.support import MODEL
from tests.support.answers import assert_problem, figures
from tests.support.lesions import drawn_photo
from tests.support.site import Site, inverted, open_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("identity")) as site:
        yield site


def card(site: Site) -> dict[str, str]:
    found: dict[str, str] = httpx.get(f"{site.server.url}/model", headers=site.headers).json()
    return found


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_shipped_file_ends_in_its_answers_and_its_digest() -> None:
    content = MODEL.read_bytes()
    check_digest(content)
    assert unstamped(content) != content
    keys = [entry.key for entry in onnx.load(MODEL).metadata_props]
    assert keys[-2:] == ["trial_answers", "content_sha256"]


def test_a_stamp_replaces_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "slsnet.onnx"
    shutil.copy(MODEL, path)
    stamp(path)
    assert path.read_bytes() == MODEL.read_bytes()
    path.write_bytes(inverted("1.1.0"))
    stamp(path)
    assert unstamped(path.read_bytes()) == inverted("1.1.0")
    check_digest(path.read_bytes())


def test_what_follows_the_digest_is_not_overlooked() -> None:
    with pytest.raises(StampError, match="damaged"):
        check_digest(MODEL.read_bytes() + b"r\x00")


def test_the_model_card_shows_the_files_own_digest(site: Site) -> None:
    assert card(site)["file_sha256"] == file_sha256(MODEL)


@pytest.mark.parametrize("bytes_of_block", [4096, 65536])
@pytest.mark.parametrize("where", [0.0, 0.05, 0.3, 0.5, 0.8, 0.97, 1.0])
def test_a_damaged_block_anywhere_is_refused(site: Site, where: float, bytes_of_block: int) -> None:
    content = bytearray(MODEL.read_bytes())
    start = int(where * (len(content) - bytes_of_block))
    content[start : start + bytes_of_block] = bytes(bytes_of_block)
    site.model.write_bytes(content)
    assert_problem(site.reload(), 422, "from before goes on")
    assert card(site)["file_sha256"] == file_sha256(MODEL)
    photo = drawn_photo(3, 300, 200)
    answer = httpx.post(f"{site.server.url}/segment", content=photo, headers=site.headers)
    assert answer.status_code == 200


def test_a_whole_file_of_other_answers_than_it_was_exported_with_is_refused(site: Site) -> None:
    backend = OnnxRuntimeBackend(MODEL, threads=1)
    site.model.write_bytes(stamped(inverted("1.1.0"), backend.infer))
    backend.close()
    assert_problem(site.reload(), 422, "On the trial images the network's answers differ")
    assert card(site)["file_sha256"] == file_sha256(MODEL)


def test_a_batch_is_of_one_load_though_the_metadata_is_equal(site: Site) -> None:
    shutil.copy(MODEL, site.model)
    assert site.reload().status_code == 200
    before = card(site)
    photo = drawn_photo(3, 1000, 800)
    files = [("file", ("a.jpg", photo))] * 24
    # Of such answers, 2 MB each, few are made before somebody reads them: most photos are run
    # after the network has changed.
    url = f"{site.server.url}/segment/batch?mask=probabilities&size=original"
    run = figures(site.server)["slsnet_batch_size_sum"]
    with httpx.stream("POST", url, files=files, headers=site.headers, timeout=60) as response:
        lines = response.iter_lines()
        answers = [json.loads(next(lines))]
        site.model.write_bytes(inverted(before["version"]))
        after = site.reload().json()
        assert figures(site.server)["slsnet_batch_size_sum"] - run < 18
        answers += [json.loads(line) for line in lines]
    assert [answer["status"] for answer in answers] == [200] * 24
    results = [answer["result"] for answer in answers]
    assert {result["lesion"]["area"] for result in results} == {results[0]["lesion"]["area"]}
    assert {result["model"]["file_sha256"] for result in results} == {before["file_sha256"]}
    assert after["weights_sha256"] == before["weights_sha256"]
    assert after["file_sha256"] == file_sha256(site.model) != before["file_sha256"]
    url = f"{site.server.url}/segment?format=json"
    answer = httpx.post(url, content=photo, headers=site.headers).json()
    assert answer["model"]["file_sha256"] == after["file_sha256"]
    assert answer["lesion"]["area"] != results[0]["lesion"]["area"]


class _Stub:
    """A network that says nothing of itself."""

    def __init__(self, probability: float) -> None:
        self._probability = probability

    def describe(self) -> BackendInfo:
        return BackendInfo("stub", "1", "cpu", "fp32", 4)

    def warm_up(self) -> None: ...

    def infer(self, batch: Images) -> NDArray[np.float32]:
        return np.full((len(batch), 128, 128), self._probability, np.float32)

    def close(self) -> None: ...


def test_a_request_keeps_its_network_where_none_has_a_name() -> None:
    async def scenario() -> None:
        service = Service(Settings(), Metrics())
        await service.use(_Stub(0.25))
        with service.networks.default.pinned() as network:
            for later in (0.5, 0.75):
                await service.use(_Stub(later))
                (inference,), _ = await service.networks.default.infer(
                    list(trial_images()[:1]),
                    deadline=time.perf_counter() + 60,
                    is_gone=lambda: False,
                    bulk=True,
                    pin=network,
                )
                assert (inference.probability == 0.25).all()
        await service.close()

    asyncio.run(scenario())
