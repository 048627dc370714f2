"""Open Inference Protocol V2, spoken by an unmodified client, and by hand where that cannot err."""

import asyncio
import gzip
import json
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray

from photos.image import lesion_mask, read_photo, unpack_mask
from server.http.errors import BadRequest
from server.http.openinference import codec, route
from server.http.openinference.route import openinference_router
from server.inference.errors import ClientGone, DeadlineExceeded
from server.inference.service import Service
from server.inference.submission import Body
from server.keys import new_key
from server.observe.metrics import Metrics
from server.observe.stages import Stages
from server.settings import Settings
from tests.support.backends import Constant
from tests.support.launch import ServerProcess, serve
from tests.support.memory import traced
from tests.support.offline import Offline
from tests.support.samples import Sample

triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
triton_aio = pytest.importorskip("tritonclient.http.aio")

MIB = 2**20


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as connection:
        yield connection


@pytest.fixture(scope="module")
def pixels(photos: list[Sample]) -> NDArray[np.uint8]:
    """uint8 [3, 128, 128, 3]"""
    return np.stack([read_photo(photo.data).pixels for photo in photos[:3]])


def tensor(pixels: NDArray[np.uint8], *, binary: bool) -> Any:
    image = triton.InferInput("image", list(pixels.shape), "UINT8")
    image.set_data_from_numpy(pixels, binary_data=binary)
    return image


def test_client_finds_server_and_model(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    for version in ("", "1"):
        assert client.is_model_ready("slsnet", version)
        metadata = client.get_model_metadata("slsnet", version)
        assert metadata["versions"] == ["1"]
        assert metadata["inputs"] == [
            {"name": "image", "datatype": "UINT8", "shape": [-1, 128, 128, 3]}
        ]
        assert metadata["outputs"] == [
            {"name": "probability", "datatype": "FP32", "shape": [-1, 128, 128]}
        ]
        config = client.get_model_config("slsnet", version)
        assert config["max_batch_size"] > 1
        assert config["input"] == [
            {"name": "image", "data_type": "TYPE_UINT8", "dims": [128, 128, 3]}
        ]
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert not client.is_model_ready("resnet")
    assert not client.is_model_ready("slsnet", "2")


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("binary_output", [True, False, None])
def test_client_segments_a_photo(
    client: Any,
    photos: list[Sample],
    offline: Offline,
    binary_input: bool,
    binary_output: bool | None,
) -> None:
    photo = read_photo(photos[0].data)
    outputs = (
        None
        if binary_output is None
        else [triton.InferRequestedOutput("probability", binary_data=binary_output)]
    )
    result = client.infer(
        "slsnet",
        [tensor(photo.pixels[None], binary=binary_input)],
        outputs=outputs,
        request_id="lesion-7",
    )
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"]) == ("slsnet", "1")
    assert answer["id"] == "lesion-7"
    assert ("data" in answer["outputs"][0]) == (binary_output is False)
    probability = result.as_numpy("probability")
    assert probability.shape == (1, 128, 128) and probability.dtype == np.float32
    np.testing.assert_allclose(probability[0], offline.probability(photo), atol=1e-4)
    mask = unpack_mask(lesion_mask(probability[0], photo.width, photo.height), photo.width)
    assert (mask != offline.mask(photos[0].data)).mean() < 1e-3


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_client_may_compress(client: Any, pixels: NDArray[np.uint8], algorithm: str) -> None:
    plain, compressed = (
        client.infer("slsnet", [tensor(pixels, binary=True)], **options).as_numpy("probability")
        for options in (
            {},
            {
                "request_compression_algorithm": algorithm,
                "response_compression_algorithm": algorithm,
            },
        )
    )
    np.testing.assert_allclose(compressed, plain, atol=1e-4)


def test_asyncio_client_segments_many_at_once(
    server: ServerProcess, pixels: NDArray[np.uint8], offline: Offline, photos: list[Sample]
) -> None:
    async def scenario() -> list[NDArray[np.float32]]:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as connection:
            assert await connection.is_server_ready()
            results = await asyncio.gather(
                *(
                    connection.infer("slsnet", [tensor(pixels[[index % 3]], binary=index % 2 == 0)])
                    for index in range(6)
                )
            )
            return [result.as_numpy("probability") for result in results]

    for index, probability in enumerate(asyncio.run(scenario())):
        expected = offline.probability(read_photo(photos[index % 3].data))
        np.testing.assert_allclose(probability[0], expected, atol=1e-4)


def test_images_of_one_request_keep_their_order(
    client: Any, pixels: NDArray[np.uint8], offline: Offline, photos: list[Sample]
) -> None:
    order = [2, 0, 1, 1, 2]
    result = client.infer("slsnet", [tensor(pixels[order], binary=True)])
    probability = result.as_numpy("probability")
    for index, photo in enumerate(order):
        expected = offline.probability(read_photo(photos[photo].data))
        np.testing.assert_allclose(probability[index], expected, atol=1e-4)


def test_clients_mistakes_reach_it_as_its_own_errors(
    client: Any, pixels: NDArray[np.uint8]
) -> None:
    image = tensor(pixels, binary=True)
    with pytest.raises(triton.InferenceServerException, match="no network 'resnet'") as caught:
        client.infer("resnet", [image])
    assert caught.value.status() == "404"
    floats = triton.InferInput("image", [1, 2], "FP32")
    floats.set_data_from_numpy(np.zeros((1, 2), np.float32))
    with pytest.raises(triton.InferenceServerException, match="UINT8") as caught:
        client.infer("slsnet", [floats])
    assert caught.value.status() == "400"
    with pytest.raises(triton.InferenceServerException, match=r"The deadline passed") as caught:
        client.infer("slsnet", [image], timeout=1)
    assert caught.value.status() == "504"


class ByHand:
    """Requests that no proper client would send."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/v2/models/slsnet/infer"

    def post(self, body: bytes, **headers: str) -> httpx.Response:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(self.url, content=body, headers=headers, timeout=600)

    def request(self, image: dict[str, Any] | None = None, **members: Any) -> bytes:
        image = {"name": "image", "shape": [1, 128, 128, 3], "datatype": "UINT8"} | (image or {})
        return json.dumps({"inputs": [image], **members}).encode()


@pytest.fixture(scope="module")
def by_hand(server: ServerProcess) -> ByHand:
    return ByHand(server.url)


BLACK = [0] * (128 * 128 * 3)


def test_data_may_be_nested(by_hand: ByHand) -> None:
    nested = np.zeros((1, 128, 128, 3), np.uint8).tolist()
    answers = [by_hand.post(by_hand.request({"data": data})) for data in (BLACK, nested)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].headers["content-type"] == "application/json"
    assert answers[0].headers["server-timing"].startswith("read;dur=")
    first, second = (answer.json()["outputs"][0] for answer in answers)
    assert first == second and len(first["data"]) == 128 * 128 and "parameters" not in first
    assert "id" not in answers[0].json()


@pytest.mark.parametrize(
    ("image", "members", "says"),
    [
        ({}, {}, "neither data nor"),
        ({"data": [1, 2, 3]}, {}, "takes 49152 values, there are 3"),
        ({"data": [*BLACK[1:], 256]}, {}, "integers from 0 to 255"),
        ({"data": [*BLACK[1:], 0.5]}, {}, "integers from 0 to 255"),
        ({"data": [*BLACK[1:], [0]]}, {}, "integers from 0 to 255"),
        ({"data": [[0], 0]}, {}, "integers from 0 to 255"),
        ({"data": "0"}, {}, "inputs.0.data"),
        ({"data": BLACK, "name": "input"}, {}, "called 'image', not 'input'"),
        ({"data": BLACK, "shape": [1, 3, 128, 128]}, {}, "shape of 'image' is"),
        ({"data": BLACK, "shape": []}, {}, "shape of 'image' is"),
        ({"data": [], "shape": [0, 128, 128, 3]}, {}, "shape of 'image' is"),
        ({"data": BLACK, "parameters": {"binary_data_size": 49152}}, {}, "both"),
        ({"parameters": {"binary_data_size": 49152}}, {}, "but 0 bytes follow"),
        ({"parameters": {"shared_memory_region": "a"}}, {}, "Shared memory"),
        ({"data": BLACK}, {"outputs": [{"name": "mask"}]}, "called 'probability', not 'mask'"),
        ({"data": BLACK}, {"outputs": [{"name": "probability"}] * 2}, "once"),
        (
            {"data": BLACK},
            {"outputs": [{"name": "probability", "parameters": {"classification": 3}}]},
            "not served",
        ),
        ({"data": BLACK}, {"id": 7}, "id: "),
        ({"data": BLACK}, {"parameters": {"timeout": "soon"}}, "parameters.timeout: "),
    ],
)
def test_400_in_the_protocols_shape(
    by_hand: ByHand, image: dict[str, Any], members: dict[str, Any], says: str
) -> None:
    response = by_hand.post(by_hand.request(image, **members))
    assert response.status_code == 400
    assert set(response.json()) == {"error"}
    assert says in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"inputs": []}', "the request has 0"),
        (b'{"inputs": 3}', "inputs: "),
        (b"[]", "the request: "),
        (b"null", "the request: "),
    ],
)
def test_400_what_is_not_a_request(by_hand: ByHand, body: bytes, says: str) -> None:
    response = by_hand.post(body)
    assert response.status_code == 400
    assert says in response.json()["error"]


@pytest.mark.parametrize("length", ["-1", "x", "99999", "9" * 30])
def test_400_a_header_length_that_is_none(by_hand: ByHand, length: str) -> None:
    response = by_hand.post(b"{}", inference_header_content_length=length)
    assert response.status_code == 400
    assert "Inference-Header-Content-Length" in response.json()["error"]


def test_compressed_bodies_are_bounded(by_hand: ByHand) -> None:
    bomb = zlib.compress(bytes(200 * MIB))
    assert len(bomb) < MIB
    response = by_hand.post(bomb, content_encoding="deflate")
    assert response.status_code == 413
    assert "decompressed" in response.json()["error"]
    cut = gzip.compress(by_hand.request({"data": BLACK}))[:-20]
    for body, encoding, status, says in [
        (cut, "gzip", 400, "ends too early"),
        (b"", "gzip", 400, "ends too early"),
        (b"plain", "gzip", 400, "not gzip"),
        (b"x", "br", 415, "'br' is not served"),
    ]:
        response = by_hand.post(body, content_encoding=encoding)
        assert response.status_code == status
        assert says in response.json()["error"]


def test_413_too_much_json_or_too_many_images(by_hand: ByHand) -> None:
    response = by_hand.post(b" " * (4 * MIB + 1))
    assert response.status_code == 413
    assert "binary" in response.json()["error"]
    response = by_hand.post(by_hand.request({"shape": [129, 128, 128, 3], "data": []}))
    assert response.status_code == 413
    assert "128" in response.json()["error"]


def test_413_more_lists_than_images_have(by_hand: ByHand) -> None:
    most = (4 * MIB - 200) // 3
    for data, of_what in ((b"[],", "lists"), (b"{},", "objects")):
        head, tail = by_hand.request({"data": []}).split(b"[]")
        response = by_hand.post(head + b"[" + data * most + b"0]" + tail)
        assert response.status_code == 413
        # Said of what was counted: nothing has been parsed.
        assert of_what in response.json()["error"]
    # As many as fit otherwise: of one digit, and nested as the shape is.
    nested = np.zeros((31, 128, 128, 3), np.uint8).tolist()
    body = by_hand.request({"data": nested, "shape": [31, 128, 128, 3]}).replace(b" ", b"")
    assert 3.8 * MIB < len(body) < 4 * MIB
    assert by_hand.post(body).status_code == 200


def test_what_is_nested_deeper_than_the_shape_is_not_unpacked(by_hand: ByHand) -> None:
    # Text can be unpacked for as many levels as there are, each of which takes its time.
    def nested(levels: int) -> bytes:
        deep = b"[" * levels + b"0" + b"]" * levels
        return head + b"[" + deep + b',"' + b"a" * 4_000_000 + b'"]' + tail

    def cpu_s(body: bytes) -> float:
        """What refusing it costs, however busy the machine is."""
        started = time.thread_time()
        with pytest.raises(BadRequest, match="nested as the shape is"):
            codec.parse(Body(body), len(body), 1)
        return time.thread_time() - started

    head, tail = by_hand.request({"data": []}).split(b"[]")
    response = by_hand.post(nested(900))
    assert response.status_code == 400
    assert "nested as the shape is" in response.json()["error"]
    # Unpacked, it would take hundreds of times as long as one that is no deeper than the shape.
    assert cpu_s(nested(900)) < 20 * cpu_s(nested(3))


def is_empty(body: Body) -> bool:
    try:
        return not body.data
    except ClientGone:
        return True


def test_nothing_of_json_is_kept_once_it_is_parsed(by_hand: ByHand) -> None:
    good = by_hand.request({"data": BLACK})
    bad = [
        by_hand.request(image)
        for image in (
            {"data": BLACK[1:]},
            {"data": [*BLACK[1:], 256]},
            {"data": BLACK, "shape": 3},
        )
    ]
    # What is made once and stays.
    codec.parse(Body(good), len(good), 1)
    with traced() as held_bytes:
        body = Body(good)
        asked, images = codec.parse(body, len(good), 1)
        assert len(images) == 1 and not images[0].any()
        # The image, but not the list of its values, which takes eight times as much. Other threads
        # of this process may hold something too.
        limit = 4 * images[0].nbytes
        assert is_empty(body) and held_bytes() < limit
        assert asked.outputs == []
        for request in bad:
            body = Body(request)
            with pytest.raises(BadRequest) as caught:
                codec.parse(body, len(request), 1)
            assert is_empty(body) and held_bytes() < limit, caught.value


def test_json_with_images_is_parsed_by_one_thread_alone(
    by_hand: ByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work = most = 0
    together = threading.Event()
    patience_s = 0.1

    def slow(*arguments: Any) -> Any:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        if at_work > 1:
            together.set()
        # Others come in meanwhile, if they may.
        together.wait(patience_s)
        at_work -= 1
        return codec.parse(*arguments)

    monkeypatch.setattr(route, "parse", slow)

    async def scenario() -> None:
        nonlocal patience_s
        service = Service(Settings(decode_threads=4), Metrics())
        await service.use(Constant(0.5))
        app = FastAPI()
        app.include_router(openinference_router(service, "1"))

        async def timed(scope: Any, receive: Any, send: Any) -> None:
            scope.setdefault("state", {})["stages"] = Stages()
            await app(scope, receive, send)

        transport = httpx.ASGITransport(timed)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            path = "/v2/models/slsnet/infer"
            content = by_hand.request({"data": BLACK})
            # The first one's deadline passes while a thread is in it.
            answers = await asyncio.gather(
                client.post(path, content=content, headers={"X-Request-Timeout-Ms": "50"}),
                *(client.post(path, content=content) for _ in range(3)),
                return_exceptions=True,
            )
            assert isinstance(answers[0], DeadlineExceeded)
            for answer in answers[1:]:
                assert isinstance(answer, httpx.Response) and answer.status_code == 200
            assert most == 1
            # Binary tensors do not wait for each other, also where threads are slow to begin.
            patience_s = 600
            header = by_hand.request({"parameters": {"binary_data_size": len(BLACK)}})
            binary = await asyncio.gather(
                *(
                    client.post(
                        path,
                        content=header + bytes(BLACK),
                        headers={"Inference-Header-Content-Length": str(len(header))},
                    )
                    for _ in range(3)
                )
            )
            assert {answer.status_code for answer in binary} == {200}
            assert most > 1
        await service.close()

    asyncio.run(asyncio.wait_for(scenario(), 600))


def test_what_is_not_there_is_said_in_the_protocols_shape(server: ServerProcess) -> None:
    for method, path, status in [
        ("GET", "/v2/repository/index", 405),
        ("GET", "/v2/models/slsnet/stats", 404),
        ("GET", "/v2/models/slsnet/versions/2", 404),
        ("POST", "/v2/health/live", 405),
    ]:
        response = httpx.request(method, server.url + path)
        assert response.status_code == status, path
        assert set(response.json()) == {"error"}


def test_422_a_deadline_that_is_none(by_hand: ByHand) -> None:
    response = by_hand.post(by_hand.request({"data": BLACK}), x_request_timeout_ms="soon")
    assert response.status_code == 422
    assert set(response.json()) == {"error"}


@pytest.mark.usefixtures("small_networks")
def test_client_shows_its_key(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    key, line = new_key("clinic")
    keys = tmp_path / "keys"
    keys.write_text(line)
    with (
        serve("--api-keys-file", str(keys)) as server,
        triton.InferenceServerClient(f"127.0.0.1:{server.port}") as connection,
    ):
        assert connection.is_server_ready()
        with pytest.raises(triton.InferenceServerException, match="needs an API key") as caught:
            connection.get_model_metadata("slsnet")
        assert caught.value.status() == "401"
        headers = {"X-API-Key": key}
        assert connection.infer("slsnet", [tensor(pixels, binary=True)], headers=headers)


def test_429_when_the_queue_has_no_room_for_all(pixels: NDArray[np.uint8]) -> None:
    image = {"shape": [2, 128, 128, 3], "parameters": {"binary_data_size": 2 * 49152}}

    async def scenario(by_hand: ByHand) -> list[httpx.Response]:
        header = by_hand.request(image)
        content = header + pixels[:2].tobytes()
        headers = {"Inference-Header-Content-Length": str(len(header))}
        async with httpx.AsyncClient(timeout=600) as client:
            return await asyncio.gather(
                *(client.post(by_hand.url, content=content, headers=headers) for _ in range(12))
            )

    with serve("--max-queue", "4") as server:
        config = httpx.get(f"{server.url}/v2/models/slsnet/config").json()
        assert config["max_batch_size"] == 2
        responses = asyncio.run(scenario(ByHand(server.url)))
    statuses = {response.status_code for response in responses}
    assert statuses == {200, 429}
    full = next(response for response in responses if response.status_code == 429)
    assert int(full.headers["retry-after"]) >= 1
    assert "queue is full" in full.json()["error"]
