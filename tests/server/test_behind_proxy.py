"""Behind a proxy that ends TLS and serves this under a prefix: page, reference and API work."""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from tests.support.launch import ServerProcess, serve
from tests.support.samples import Sample
from tests.support.waiting import until

_NGINX = """\
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


_CADDY = """\
{{
  admin off
  auto_https disable_redirects
}}
https://localhost:{port} {{
  bind 127.0.0.1
  tls {folder}/cert.pem {folder}/key.pem
  {handle} /skin/lesions/* {{
    reverse_proxy 127.0.0.1:{upstream}
  }}
}}
"""


def _nginx(folder: Path, port: int, upstream: int, strips: bool) -> list[str | Path]:
    config = folder / "nginx.conf"
    path = "/" if strips else ""
    config.write_text(
        _NGINX.format(folder=folder, port=port, upstream=upstream, path=path), encoding="utf-8"
    )
    return ["nginx", "-c", config, "-p", folder, "-e", folder / "error.log"]


def _caddy(folder: Path, port: int, upstream: int, strips: bool) -> list[str | Path]:
    config = folder / "Caddyfile"
    handle = "handle_path" if strips else "handle"
    config.write_text(
        _CADDY.format(folder=folder, port=port, upstream=upstream, handle=handle), encoding="utf-8"
    )
    return ["caddy", "run", "--config", config, "--adapter", "caddyfile"]


_PROXIES = {"nginx": _nginx, "caddy": _caddy}


@contextlib.contextmanager
def proxy(
    name: str, folder: Path, server: ServerProcess, *, strips: bool
) -> Iterator[httpx.Client]:
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
    command = _PROXIES[name](folder, port, server.port, strips)
    # Caddy keeps its state at home.
    home = {
        **os.environ,
        **dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), str(folder)),
    }
    log = folder / "proxy.log"
    with log.open("wb") as output, subprocess.Popen(command, stderr=output, env=home) as process:
        try:

            def listens() -> bool:
                assert process.poll() is None, log.read_text(encoding="utf-8")
                with socket.socket() as connection:
                    return connection.connect_ex(("127.0.0.1", port)) == 0

            until(listens)
            context = ssl.create_default_context(cafile=folder / "cert.pem")
            base = f"https://localhost:{port}/skin/lesions/"
            with httpx.Client(verify=context, base_url=base, timeout=60) as client:
                yield client
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def prefixed(small_network: Path) -> Iterator[ServerProcess]:
    """A server that is told of the prefix."""
    with serve("--root-path", "/skin/lesions", "--model", str(small_network)) as server:
        yield server


@pytest.fixture(
    scope="module",
    params=[(name, form) for form in ("stripped", "kept") for name in _PROXIES],
    ids="-".join,
)
def proxied(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    name, form = request.param
    if missing := [tool for tool in (name, "openssl") if not shutil.which(tool)]:
        pytest.skip(f"needs {' and '.join(missing)}")
    server = request.getfixturevalue("server" if form == "stripped" else "prefixed")
    folder = tmp_path_factory.mktemp(name)
    with proxy(name, folder, server, strips=form == "stripped") as client:
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
