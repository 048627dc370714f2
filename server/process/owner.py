"""The process that owns the network which several workers share.

`server.process.supervisor` starts it. It speaks no HTTP: workers send it pixels
(`server.inference.sharing`). On SIGTERM, or if the supervisor is gone, it ends once no worker needs
it any more. SIGHUP loads the network from its file again.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Sequence

from server.backends import BackendError
from server.inference.repository import Repository
from server.inference.sharing.memory import Slots
from server.inference.sharing.owner import SharedService
from server.observe.logs import configure
from server.observe.metrics import Metrics
from server.process.child import ALL_STOP, end_after, hold_signals, outlives
from server.settings import Settings, read_settings

__all__ = ["main"]

log = logging.getLogger("slsnet.server")

# Seconds for what is closed once no worker is there.
_CLOSING_S = 10.0


class _Owner:
    """The networks, and the signals that end them."""

    def __init__(self, settings: Settings, slots: Sequence[Slots]) -> None:
        # The workers of a network have as large a part of the cores as it has.
        owners = max(1, round(settings.workers / len(slots)))
        alone = settings.model_copy(update={"workers": owners})
        self._service = SharedService(alone, Metrics(), slots)
        self._repository = Repository(self._service)
        self._service.reload = self._repository.reload
        self._ended = asyncio.Event()
        self._reloading: asyncio.Task[None] | None = None

    def end(self) -> None:
        """Let no network serve any longer than workers need it."""
        self._service.drain.begin()
        self._ended.set()

    def reload(self) -> None:
        """Load the network from its file again."""
        self._reloading = asyncio.create_task(self._reload())

    async def _reload(self) -> None:
        # The log has what went wrong.
        with contextlib.suppress(BackendError, OSError):
            await self._repository.reload()

    async def serve(self, listener: socket.socket, held: Sequence[int]) -> int:
        """Run what workers send; return the exit code.

        Args:
            listener: workers connect to it.
            held: signals that have come by now.
        """
        service = self._service
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, ALL_STOP):
            loop.add_signal_handler(number, self.end)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        if set(held) - {signal.SIGHUP}:
            self.end()
        await loop.create_server(service.listen, sock=listener)
        always = [loop.create_task(work) for work in (service.beat(), service.metrics.keep_fresh())]
        try:
            await self._repository.start()
        except BackendError as error:
            log.error("%s", error)
            return 1
        await self._ended.wait()
        await service.deserted()
        end_after(_CLOSING_S)
        for task in always:
            task.cancel()
        await self._repository.close()
        await service.close()
        return 0


def main() -> int:
    """`python -m server.process.owner SUPERVISOR LISTENER MEMORIES FLAGS…`, as it is started."""
    supervisor, listener = int(sys.argv[1]), int(sys.argv[2])
    memories = [int(memory) for memory in sys.argv[3].split(",")]
    settings = read_settings(sys.argv[4:])
    configure(settings.log_level, settings.log_format)
    if outlives(supervisor):
        return 1
    held = hold_signals()

    async def serve() -> int:
        owner = _Owner(settings, [Slots(memory) for memory in memories])
        return await owner.serve(socket.socket(fileno=listener), held)

    return asyncio.run(serve())


if __name__ == "__main__":
    sys.exit(main())
