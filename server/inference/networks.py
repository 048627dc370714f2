"""The networks that requests can name, and the one for requests that name none."""

import asyncio
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

from server.inference.errors import UnknownNetwork
from server.inference.served import Served

__all__ = ["Networks"]


class Networks:
    """All networks that serve, by their names; each has its own queue and batches.

    Args:
        files: of each network by its name, the default one first.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._served = {name: Served(name, file) for name, file in files.items()}
        self.default = next(iter(self._served.values()))
        """Runs the photos of requests that name no network."""
        self.refusals: dict[str, str] = {}
        """Why a network does not serve, of those that could not be loaded."""
        self._retiring: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._served.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._served

    @property
    def are_loading(self) -> bool:
        """Whether one has not been loaded yet, and may still be."""
        return any(one.info is None and one.name not in self.refusals for one in self)

    def named(self, name: str | None) -> Served:
        """The network that a request names; None for the default one.

        Raises:
            UnknownNetwork: there is none of this name.
        """
        if name is None:
            return self.default
        served = self._served.get(name)
        if served is None:
            known = ", ".join(map(repr, self._served))
            those = "those that serve are" if len(self._served) > 1 else "the one that serves is"
            raise UnknownNetwork(f"There is no network {name[:80]!r}: {those} {known}.")
        return served

    def add(self, served: Served) -> None:
        """Let requests name it from now on."""
        self.refusals.pop(served.name, None)
        self._served[served.name] = served

    def retire(self, name: str, first: Coroutine[Any, Any, None] | None = None) -> None:
        """Let no request name it any more; those that came before are still answered.

        Args:
            name: of a network that serves.
            first: ends what would let anything else run it; awaited before it is closed.
        """
        task = asyncio.get_running_loop().create_task(_retire(self._served.pop(name), first))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def waiting(self, *, bulk: bool) -> int:
        """Photos that wait for any network, or to be decoded for it."""
        return sum(served.waiting(bulk=bulk) for served in self)

    def longest_wait_s(self) -> float:
        """The longest time that a photo which waits has waited up to now."""
        return max(served.longest_wait_s() for served in self)

    def idle_s(self) -> float:
        """Seconds since any network last ran a photo, or came into use."""
        return min(served.idle_s() for served in self)

    async def close(self) -> None:
        """Finish what was accepted."""
        await asyncio.gather(*self._retiring, *(served.close() for served in self))


async def _retire(served: Served, first: Coroutine[Any, Any, None] | None) -> None:
    if first is not None:
        await first
    await served.retire()
