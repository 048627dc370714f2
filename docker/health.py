"""The container's health check: exit 0 if the program in it is ready for requests, else 1.

The command line of the first process says which one runs (`docker/entrypoint.py`). `archive serve`
is asked at its health port, other commands of `archive` have none, and `label-studio` is well if
its port is open. Where the container does not see its own first process, since it shares the
processes of the host or of a pod, the server is asked.

Of the server this reads `SLSNET_HOST` and `SLSNET_PORT`. With TLS the certificate is not verified:
it is issued for the name that clients use, and this is the server's own loopback. Where clients
have to show a certificate (`SLSNET_TLS_CLIENT_CA`) this shows the server's own. If the server
refuses that, its readiness cannot be asked, and a completed TLS handshake counts as healthy.
"""

import contextlib
import http.client
import os
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

_TIMEOUT_S = 4
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def is_ready(environment: Mapping[str, str]) -> bool:
    """Whether readiness is 200, over HTTP or, failing that, TLS."""
    host = environment.get("SLSNET_HOST", "127.0.0.1")
    host = _LOOPBACK.get(host, host)
    port = int(environment.get("SLSNET_PORT", "8000"))
    certificate = environment.get("SLSNET_TLS_CERT")
    insecure = ssl.create_default_context()
    insecure.check_hostname = False
    insecure.verify_mode = ssl.CERT_NONE
    is_mutual = certificate and environment.get("SLSNET_TLS_CLIENT_CA")
    if certificate and is_mutual:
        with contextlib.suppress(OSError):
            insecure.load_cert_chain(certificate, environment.get("SLSNET_TLS_KEY"))
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=insecure)
    )
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    for scheme in ("http", "https"):
        try:
            with opener.open(f"{scheme}://{address}/health/ready", timeout=_TIMEOUT_S):
                return True
        except urllib.error.HTTPError as answer:
            answer.close()
            if answer.code == 503:
                return False
        except (OSError, http.client.HTTPException):
            continue
    return bool(is_mutual) and _shakes_hands(host, port, insecure)


def is_well(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether the program is ready that this command line of the first process runs."""
    entry = [at for at, word in enumerate(command) if word.endswith("entrypoint.py")]
    words = list(command[entry[0] + 1 :]) if entry else []
    match words:
        case ["archive", "serve", *options]:
            host, port = _address(options, "--health-host", "--health-port", 11113)
            return is_ready({"SLSNET_HOST": host, "SLSNET_PORT": str(port)})
        case ["archive", *_]:
            return True
        case ["label-studio", *options]:
            # Not by HTTP: it may ask for a password.
            with contextlib.suppress(OSError):
                address = _address(options, "--host", "--port", 9090)
                socket.create_connection(address, timeout=_TIMEOUT_S).close()
                return True
            return False
    return is_ready(environment)


def _address(words: Sequence[str], host: str, port: str, usual: int) -> tuple[str, int]:
    """The address that these two options of a command line name."""
    named = {host: "127.0.0.1", port: str(usual)}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, is_whole, value = word.partition("=")
        if name in named:
            named[name] = value if is_whole else following
    return _LOOPBACK.get(named[host], named[host]), int(named[port])


def _shakes_hands(host: str, port: int, context: ssl.SSLContext) -> bool:
    """Whether there is a server that speaks TLS, whatever it says to this client's certificate."""
    # Of TLS 1.3 the client's part is done before the server has looked at its certificate.
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        with (
            socket.create_connection((host, port), timeout=_TIMEOUT_S) as connection,
            context.wrap_socket(connection),
        ):
            print("alive; whether it is ready is told to clients with a certificate alone")
            return True
    except OSError:
        return False


if __name__ == "__main__":
    first = ""
    with contextlib.suppress(OSError):
        first = Path("/proc/1/cmdline").read_text(encoding="utf-8", errors="replace")
    sys.exit(0 if is_well(first.split("\0"), os.environ) else 1)
