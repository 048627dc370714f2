"""Keys, their pace, TLS, and what a browser is told: against a real server."""

import base64
import errno
import hashlib
import json
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cryptography import x509

from server.keys import KeyFile, KeyFileError, new_key
from tests.support import ROOT
from tests.support.answers import assert_problem
from tests.support.authority import Authority
from tests.support.launch import ServerProcess, free_port, serve
from tests.support.samples import Sample
from tests.support.waiting import until
from tests.support.wire import connect

pytestmark = pytest.mark.usefixtures("small_networks")


@dataclass
class Guarded:
    """A server with two keys."""

    server: ServerProcess
    file: Path
    user: str
    admin: str

    def get(self, path: str, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.get(f"{self.server.url}{path}", headers=named)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    user, user_line = new_key("clinic")
    admin, admin_line = new_key("ops", "admin")
    file.write_text(f"# who\n{user_line}\n\n{admin_line}  # on call\n", encoding="utf-8")
    flags = ("--api-keys-file", str(file), "--cors-origins", "https://clinic.example")
    with serve(*flags) as server:
        yield Guarded(server, file, user, admin)


def test_without_a_key_only_health_and_metrics_answer(guarded: Guarded) -> None:
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert guarded.get(path).status_code == 200
    for path in ("/model", "/docs", "/openapi.json", "/nothing"):
        answer = guarded.get(path)
        assert_problem(answer, 401, "API key", "Authorization: Bearer")
        # In this order: Chromium asks for a key only where the first scheme is Basic.
        assert answer.headers["www-authenticate"].startswith("Basic ")
        assert 'Bearer realm="slsnet"' in answer.headers["www-authenticate"]
    tensors = guarded.get("/v2")
    assert tensors.status_code == 401
    assert "API key" in tensors.json()["error"]
    assert_problem(guarded.get("/model", X_API_Key="slsnet_guess"), 401, "not known")
    post = httpx.post(f"{guarded.server.url}/segment", content=b"x")
    assert_problem(post, 401)


def test_a_key_opens_all_but_admin(guarded: Guarded, photos: list[Sample]) -> None:
    basic = base64.b64encode(f"anyone:{guarded.user}".encode()).decode()
    assert guarded.get("/model", Authorization=f"Bearer {guarded.user}").status_code == 200
    assert guarded.get("/model", X_API_Key=guarded.user).status_code == 200
    assert guarded.get("/model", Authorization=f"Basic {basic}").status_code == 200
    assert guarded.get("/model", Authorization="Basic !!").status_code == 401
    url = guarded.server.url
    answer = httpx.post(f"{url}/segment", content=photos[0].data, headers=bearer(guarded.user))
    assert answer.status_code == 200
    refused = httpx.post(f"{url}/admin/reload", headers=bearer(guarded.user))
    assert_problem(refused, 403, "administrator")


def test_keys_change_without_a_restart_and_are_never_logged(guarded: Guarded) -> None:
    before = guarded.file.read_text(encoding="utf-8")
    new, line = new_key("clinic-2027")
    guarded.file.write_text(f"{before}{line}\n", encoding="utf-8")
    assert guarded.get("/model", X_API_Key=new).status_code == 200
    assert guarded.get("/model", X_API_Key=guarded.user).status_code == 200
    # A file that is not understood leaves the keys as they were.
    guarded.file.write_text(f"{before}oops\n", encoding="utf-8")
    assert guarded.get("/model", X_API_Key=new).status_code == 200
    replacement = guarded.file.with_suffix(".new")
    replacement.write_text(before, encoding="utf-8")
    replacement.replace(guarded.file)
    assert guarded.get("/model", X_API_Key=new).status_code == 401
    # Another thread writes it.
    until(lambda: "clinic-2027 GET /model 200" in guarded.server.log())
    until(lambda: "the keys stay as they were" in guarded.server.log())
    log = guarded.server.log()
    assert not any(key in log for key in (new, guarded.user, guarded.admin))


def test_keys_that_could_not_be_read_when_they_changed_are_read_once_they_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    (old, old_line), (new, new_line) = new_key("old"), new_key("new")
    file.write_text(old_line, encoding="utf-8")
    keys = KeyFile(file)
    file.write_text(f"{new_line}  # instead", encoding="utf-8")

    def fail(*_: object, **__: object) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", fail)
        assert keys.find(old)
        assert not keys.find(new)
    assert keys.find(new)
    assert not keys.find(old)
    assert len([line for line in caplog.messages if "stay as they were" in line]) == 1


def test_only_named_origins_are_told_that_they_may(guarded: Guarded) -> None:
    preflight = {
        "Origin": "https://clinic.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-api-key",
    }
    answer = httpx.options(f"{guarded.server.url}/segment", headers=preflight)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://clinic.example"
    preflight["Origin"] = "https://elsewhere.example"
    answer = httpx.options(f"{guarded.server.url}/segment", headers=preflight)
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


def test_answers_keep_browsers_strict(server: ServerProcess) -> None:
    paths = ("/health/live", "/metrics", "/nothing", "/docs", "/admin/reload")
    for path in paths:
        headers = httpx.get(f"{server.url}{path}", headers={"Origin": "https://a.example"}).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "server" not in headers
        assert not any(name.startswith("access-control") for name in headers)


def test_admin_is_not_there_without_a_key_for_it(server: ServerProcess) -> None:
    assert_problem(httpx.post(f"{server.url}/admin/reload"), 404, "administrator's key")


def test_each_key_has_its_own_pace(tmp_path: Path) -> None:
    keys = [new_key(name) for name in ("one", "two")]
    file = tmp_path / "keys"
    file.write_text("\n".join(line for _, line in keys), encoding="utf-8")
    flags = ("--key-requests-per-s", "0.01", "--key-burst", "3", "--metrics-keyed", "true")
    with serve("--api-keys-file", str(file), *flags) as server:
        for key, _ in keys:
            headers = bearer(key)
            answers = [httpx.get(f"{server.url}/metrics", headers=headers) for _ in range(4)]
            assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
            assert 1 <= int(answers[3].headers["retry-after"]) <= 100
            assert_problem(answers[3], 429, "0.01 requests a second")
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health/ready").status_code == 200


def test_the_command_prints_a_key_once_and_the_file_holds_its_hash(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.keys", "new", "clinic", "--admin"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    key, line = (text.rpartition(": ")[2].strip() for text in said.splitlines())
    assert line == f"clinic admin {hashlib.sha256(key.encode()).hexdigest()}"
    file = tmp_path / "keys"
    file.write_text(line, encoding="utf-8")
    found = KeyFile(file).find(key)
    assert found is not None
    assert (found.name, found.scope) == ("clinic", "admin")
    assert KeyFile(file).find(key + "x") is None
    with pytest.raises(ValueError, match="letters"):
        new_key("two words")


def test_a_key_file_that_cannot_be_read_ends_the_process(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be read"):
        KeyFile(tmp_path / "none")
    file = tmp_path / "keys"
    file.write_text("clinic use slsnet_put_here_by_mistake", encoding="utf-8")
    command = [sys.executable, "-m", "server", "--api-keys-file", str(file)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 1
    assert "line 1" in result.stderr
    assert "by_mistake" not in result.stderr


def test_tls_and_clients_that_show_their_certificate(tmp_path: Path, photos: list[Sample]) -> None:
    authority = Authority(tmp_path, "authority")
    stranger = Authority(tmp_path, "stranger")
    certificate, authorities = str(authority.issue("server")), str(authority.certificate)
    flags = ("--tls-cert", certificate, "--tls-client-ca", authorities)
    trust = ssl.create_default_context(cafile=str(authority.certificate))
    known = ssl.create_default_context(cafile=str(authority.certificate))
    known.load_cert_chain(authority.issue("client"))
    unknown = ssl.create_default_context(cafile=str(authority.certificate))
    unknown.load_cert_chain(stranger.issue("other"))
    with (
        serve(*flags, trust=known) as server,
        httpx.Client(base_url=server.url, verify=known) as client,
    ):
        answer = client.post("/segment", content=photos[0].data)
        assert answer.status_code == 200
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        for context in (trust, unknown):
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{server.url}/health/live", verify=context)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{server.port}/health/live")
        many = [("file", photos[index % 3].data) for index in range(30)]
        with client.stream("POST", "/segment/batch", files=many) as answer:
            lines = answer.iter_lines()
            statuses = [json.loads(next(lines))["status"]]
            server.terminate()
            statuses += [json.loads(line)["status"] for line in lines]
        assert statuses == [200] * 30
        # The client is still connected, but does not look; asyncio alone would wait for 30 s.
        assert server.process.wait(25) == 0


def test_a_certificate_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    trust = ssl.create_default_context(cafile=str(authority.certificate))
    first, second = (authority.issue(name).read_text() for name in ("first", "second"))
    begin = "-----BEGIN CERTIFICATE-----"
    certificate, key = tmp_path / "served.crt", tmp_path / "served.key"
    certificate.write_text(first)
    key.write_text(first.partition(begin)[0])
    flags = ("--tls-cert", str(certificate), "--tls-key", str(key))

    def served() -> str:
        """Whom the certificate is for that a new connection is shown."""
        with (
            connect(server) as plain,
            trust.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            shown = connection.getpeercert(binary_form=True)
            assert shown is not None
            (name,) = x509.load_der_x509_certificate(shown).subject
            return str(name.value)

    with serve(*flags, trust=trust) as server:
        certificate.write_text(second)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "certificate is not changed" in server.log())
        assert served() == "first"
        key.write_text(second.partition(begin)[0])
        server.process.send_signal(signal.SIGHUP)
        until(lambda: served() == "second")
        server.terminate()
        assert server.wait() == 0


def test_tls_that_cannot_be_set_up_ends_the_process(tmp_path: Path) -> None:
    for flags, words in (
        (["--tls-cert", str(tmp_path / "none.pem")], "--tls-cert"),
        (["--tls-key", str(tmp_path / "none.pem")], "need --tls-cert"),
    ):
        command = [sys.executable, "-m", "server", "--port", str(free_port()), *flags]
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
        )
        assert result.returncode in (1, 2)
        assert words in result.stderr
