"""V2 over gRPC, spoken by an unmodified client: the same answers and promises as over HTTP."""

import asyncio
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from photos.image import read_photo
from server.keys import new_key
from tests.support import MODEL, ROOT
from tests.support.answers import figures
from tests.support.authority import Authority
from tests.support.held import serve_held
from tests.support.launch import free_port, serve
from tests.support.samples import Sample
from tests.support.site import inverted
from tests.support.waiting import until

triton = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
triton_aio = pytest.importorskip("tritonclient.grpc.aio")
grpc = pytest.importorskip("grpc")
pb = pytest.importorskip("tritonclient.grpc.service_pb2")
stubs = pytest.importorskip("tritonclient.grpc.service_pb2_grpc")

PATIENCE_S = 600
INFER_PATH = "/v2/models/{model}/infer"


@pytest.fixture(scope="module")
def ports() -> Iterator[tuple[int, int]]:
    """Ports of HTTP and of gRPC of one server."""
    port = free_port()
    with serve("--grpc-port", str(port), "--request-timeout-ms", "600000") as server:
        yield server.port, port


@pytest.fixture(scope="module")
def client(ports: tuple[int, int]) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{ports[1]}") as connection:
        yield connection


@pytest.fixture(scope="module")
def stub(ports: tuple[int, int]) -> Iterator[Any]:
    """For requests that the client does not make."""
    with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        yield stubs.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def pixels(photos: list[Sample]) -> NDArray[np.uint8]:
    """uint8 [3, 128, 128, 3]"""
    return np.stack([read_photo(photo.data).pixels for photo in photos[:3]])


def tensor(pixels: NDArray[np.uint8]) -> Any:
    image = triton.InferInput("image", list(pixels.shape), "UINT8")
    image.set_data_from_numpy(pixels)
    return image


def request(pixels: NDArray[np.uint8], **fields: Any) -> Any:
    message = pb.ModelInferRequest(
        model_name="slsnet", raw_input_contents=[pixels.tobytes()], **fields
    )
    message.inputs.add(name="image", datatype="UINT8", shape=pixels.shape)
    return message


def code_of(error: Any) -> str:
    return str(error.value.code()).removeprefix("StatusCode.")


def test_client_finds_server_and_model(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert "binary_tensor_data" in client.get_server_metadata().extensions
    for version in ("", "1"):
        assert client.is_model_ready("slsnet", version)
        metadata = client.get_model_metadata("slsnet", version)
        assert list(metadata.versions) == ["1"]
        assert [(one.name, one.datatype, list(one.shape)) for one in metadata.inputs] == [
            ("image", "UINT8", [-1, 128, 128, 3])
        ]
        config = client.get_model_config("slsnet", version).config
        assert config.max_batch_size > 1
        assert [(one.name, list(one.dims)) for one in config.output] == [
            ("probability", [128, 128])
        ]
    assert not client.is_model_ready("resnet")
    assert not client.is_model_ready("slsnet", "2")


def test_answers_are_those_of_http(
    ports: tuple[int, int], client: Any, stub: Any, pixels: NDArray[np.uint8]
) -> None:
    body = {
        "inputs": [
            {
                "name": "image",
                "datatype": "UINT8",
                "shape": pixels.shape,
                "data": pixels.ravel().tolist(),
            }
        ]
    }
    url = f"http://127.0.0.1:{ports[0]}/v2/models/slsnet/infer"
    (output,) = httpx.post(url, json=body, timeout=PATIENCE_S).json()["outputs"]
    expected = np.array(output["data"], np.float32).reshape(3, 128, 128)

    result = client.infer(
        "slsnet",
        [tensor(pixels)],
        outputs=[triton.InferRequestedOutput("probability")],
        request_id="lesion-7",
    )
    assert result.get_response().id == "lesion-7"
    np.testing.assert_array_equal(result.as_numpy("probability"), expected)

    # Values that are not raw, as other clients send them.
    plain = pb.ModelInferRequest(model_name="slsnet", model_version="1")
    image = plain.inputs.add(name="image", datatype="UINT8", shape=[1, 128, 128, 3])
    image.contents.uint_contents.extend(pixels[0].ravel().tolist())
    (raw,) = stub.ModelInfer(plain).raw_output_contents
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4").reshape(128, 128), expected[0])


def test_calls_have_an_id_and_count_with_the_requests(
    ports: tuple[int, int], stub: Any, pixels: NDArray[np.uint8]
) -> None:
    def served() -> float:
        text = httpx.get(f"http://127.0.0.1:{ports[0]}/metrics").text
        lines = [line for line in text.splitlines() if f'path="{INFER_PATH}"' in line]
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith("slsnet_requests_total") and 'status="200"' in line
        )

    before = served()
    _, call = stub.ModelInfer.with_call(request(pixels[:1]), metadata=[("x-request-id", "abc.1")])
    told = dict(call.trailing_metadata())
    assert told["x-request-id"] == "abc.1"
    assert "infer;dur=" in told["server-timing"]
    assert served() == before + 1


def test_faults_are_named(stub: Any, pixels: NDArray[np.uint8]) -> None:
    wrong_shape = request(pixels[:1])
    wrong_shape.inputs[0].shape[0] = 2
    both = request(pixels[:1])
    both.inputs[0].contents.uint_contents.append(1)
    too_bright = pb.ModelInferRequest(model_name="slsnet")
    too_bright.inputs.add(name="image", datatype="UINT8").contents.uint_contents.append(256)
    missing = pb.ModelInferRequest(model_name="slsnet", raw_input_contents=[b"1", b"2"])
    missing.inputs.add(name="image")
    other_model = request(pixels[:1])
    other_model.model_name = "../slsnet"
    late = request(pixels[:1])
    late.parameters["timeout"].int64_param = 1
    for message, code, text in (
        (wrong_shape, "INVALID_ARGUMENT", "takes 98304 values"),
        (both, "INVALID_ARGUMENT", "beside raw_input_contents"),
        (too_bright, "INVALID_ARGUMENT", "above 255"),
        (missing, "INVALID_ARGUMENT", "2 tensors for 1 inputs"),
        (other_model, "NOT_FOUND", "slsnet"),
        (late, "DEADLINE_EXCEEDED", ""),
        (request(np.zeros((90, 128, 128, 3), np.uint8)), "RESOURCE_EXHAUSTED", "larger than max"),
    ):
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(message)
        assert code_of(error) == code
        assert text in error.value.details()


@pytest.mark.usefixtures("small_networks")
def test_what_is_no_call_of_this_server_is_refused_quietly() -> None:
    port = free_port()
    garbage = b"\xff\xff\xff"
    with serve("--grpc-port", str(port)) as server:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            service = "/inference.GRPCInferenceService"
            for name, message, code in (
                ("ModelInfer", garbage, "INVALID_ARGUMENT"),
                ("ModelStatistics", garbage, "INVALID_ARGUMENT"),
                ("ModelStatistics", b"", "UNIMPLEMENTED"),
                ("SystemSharedMemoryStatus", b"", "UNIMPLEMENTED"),
                ("Nothing", b"", "UNIMPLEMENTED"),
            ):
                with pytest.raises(grpc.RpcError) as error:
                    channel.unary_unary(f"{service}/{name}")(message, timeout=PATIENCE_S)
                assert code_of(error) == code
            stream = channel.stream_stream(f"{service}/ModelStreamInfer")
            with pytest.raises(grpc.RpcError) as error:
                list(stream(iter([garbage]), timeout=30))
            assert code_of(error) == "INVALID_ARGUMENT"
        assert "Traceback" not in server.log()


def test_stream_answers_in_order_and_outlives_an_error(
    ports: tuple[int, int], stub: Any, pixels: NDArray[np.uint8]
) -> None:
    def requests() -> Iterator[Any]:
        for number in range(20):
            message = request(pixels[number % 3][None], id=str(number))
            if number == 7:
                message.inputs[0].datatype = "FP64"
            yield message

    answers = list(stub.ModelStreamInfer(requests()))
    assert [answer.infer_response.id for answer in answers] == [str(n) for n in range(20)]
    assert [n for n, answer in enumerate(answers) if answer.error_message] == [7]
    assert "FP64" in answers[7].error_message

    # The client's own way to stream.
    async def ask() -> list[str]:
        async def asked() -> Any:
            for number in range(3):
                yield {
                    "model_name": "slsnet",
                    "inputs": [tensor(pixels[:1])],
                    "request_id": str(number),
                }

        async with triton_aio.InferenceServerClient(f"127.0.0.1:{ports[1]}") as connection:
            stream = connection.stream_infer(asked())
            return [result.get_response().id async for result, error in stream if not error]

    assert asyncio.run(ask()) == ["0", "1", "2"]


@pytest.mark.usefixtures("small_networks")
def test_a_key_is_asked_for(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    keys = tmp_path / "keys"
    key, line = new_key("clinic")
    keys.write_text(f"{line}\n", encoding="utf-8")
    port = free_port()
    with (
        serve("--grpc-port", str(port), "--api-keys-file", str(keys)),
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        assert client.is_server_ready()
        asks: list[Callable[[], object]] = [
            lambda: client.infer("slsnet", [tensor(pixels[:1])]),
            lambda: client.get_model_metadata("slsnet"),
        ]
        for ask in asks:
            with pytest.raises(triton.InferenceServerException, match="API key") as error:
                ask()
            assert error.value.status() == "StatusCode.UNAUTHENTICATED"
        headers = {"authorization": f"Bearer {key}"}
        result = client.infer("slsnet", [tensor(pixels[:1])], headers=headers)
        assert result.as_numpy("probability").shape == (1, 128, 128)


def test_networks_are_listed_loaded_and_retired(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    shutil.copy(MODEL, tmp_path / "slsnet.onnx")
    (tmp_path / "turned.onnx").write_bytes(inverted("turned"))
    (admin, ops), (key, line) = new_key("ops", "admin"), new_key("clinic")
    (tmp_path / "keys").write_text(f"{ops}\n{line}\n", encoding="utf-8")
    flags = ("--model", str(tmp_path / "slsnet.onnx"), "--api-keys-file", str(tmp_path / "keys"))
    port = free_port()
    asked = {"headers": {"x-api-key": key}}
    changes = {"headers": {"x-api-key": admin}}
    with (
        serve(*flags, "--grpc-port", str(port)),
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):

        def states() -> dict[str, str]:
            models = client.get_model_repository_index(**asked).models
            return {model.name: model.state for model in models}

        def infer(name: str) -> NDArray[np.float32]:
            result = client.infer(name, [tensor(pixels[:1])], **asked)
            assert result.get_response().model_name == name
            found: NDArray[np.float32] = result.as_numpy("probability")
            return found

        assert states() == {"slsnet": "READY", "turned": "UNAVAILABLE"}
        with pytest.raises(triton.InferenceServerException, match="administrator's key") as error:
            client.load_model("turned", **asked)
        assert error.value.status() == "StatusCode.PERMISSION_DENIED"
        client.load_model("turned", **changes)
        assert states() == {"slsnet": "READY", "turned": "READY"}
        assert client.is_model_ready("turned", **asked)
        assert np.allclose(infer("turned") + infer("slsnet"), 1, atol=0.05)
        client.unload_model("turned", **changes)
        with pytest.raises(triton.InferenceServerException, match="no network 'turned'") as error:
            infer("turned")
        assert error.value.status() == "StatusCode.NOT_FOUND"


def test_limits_cancellation_and_drain(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    port = free_port()
    flags = ["--grpc-port", str(port), "--max-queue", "3", "--drain-grace-s", "0"]
    flags += ["--request-timeout-ms", "600000", "--drain-timeout-s", "600"]
    with (
        serve_held(tmp_path, *flags) as (server, hold),
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub = stubs.GRPCInferenceServiceStub(channel)
        with hold():
            calls = [stub.ModelInfer.future(request(pixels[:1])) for _ in range(3)]
            until(lambda: figures(server)["slsnet_requests_in_flight"] == 3)
            # There is no room for a fourth.
            with pytest.raises(grpc.RpcError) as error:
                stub.ModelInfer(request(pixels[:1]), timeout=PATIENCE_S)
            assert code_of(error) == "RESOURCE_EXHAUSTED"
            told = dict(error.value.trailing_metadata())
            assert int(told["grpc-retry-pushback-ms"]) == 1000 * int(told["retry-after"])
            # Those that give up are not answered, and their work is dropped.
            for call in calls[1:]:
                call.cancel()
            # Nothing shows that the server has heard of it; but it hears of all in their order, and
            # a small network might be done before.
            for _ in range(10):
                assert stub.ServerLive(pb.ServerLiveRequest(), timeout=PATIENCE_S).live
        assert len(calls[0].result(PATIENCE_S).raw_output_contents) == 1
        until(lambda: figures(server)["slsnet_requests_in_flight"] == 0)
        assert 'reason="client_gone"' in httpx.get(f"{server.url}/metrics").text
        with hold():
            last = stub.ModelInfer.future(request(pixels[:1]))
            until(lambda: figures(server)["slsnet_requests_in_flight"] == 1)
            # What was accepted is answered, and nothing more is taken.
            server.terminate()
            until(lambda: not accepts(port))
        (raw,) = last.result(PATIENCE_S).raw_output_contents
        assert len(raw) == 4 * 128 * 128
        assert server.wait() == 0


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=600).close()
    except ConnectionRefusedError:
        return False
    return True


def test_certificate_and_its_renewal(tmp_path: Path) -> None:
    old, new = (Authority(tmp_path, name) for name in ("old", "new"))
    certificate = tmp_path / "served.pem"
    certificate.write_bytes(old.issue("first").read_bytes())
    port = free_port()

    def is_ready(authority: Authority) -> bool:
        trust = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{port}", trust) as channel:
            stub = stubs.GRPCInferenceServiceStub(channel)
            try:
                answer = stub.ServerReady(pb.ServerReadyRequest(), timeout=PATIENCE_S)
            except grpc.RpcError:
                return False
            return bool(answer.ready)

    trust = ssl.create_default_context(cafile=str(old.certificate))
    flags = ("--grpc-port", str(port), "--tls-cert", str(certificate))
    with serve(*flags, trust=trust) as server:
        assert is_ready(old)
        assert not is_ready(new)
        certificate.write_bytes(new.issue("second").read_bytes())
        server.process.send_signal(signal.SIGHUP)
        until(lambda: is_ready(new))


@pytest.mark.usefixtures("small_networks")
def test_several_workers_share_the_port(pixels: NDArray[np.uint8]) -> None:
    port = free_port()
    with serve("--grpc-port", str(port), "--workers", "2") as server:
        # The least of both.
        until(lambda: figures(server)["slsnet_ready"] == 1)
        with ThreadPoolExecutor(4) as threads:

            def ask(_: int) -> int:
                with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                    stub = stubs.GRPCInferenceServiceStub(channel)
                    return len(stub.ModelInfer(request(pixels[:1])).raw_output_contents)

            assert list(threads.map(ask, range(8))) == [1] * 8
        server.terminate()
        assert server.wait() == 0


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "server", "--port", "0", "--grpc-port", str(port)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert f"gRPC cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_missing_packages_are_named() -> None:
    code = (
        "import sys; sys.modules['tritonclient'] = None;"
        " from server.__main__ import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "--port", "0", "--grpc-port", "1024"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "requirements-grpc.txt" in ended.stderr
