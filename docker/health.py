"""The container's health check: exit 0 if the server in it is ready for requests, else 1.

Reads `SLSNET_HOST` and `SLSNET_PORT`. With TLS the certificate is not verified: it is issued for
the name that clients use, and this is the server's own loopback.
"""

import http.client
import os
import ssl
import sys
import urllib.error
import urllib.request

_TIMEOUT_S = 4
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


def is_ready(address: str) -> bool:
    """Whether readiness is 200 at `address` (host:port), over HTTP or, failing that, TLS."""
    insecure = ssl.create_default_context()
    insecure.check_hostname = False
    insecure.verify_mode = ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=insecure)
    )
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
    return False


if __name__ == "__main__":
    host = os.environ.get("SLSNET_HOST", "127.0.0.1")
    port = os.environ.get("SLSNET_PORT", "8000")
    sys.exit(0 if is_ready(f"{_LOOPBACK.get(host, host)}:{port}") else 1)
