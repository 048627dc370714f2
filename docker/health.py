"""The container's health check: exit 0 if the server in it is ready for requests, else 1.

Reads `SLSNET_HOST` and `SLSNET_PORT`. With TLS the certificate is not verified: it is issued for
the name that clients use, and this is the server's own loopback. Where clients have to show a
certificate (`SLSNET_TLS_CLIENT_CA`) this shows the server's own. If the server refuses that, its
readiness cannot be asked, and a completed TLS handshake counts as healthy.
"""

import contextlib
import http.client
import os
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping

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
    sys.exit(0 if is_ready(os.environ) else 1)
