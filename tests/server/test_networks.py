"""Several networks in one server: named by requests, loaded and retired while it serves."""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import onnx
import openvino
import pytest
from numpy.typing import NDArray

from common.half import halved
from server.backends import BackendError, BackendInfo, Images
from server.backends.memory import check_memory, memory_left, memory_needed
from server.backends.model_file import read_model
from server.http.problems import told
from server.inference.errors import Unavailable, UnknownNetwork
from server.inference.service import Service
from server.inference.submission import Body, submitted
from server.keys import new_key
from server.observe.metrics import Metrics
from server.observe.stages import Stages
from server.settings import Settings, read_settings
from tests.support import MODEL, ROOT
from tests.support.answers import assert_problem, figures, read_png
from tests.support.launch import ServerProcess, serve
from tests.support.lesions import drawn_photo, encode_photo, lesion_photo
from tests.support.site import inverted, small
from tests.support.streams import close_of, opened, said, stream
from tests.support.waiting import until

PHOTO = drawn_photo(3, 300, 200)
PIXELS = np.random.default_rng(3).integers(0, 256, (1, 128, 128, 3), np.uint8)


@dataclass
class Several:
    """A server of the shipped network and of `turned`, its answer turned round."""

    server: ServerProcess
    folder: Path
    client: httpx.Client

    def post(self, path: str, **options: object) -> httpx.Response:
        return self.client.post(path, **options)  # type: ignore[arg-type]

    def load(self, name: str) -> httpx.Response:
        return self.post(f"/v2/repository/models/{name}/load")

    def unload(self, name: str) -> httpx.Response:
        return self.post(f"/v2/repository/models/{name}/unload")

    def index(self, **body: object) -> dict[str, tuple[str, str]]:
        entries = self.post("/v2/repository/index", json=body).raise_for_status().json()
        return {entry["name"]: (entry["state"], entry["reason"]) for entry in entries}

    def infer(self, name: str) -> httpx.Response:
        tensor = {"name": "image", "shape": [1, 128, 128, 3], "datatype": "UINT8"}
        body = {"inputs": [{**tensor, "data": PIXELS.ravel().tolist()}]}
        return self.post(f"/v2/models/{name}/infer", json=body)

    def probability(self, name: str) -> NDArray[np.float32]:
        answer = self.infer(name).raise_for_status().json()
        assert answer["model_name"] == name
        return np.array(answer["outputs"][0]["data"], np.float32)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    folder = tmp_path_factory.mktemp("networks")
    shutil.copy(MODEL, folder / "slsnet.onnx")
    shutil.copy(MODEL.with_suffix(".quality.json"), folder / "slsnet.quality.json")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "other.onnx"
    elsewhere.write_bytes(inverted("turned"))
    key, line = new_key("ops", "admin")
    (folder / "keys").write_text(line, encoding="utf-8")
    flags = ("--model", str(folder / "slsnet.onnx"), "--model", f"turned={elsewhere}")
    with (
        serve(*flags, "--api-keys-file", str(folder / "keys")) as server,
        httpx.Client(base_url=server.url, headers={"X-API-Key": key}, timeout=60) as client,
    ):
        found = Several(server, folder, client)
        until(lambda: found.index()["turned"][0] == "READY")
        yield found


def assert_turned_round(several: Several, name: str) -> None:
    """The network's answer is that of the default one, turned round."""
    total = several.probability(name) + several.probability("slsnet")
    # One of them may run in another precision.
    assert np.allclose(total, 1, atol=0.05)


def test_tensors_go_to_the_network_that_the_path_names(several: Several) -> None:
    assert_turned_round(several, "turned")
    for path in ("", "/config", "/versions/1"):
        assert several.client.get(f"/v2/models/turned{path}").json()["name"] == "turned"
    assert several.client.get("/v2/models/turned/ready").json() == {"name": "turned", "ready": True}


def test_an_unknown_network_is_refused_by_the_names_that_there_are(several: Several) -> None:
    answer = several.infer("resnet")
    assert answer.status_code == 404
    told = "There is no network 'resnet': those that serve are 'slsnet', 'turned'."
    assert answer.json() == {"error": told}


def test_photos_go_to_the_network_that_the_request_names(several: Several) -> None:
    def area(path: str, **options: object) -> int:
        query = {"size": "model", **options.pop("query", {})}  # type: ignore[dict-item]
        answer = several.post(path, params=query, **options)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        result = found[0]["result"] if isinstance(found, list) else found
        return int(result["lesion"]["area"])

    photo = {"file": ("a.jpg", PHOTO)}
    own = area("/segment/json", content=PHOTO)
    turned = area("/segment/json", content=PHOTO, query={"model": "turned"})
    assert abs(own + turned - 128 * 128) <= 32
    assert area("/segment/json", content=PHOTO, query={"model": "slsnet"}) == own
    named = {"model": "turned"}
    for query, fields in ((named, {}), ({}, named), (named, named)):
        for path in ("/segment/json", "/segment/batch/json"):
            assert area(path, query=query, data=fields, files=photo) == turned


def test_a_network_without_a_table_has_no_quality(several: Several) -> None:
    def quality(name: str) -> object:
        answer = several.post("/segment/json", params={"model": name}, content=PHOTO)
        return answer.json()["quality"]

    assert quality("slsnet") is not None
    assert quality("turned") is None
    answer = several.post("/segment", params={"model": "turned"}, content=PHOTO)
    assert answer.status_code == 200
    assert "Mask-Quality" not in answer.headers


@pytest.mark.parametrize("path", ["/segment", "/segment/json", "/segment/batch"])
def test_photos_for_an_unknown_network_are_refused(several: Several, path: str) -> None:
    photo = {"file": ("a.jpg", PHOTO)}
    told = "There is no network 'resnet': those that serve are 'slsnet', 'turned'."
    in_query = several.post(path, params={"model": "resnet"}, files=photo)
    in_form = several.post(path, data={"model": "resnet"}, files=photo)
    for answer in (in_query, in_form):
        assert_problem(answer, 404, told)
    twice = several.post(path, params={"model": "slsnet"}, data={"model": "turned"}, files=photo)
    assert_problem(twice, 422, "say it once")


def test_the_model_card_lists_all(several: Several) -> None:
    card = several.client.get("/model").json()
    assert card["version"] != "turned"
    listed = {one["name"]: one for one in card["networks"]}
    assert set(listed) == {"slsnet", "turned"}
    assert listed["slsnet"]["default"] and not listed["turned"]["default"]
    assert all(one["ready"] for one in listed.values())
    other = several.client.get("/model", params={"model": "turned"}).json()
    assert other["version"] == listed["turned"]["version"] == "turned"
    assert other["file_sha256"] == listed["turned"]["file_sha256"] != card["file_sha256"]
    assert_problem(several.client.get("/model", params={"model": "resnet"}), 404, "'turned'")


def test_a_network_comes_and_goes_without_a_restart(several: Several) -> None:
    (several.folder / "third.onnx").write_bytes(inverted("third"))
    assert several.index()["third"] == ("UNAVAILABLE", "it is not loaded")
    assert several.infer("third").status_code == 404
    assert several.load("third").status_code == 200
    assert several.index(ready=True).keys() == {"slsnet", "turned", "third"}
    assert_turned_round(several, "third")
    counted = figures(several.server, network="third")
    assert counted["slsnet_network_photos_total"] == 1
    assert counted["slsnet_network_ready"] == counted["slsnet_backend_info"] == 1
    assert several.unload("third").status_code == 200
    assert "'third': those that serve are" in several.infer("third").json()["error"]
    assert "slsnet_network_ready" not in figures(several.server, network="third")
    assert several.unload("third").status_code == 404
    # Again, by its own name, from what its file has become.
    shutil.copy(MODEL, several.folder / "third.onnx")
    assert several.load("third").status_code == 200
    assert (several.probability("third") == several.probability("slsnet")).all()
    assert several.unload("third").status_code == 200


def test_one_that_was_named_at_the_start_can_be_retired_and_brought_back(
    several: Several,
) -> None:
    assert several.unload("turned").status_code == 200
    assert several.client.get("/v2/models/turned/ready").status_code == 404
    assert several.load("turned").status_code == 200
    assert_turned_round(several, "turned")


def test_a_network_that_cannot_serve_is_named_and_the_others_go_on(several: Several) -> None:
    (several.folder / "broken.onnx").write_bytes(b"no network")
    answer = several.load("broken")
    assert answer.status_code == 422
    assert "'broken' cannot serve, the others go on" in answer.json()["error"]
    assert "broken.onnx" in several.index()["broken"][1]
    until(lambda: "the network broken is not served: " in several.server.log())
    assert several.infer("broken").status_code == 404
    # Too large for any machine, and hardly a byte on the disk.
    with (several.folder / "huge.onnx").open("wb") as file:
        file.truncate(2**42)
    answer = several.load("huge")
    assert answer.status_code == 422
    assert "huge.onnx is too large" in answer.json()["error"]
    for name in ("broken", "huge"):
        (several.folder / f"{name}.onnx").unlink()
    assert_turned_round(several, "turned")


def test_what_is_no_file_is_no_network(several: Several) -> None:
    pipe, device = several.folder / "pipe.onnx", several.folder / "device.onnx"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    try:
        assert not {"pipe", "device"} & several.index().keys()
        for name in ("pipe", "device"):
            answer = several.load(name)
            assert answer.status_code == 404
            assert f"no such file {name}.onnx" in answer.json()["error"]
        assert several.load("turned").status_code == 200
    finally:
        pipe.unlink()
        device.unlink()


def test_a_table_of_quality_of_other_weights_is_refused(several: Several) -> None:
    (several.folder / "third.onnx").write_bytes(inverted("third"))
    table = several.folder / "third.quality.json"
    weights = str(several.client.get("/model").json()["weights_sha256"])
    own = (several.folder / "slsnet.quality.json").read_text(encoding="utf-8")
    table.write_text(own.replace(weights, weights[::-1]), encoding="utf-8")
    answer = several.load("third")
    assert answer.status_code == 422
    assert "third.quality.json belongs to the weights" in answer.json()["error"]
    table.unlink()


def test_a_stream_ends_with_the_network_that_it_names(several: Several) -> None:
    (several.folder / "third.onnx").write_bytes(inverted("third"))
    several.load("third").raise_for_status()
    key = {"X-API-Key": several.client.headers["X-API-Key"]}
    with stream(several.server, "?size=model&model=third", headers=key) as session:
        session.send(PHOTO)
        assert said(session)["result"]["model"]["version"] == "third"
        several.unload("third").raise_for_status()
        session.send(PHOTO)
        assert "no network 'third'" in said(session)["error"]["detail"]
        assert close_of(session)[0] == 4404
    with opened(several.server, "?model=third", headers=key) as session:
        assert said(session)["error"]["status"] == 404


@pytest.mark.parametrize("name", ["-x", "%2E%2E", "a%20b", "%C3%A9", "x" * 65])
def test_no_name_leads_out_of_the_folder(several: Several, name: str) -> None:
    answer = several.load(name)
    assert answer.status_code in (404, 422)
    assert several.load("absent").status_code == 404


def test_the_default_network_stays(several: Several) -> None:
    answer = several.unload("slsnet")
    assert answer.status_code == 422
    assert "default network" in answer.json()["error"]


def test_parameters_without_effect_are_refused(several: Several) -> None:
    body = {"parameters": {"file:1/model.onnx": "AAAA"}}
    assert several.post("/v2/repository/models/turned/load", json=body).status_code == 400
    nothing = {"parameters": {"unload_dependents": False}}
    assert several.post("/v2/repository/models/absent/unload", json=nothing).status_code == 404
    assert several.post("/v2/repository/index", content=b"[").status_code == 400


def test_only_administrators_change_networks(tmp_path: Path, several: Several) -> None:
    for headers in ({"X-API-Key": "slsnet_none"}, {}):
        with httpx.Client(base_url=several.server.url, headers=headers) as stranger:
            path = "/v2/repository/models/turned/unload"
            assert stranger.post(path).status_code == 401
    assert_turned_round(several, "turned")


def test_reload_takes_all_networks_and_names_the_one_that_fails(several: Several) -> None:
    (several.folder / "third.onnx").write_bytes(inverted("third"))
    assert several.load("third").status_code == 200
    (several.folder / "third.onnx").write_bytes(inverted("fourth"))
    assert several.post("/admin/reload").status_code == 200
    card = several.client.get("/model", params={"model": "third"}).json()
    assert card["version"] == "fourth"
    (several.folder / "third.onnx").write_bytes(b"no network")
    assert_problem(several.post("/admin/reload"), 422, "third.onnx")
    assert_turned_round(several, "third")
    assert several.unload("third").status_code == 200


@pytest.mark.parametrize("share", ["yes", "no"])
def test_several_processes_serve_what_was_named_at_their_start(tmp_path: Path, share: str) -> None:
    (tmp_path / "turned.onnx").write_bytes(inverted("turned"))
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    key, line = new_key("ops", "admin")
    (tmp_path / "keys").write_text(line, encoding="utf-8")
    models = f"turned={tmp_path}/turned.onnx,broken={tmp_path}/broken.onnx"
    flags = ("--models", models, "--api-keys-file", str(tmp_path / "keys"), "--drain-grace-s", "0")
    with (
        serve("--workers", "2", "--share-network", share, *flags) as server,
        httpx.Client(base_url=server.url, headers={"X-API-Key": key}, timeout=60) as client,
    ):
        several = Several(server, tmp_path, client)
        until(lambda: figures(server, network="turned").get("slsnet_network_ready") == 1)
        until(lambda: several.infer("broken").status_code == 404)
        assert_turned_round(several, "turned")
        counted = figures(server, network="turned")
        assert counted["slsnet_network_photos_total"] == 1
        for answer in (several.load("turned"), several.unload("turned")):
            assert answer.status_code == 422
            assert "Several processes serve here" in answer.json()["error"]
        until(lambda: "the network broken is not served" in server.log())
        server.terminate()
        assert server.wait() == 0


class Held:
    """Answers one probability, once it is let."""

    def __init__(self, probability: float) -> None:
        self.open = threading.Event()
        self.asked = threading.Event()
        self.closed = threading.Event()
        self._probability = probability

    def describe(self) -> BackendInfo:
        return BackendInfo("held", "1", "cpu", "fp32", 4, file_sha256=str(self._probability))

    def warm_up(self) -> None:
        self.open.set()

    def infer(self, batch: Images) -> NDArray[np.float32]:
        self.asked.set()
        assert self.open.wait(60)
        assert not self.closed.is_set()
        return np.full((len(batch), 128, 128), self._probability, np.float32)

    def close(self) -> None:
        self.closed.set()

    def hold(self) -> None:
        self.open.clear()
        self.asked.clear()


def two_networks() -> Service:
    return Service(Settings(models="other=none.onnx"), Metrics())


async def answer_of(service: Service, network: str | None, *, in_body: bool = False) -> float:
    """The probability that a photo gets, whose request or body names this network."""
    named = network if in_body else None
    network = None if in_body else network

    async def read(_: object) -> Body:
        return Body(PHOTO)

    async with (
        submitted(service, asyncio.Event().wait, Stages(), 60, read, network=network) as received,
        received.work() as work,
    ):
        return float((await work.segment(network=lambda: named)).probability[0, 0])


def test_one_that_is_loaded_is_named_by_its_refusals() -> None:
    async def scenario() -> None:
        service = two_networks()
        await service.use(Held(0.25))
        with pytest.raises(Unavailable, match="network other is still being loaded") as refused:
            await answer_of(service, "other")
        assert "GET /v2/models/other/ready answers" in told(refused.value).detail
        await service.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_server_is_ready_once_all_networks_of_its_start_are_there(is_refused: bool) -> None:
    async def scenario() -> None:
        service = two_networks()
        with pytest.raises(Unavailable, match="network slsnet is still"):
            service.check_server_ready()
        await service.use(Held(0.25))
        early = service.is_server_ready
        with pytest.raises(Unavailable, match="Further networks are still being loaded"):
            service.check_server_ready()
        # Who names a network does not wait for the others.
        service.check_ready()
        if is_refused:
            service.retire("other", "It is broken.")
        else:
            await service.use(Held(0.75), served=service.networks.named("other"))
        service.check_server_ready()
        assert (early, service.is_server_ready) == (False, True)
        await service.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("in_body", [False, True])
def test_a_retired_network_answers_what_it_accepted(in_body: bool) -> None:
    async def scenario() -> None:
        service, first, second = two_networks(), Held(0.25), Held(0.75)
        await service.use(first)
        await service.use(second, served=service.networks.named("other"))
        second.hold()
        # More than one run has room for: some still wait.
        accepted = [
            asyncio.create_task(answer_of(service, "other", in_body=in_body)) for _ in range(40)
        ]
        await asyncio.to_thread(second.asked.wait, 60)
        other = service.networks.named("other")
        while other.waiting(bulk=False) < 39:  # noqa: ASYNC110  # other tasks make it so
            await asyncio.sleep(0.002)
        service.retire("other")
        with pytest.raises(UnknownNetwork, match="'other': the one that serves is 'slsnet'"):
            await answer_of(service, "other", in_body=in_body)
        # A network that is held does not hold up another.
        assert await answer_of(service, None) == 0.25
        assert not second.closed.is_set()
        second.open.set()
        assert await asyncio.gather(*accepted) == [0.75] * 40
        assert await asyncio.to_thread(second.closed.wait, 60)
        await service.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_limits_are_shared_over_all_networks() -> None:
    async def scenario() -> None:
        service, backend = two_networks(), Held(0.75)
        await service.use(Held(0.25))
        await service.use(backend, served=service.networks.named("other"))
        backend.hold()
        task = asyncio.create_task(answer_of(service, "other"))
        await asyncio.to_thread(backend.asked.wait, 60)
        assert service.gate.admitted == 1
        backend.open.set()
        await task
        assert service.gate.admitted == 0
        await service.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize(
    ("flags", "default", "models"),
    [
        (["--model", "a.onnx"], "a.onnx", {}),
        (["--model", "b=x.onnx", "--model", "a.onnx"], "a.onnx", {"b": "x.onnx"}),
        (["--model", "slsnet=a.onnx"], "a.onnx", {}),
        (["--model", "./b=a.onnx"], "b=a.onnx", {}),
        (["--model", "b=x", "--models", "c=y,d=z"], None, {"b": "x", "c": "y", "d": "z"}),
        (["--network", "slsnet"], None, {}),
        (["--network", "slsnet", "--model", "b=x"], None, {"b": "x"}),
        (["--model", "/b=a.onnx"], "/b=a.onnx", {}),
    ],
)
def test_flags_name_networks(flags: list[str], default: str | None, models: dict[str, str]) -> None:
    networks = read_settings(flags).networks
    assert networks.pop("slsnet") == (Path(default) if default else MODEL)
    assert networks == {name: Path(file) for name, file in models.items()}


def test_the_default_network_has_the_name_that_its_file_says(tmp_path: Path) -> None:
    networks = read_settings(["--model", "slsnet=x", "--network", "enet"]).networks
    assert list(networks.items()) == [("enet", MODEL.with_name("enet.onnx")), ("slsnet", Path("x"))]
    file = tmp_path / "a.onnx"
    for held, name in (("enet", "enet"), ("a b", "slsnet"), ("", "slsnet")):
        graph = onnx.load_model_from_string(small())
        onnx.helper.set_model_props(graph, {"name": "title", "network": held})
        file.write_bytes(graph.SerializeToString())
        assert list(Settings(model=file).networks) == [name]
    for content in (b"no network", b"\x72\xff\xff\xff\xff\x7f", b"\xff" * 99):
        file.write_bytes(content)
        assert list(Settings(model=file).networks) == ["slsnet"]


@pytest.mark.parametrize("name", [file.stem for file in sorted(MODEL.parent.glob("*.onnx"))])
def test_a_shipped_network_is_served_by_its_name(name: str) -> None:
    photos = [lesion_photo(seed) for seed in range(4)]
    with (
        serve("--network", name) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        card = client.get("/model").json()
        assert [one["name"] for one in card["networks"]] == [name]
        assert client.get(f"/v2/models/{name}/ready").json() == {"name": name, "ready": True}
        for asked in ("slsnet", "enet", "lite0-unet"):
            answer = client.get("/model", params={"model": asked})
            assert answer.status_code == (200 if asked == name else 404)
        answers = [
            client.post("/segment", content=encode_photo(photo.pixels)).raise_for_status()
            for photo in photos
        ]
    masks = [read_png(answer.content) for answer in answers]
    assert card["name"] == name
    assert (MODEL.parent / f"{name}.onnx").stat().st_size < 12_000_000
    jaccards = [
        (mask & photo.mask).sum() / (mask | photo.mask).sum()
        for mask, photo in zip(masks, photos, strict=True)
    ]
    assert np.mean(jaccards) > 0.7
    assert all("Photo-Fitness" in answer.headers for answer in answers)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "a.onnx", "--model", "b.onnx"], ["one default network", "b.onnx"]),
        (["--model", "b=x", "--model", "b=y"], ["'b'", "another name"]),
        (["--models", "slsnet=x"], ["'slsnet'", "default"]),
        (["--network", "enet", "--model", "enet=x"], ["'enet'", "default"]),
        (["--network", "slsnet", "--model", "a.onnx"], ["one default network", "a.onnx"]),
        (["--network", "unet"], ["--network", "'unet'", "'slsnet'"]),
        (["--model", "a b=x"], ["'a b'", "letters"]),
        (["--model", "..=x"], ["'..'", "letters"]),
        (["--model", "../x=y"], ["'../x'", "letters", "./"]),
        (["--model", "b="], ["'b='", "NAME=FILE"]),
        (["--models", "b"], ["'b'", "NAME=FILE"]),
    ],
)
def test_wrong_names_are_told(
    flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read_settings(flags)
    said = capsys.readouterr().err
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("membership", "files", "left"),
    [
        ("0::/\n", {}, 4000 * 1024),
        ("0::/\n", {"memory.max": "max", "memory.current": "9", "memory.stat": ""}, 4000 * 1024),
        (
            "0::/\n",
            {"memory.max": "5000", "memory.current": "4000", "memory.stat": "inactive_file 300"},
            1300,
        ),
        (
            "4:memory:/box\n",
            {
                "memory/box/memory.limit_in_bytes": "5000",
                "memory/box/memory.usage_in_bytes": "5400",
                "memory/box/memory.stat": "cache 7\ntotal_inactive_file 300",
            },
            0,
        ),
    ],
)
def test_memory_that_is_left(
    tmp_path: Path, membership: str, files: dict[str, str], left: int
) -> None:
    for name, text in files.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "self").write_text(membership)
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\nHugePages: 0\n")
    groups = tmp_path / "groups", tmp_path / "self"
    assert memory_left(tmp_path / "meminfo", *groups) == left


def test_where_the_system_tells_nothing_no_network_is_refused(tmp_path: Path) -> None:
    assert memory_left(tmp_path / "none", tmp_path, tmp_path / "none") is None
    check_memory(tmp_path / "none.onnx")


def test_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.onnx")
    check_memory(tmp_path / "a.onnx")
    for path in (tmp_path / "a.onnx", tmp_path):
        with pytest.raises(BackendError, match="it is no file"):
            read_model(path)


# Runs in a process of its own: the most that the last network took beyond what was held before.
_LOAD = """
import sys
from pathlib import Path
from server.backends import open_backend

def kib(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0])

backends = []
for file in sys.argv[2:]:
    before = kib("VmRSS")
    backends.append(open_backend(sys.argv[1], Path(file), threads=2))
    backends[-1].warm_up()
print((kib("VmHWM") - before) * 1024)
"""


def _memory_taken(backend: str, *files: Path) -> int:
    if backend == "openvino":
        can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in can:
            pytest.skip("this processor does not multiply bfloat16")
    command = [sys.executable, "-c", _LOAD, backend, *map(str, files)]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    return int(result.stdout)


def heavy() -> bytes:
    """A network of 50 MB that has little to do: its convolutions see one pixel."""
    model = onnx.load_model_from_string(small())
    random = np.random.default_rng(0)
    nodes = [onnx.helper.make_node("GlobalAveragePool", ["values"], ["pixel0"])]
    for i in range(6):
        weight = random.normal(0, 0.01, (512, 512 if i else 128, 3, 3)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"weight{i}"))
        names = [f"pixel{i}", f"weight{i}"], [f"pixel{i + 1}"]
        nodes.append(onnx.helper.make_node("Conv", *names, pads=[1, 1, 1, 1]))
    nodes.append(onnx.helper.make_node("ReduceMean", ["pixel6"], ["mean"], axes=[1], keepdims=0))
    model.graph.node[-1].output[0] = "dark"
    nodes.append(onnx.helper.make_node("Add", ["dark", "mean"], ["probability"]))
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_loading_takes_no_more_memory_than_is_reckoned_with(
    tmp_path: Path, stored: str, backend: str
) -> None:
    content = heavy() if stored == "float32" else halved(heavy())
    file = tmp_path / "heavy.onnx"
    file.write_bytes(content)
    taken = _memory_taken(backend, MODEL, file)
    assert memory_needed(file) / 3 < taken <= memory_needed(file)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_so_does_one_more_of_the_shipped_network(backend: str) -> None:
    assert _memory_taken(backend, MODEL, MODEL) <= memory_needed(MODEL)
