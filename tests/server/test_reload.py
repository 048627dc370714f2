"""Another network in the same file: it takes over under load, or it does not and says so."""

import contextlib
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import onnx
import pytest

from tests.support import MODEL
from tests.support.answers import assert_problem, figures, read_png
from tests.support.samples import Sample
from tests.support.site import Site, inverted, open_site
from tests.support.waiting import until


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("reload")) as site:
        yield site


def test_networks_change_under_load_and_are_never_mixed(site: Site, photos: list[Sample]) -> None:
    first = site.version()
    other = inverted("turned")
    url = f"{site.server.url}/segment?format=json&mask=png&size=model&threshold=0.5"
    stop = threading.Event()
    ledgers: list[list[tuple[str, int]]] = [[] for _ in range(4)]

    def area(client: httpx.Client, photo: Sample) -> tuple[str, int]:
        answer = client.post(url, content=photo.data)
        assert answer.status_code == 200
        card = answer.json()
        return card["model"]["version"], card["lesion"]["area"]

    def keep_sending(photo: Sample, answers: list[tuple[str, int]]) -> None:
        with httpx.Client(headers=site.headers, timeout=60) as client:
            while not stop.is_set():
                answers.append(area(client, photo))

    def all_have(version: str) -> bool:
        return all(version in {name for name, _ in answers} for answers in ledgers)

    with ThreadPoolExecutor(4) as clients, contextlib.ExitStack() as stack:
        stack.callback(stop.set)
        sending = [
            clients.submit(keep_sending, photo, answers)
            for photo, answers in zip(photos, ledgers, strict=False)
        ]
        until(lambda: all_have(first))
        site.model.write_bytes(other)
        answer = site.reload()
        assert answer.status_code == 200
        assert answer.json()["version"] == "turned"
        until(lambda: all_have("turned"))
        shutil.copy(MODEL, site.model)
        site.server.process.send_signal(signal.SIGHUP)
        until(lambda: site.version() == first)
        until(lambda: all(answers[-1][0] == first for answers in ledgers))
        stop.set()
        for future in sending:
            future.result()

    for ledger in ledgers:
        versions = [version for version, _ in ledger]
        assert set(versions) == {first, "turned"}
        # What an answer says that made it is what made it: the areas are each other's complement,
        # but for what bfloat16 moves: the turned network is run by ONNX Runtime, in float32.
        areas = {
            version: {area for name, area in ledger if name == version} for version in versions
        }
        assert all(len(found) == 1 for found in areas.values())
        assert abs(sum(found.pop() for found in areas.values()) - 128 * 128) <= 32


@pytest.mark.parametrize("content", [b"not a network", b"", None])
def test_a_network_that_cannot_serve_leaves_the_one_before(
    site: Site, photos: list[Sample], content: bytes | None
) -> None:
    before = site.version()
    failed = figures(site.server).get("slsnet_reloads_total", 0)
    told = site.server.log().count("the network slsnet is not changed: ")
    if content is None:
        site.model.unlink()
    else:
        site.model.write_bytes(content)
    assert_problem(site.reload(), 422, "from before goes on")
    load = f"{site.server.url}/v2/repository/models/slsnet/load"
    assert httpx.post(load, headers=site.headers, timeout=60).status_code == 422
    until(lambda: site.server.log().count("the network slsnet is not changed: ") == told + 2)
    site.server.process.send_signal(signal.SIGHUP)
    answer = httpx.post(
        f"{site.server.url}/segment", content=photos[0].data, headers=site.headers, timeout=600
    )
    assert answer.status_code == 200
    assert read_png(answer.content).any()
    until(lambda: figures(site.server)["slsnet_reloads_total"] >= failed + 3)
    assert site.version() == before
    until(lambda: site.server.log().count("the network slsnet is not changed: ") == told + 3)
    shutil.copy(MODEL, site.model)


def test_requests_go_on_to_mean_the_same_network(site: Site) -> None:
    shutil.copy(MODEL.with_name("enet.onnx"), site.model)
    assert_problem(site.reload(), 422, "holds the network enet")
    assert httpx.get(f"{site.server.url}/model", headers=site.headers).json()["name"] == "slsnet"
    shutil.copy(MODEL, site.model)


def test_a_network_whose_answers_are_not_probabilities_is_refused(site: Site) -> None:
    graph = onnx.load_model_from_string(inverted("broken"))
    for initializer in graph.graph.initializer:
        if initializer.name == "one":
            initializer.CopyFrom(onnx.numpy_helper.from_array(np.array(7, np.float32), "one"))
    site.model.write_bytes(graph.SerializeToString())
    assert_problem(site.reload(), 422, "not probabilities")
    assert site.version() != "broken"
    shutil.copy(MODEL, site.model)
