"""Behind nginx, which ends TLS and serves this under a prefix: page, reference and API work."""

import contextlib
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from benchmarks.launch import ServerProcess, serve
from tests.conftest import Sample, until

pytestmark = pytest.mark.skipif(
    not (shutil.which("nginx") and shutil.which("openssl")), reason="needs nginx and openssl"
)

_CONFIG = """\
daemon off;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_max_body_size 64m;
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {folder}/cert.pem;
    ssl_certificate_key {folder}/key.pem;
    location /skin/lesions/ {{
      proxy_pass http://127.0.0.1:{upstream}{path};
      proxy_http_version 1.1;
      # Else photos are written to files on their way.
      proxy_request_buffering off;
      proxy_buffering off;
    }}
  }}
}}
"""


@contextlib.contextmanager
def nginx(folder: Path, server: ServerProcess, *, strips: bool) -> Iterator[httpx.Client]:
    """A client of the proxy, whose base is the prefix."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-days", "2"),
            *("-keyout", folder / "key.pem", "-out", folder / "cert.pem"),
        ],
        check=True,
        capture_output=True,
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = folder / "nginx.conf"
    path = "/" if strips else ""
    config.write_text(
        _CONFIG.format(folder=folder, port=port, upstream=server.port, path=path), encoding="utf-8"
    )
    log = (folder / "nginx.log").open("wb")
    command: list[str | Path] = ["nginx", "-c", config, "-p", folder, "-e", folder / "error.log"]
    with log, subprocess.Popen(command, stderr=log) as process:
        try:

            def listens() -> bool:
                assert process.poll() is None, (folder / "nginx.log").read_text(encoding="utf-8")
                with socket.socket() as connection:
                    return connection.connect_ex(("127.0.0.1", port)) == 0

            until(listens)
            context = ssl.create_default_context(cafile=folder / "cert.pem")
            base = f"https://localhost:{port}/skin/lesions/"
            with httpx.Client(verify=context, base_url=base, timeout=60) as client:
                yield client
        finally:
            process.terminate()


@pytest.fixture(params=["stripped", "kept"])
def proxied(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[httpx.Client]:
    strips = request.param == "stripped"
    flags = () if strips else ("--root-path", "/skin/lesions")
    with serve(*flags) as server, nginx(tmp_path, server, strips=strips) as client:
        # Whoever asks directly does not know of the prefix.
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
        yield client


def test_all_works_below_the_prefix(proxied: httpx.Client, photos: list[Sample]) -> None:
    for path in ("", "docs", "docs/start.js", "docs/swagger-ui.css", "page/app.js", "v2", "model"):
        assert proxied.get(path).status_code == 200, path
    # As the viewer finds the address of a path (OpenAPI 3.1, 4.8.5).
    address = proxied.base_url.join("openapi.json")
    (told,) = proxied.get(address).json()["servers"]
    base = urljoin(str(address), told["url"]).rstrip("/")
    assert proxied.get(f"{base}/health/ready").json()["status"] == "ready"
    files = {"file": photos[0].data}
    answer = proxied.post(f"{base}/segment", files=files, params={"format": "json"})
    assert answer.json()["lesion"]["found"]
    batch = proxied.post(f"{base}/segment/batch", files=files)
    assert batch.json()["status"] == 200


def test_nothing_leads_out_of_tls_and_prefix(proxied: httpx.Client) -> None:
    for path in ("segment/", "docs/", "v2/", "model/", "health/live/"):
        answer = proxied.post(path, content=b"x")
        assert answer.status_code == 404, path
        assert "location" not in answer.headers
