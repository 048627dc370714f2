"""`python -m server`: serve in this process, or in several workers that it supervises."""

import logging
import signal
import socket
import sys

from server.observe.logs import configure
from server.process.child import hold_signals
from server.settings import read_settings

log = logging.getLogger("slsnet.server")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # `::` is every address, also of IPv4.
    both = host == "::" and socket.has_dualstack_ipv6()
    listener = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    log.info("listening on %s port %d", host, listener.getsockname()[1])
    return listener


def main() -> int:
    """Serve until a signal ends it; return the process's exit code."""
    # Nothing can be reloaded yet. By default the signal would end the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    settings = read_settings()
    configure(settings.log_level, settings.log_format)
    for doubt in settings.doubts:
        log.warning("%s", doubt)
    try:
        if settings.backend != "torch":
            # It is loaded once the port is open, but a wrong path is told at once.
            for file in settings.networks.values():
                file.open("rb").close()
    except OSError as error:
        log.error(
            "the network cannot be read, look at --model (SLSNET_MODEL, SLSNET_MODELS): %s", error
        )
        return 1
    # A client may be waiting from now on, and a signal may come before anything can handle it.
    held = hold_signals()
    try:
        listener = _listen(settings.host, settings.port)
    except OSError as error:
        log.error(
            "cannot listen on %s port %d, look at --host and --port: %s",
            settings.host,
            settings.port,
            error.strerror or error,
        )
        return 1
    if settings.workers > 1 or settings.share_network == "yes":
        from server.process.supervisor import supervise

        return supervise(settings, sys.argv[1:], listener, held)
    from server.process.worker import run

    return run(settings, listener, held)


if __name__ == "__main__":
    sys.exit(main())
