"""The networks of a server that may serve: loads them by name, and retires them."""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from server.backends import BackendError, BackendInfo
from server.inference.errors import UnknownNetwork, Unprocessable
from server.inference.loading import Loader
from server.inference.served import Served
from server.inference.service import Service
from server.settings import NETWORK_NAME, NETWORK_NAMES, Settings

__all__ = ["NOT_ALONE", "NOT_LOADED", "Entry", "Repository", "entries"]

log = logging.getLogger("slsnet.loading")

NOT_ALONE = (
    "Several processes serve here, and this request reached one of them: networks are loaded"
)
NOT_ALONE += " and retired in a server of one process. Name them with --model at its start."
"""What is told to those who would change the networks of one process only."""

NOT_LOADED = "it is not loaded"
"""Why a network is not ready that nobody has loaded, or that was retired."""


_NOT_SERVED = "the network %s is not served: %s"


@dataclass(frozen=True)
class Entry:
    """A network that serves, or may be loaded."""

    name: str
    is_ready: bool
    reason: str
    """Why it is not ready; empty if it is."""


class Repository:
    """Loads a service's networks, and keeps a `Loader` for each that serves.

    Args:
        service: has the networks.
        is_alone: whether no other process has the same ones.
    """

    def __init__(self, service: Service, *, is_alone: bool = True) -> None:
        self._service = service
        self._is_alone = is_alone
        self._loaders = {served.name: Loader(service, served) for served in service.networks}
        self._one_at_a_time = asyncio.Lock()

    async def start(self) -> None:
        """Load the default network, then the others. One of those that cannot serve is retired.

        Raises:
            BackendError: the default one cannot serve.
        """
        async with self._one_at_a_time:
            default = self._service.networks.default.name
            await self._loaders[default].load()
            for name, loader in list(self._loaders.items()):
                if name == default:
                    continue
                try:
                    await loader.load()
                except BackendError as error:
                    log.error(_NOT_SERVED, name, error)
                    self._let_go(name, str(error))

    async def reload(self) -> BackendInfo:
        """Load all networks from their files again; see `Loader.load`.

        Returns:
            What runs the default one.

        Raises:
            BackendError: one of them cannot serve; what ran it before goes on.
        """
        async with self._one_at_a_time:
            errors = []
            for name in list(self._loaders):
                try:
                    await self._load_again(name)
                except BackendError as error:
                    errors.append(str(error))
        if errors:
            raise BackendError(" ".join(errors))
        return self._service.backend

    async def load(self, name: str) -> None:
        """Load a network and let it serve, or load it from its file again.

        Raises:
            Unprocessable: this is no name of a network, or other processes have the networks too.
            UnknownNetwork: there is no file for it.
            BackendError: it cannot serve; the others go on, and so does what ran it before.
        """
        self._check_alone()
        if not NETWORK_NAME.fullmatch(name):
            raise Unprocessable(f"{name[:80]!r} is no name of a network: {NETWORK_NAMES}.")
        async with self._one_at_a_time:
            if name in self._loaders:
                await self._load_again(name)
                return
            service = self._service
            files = _files(service.settings)
            if name not in files:
                folder = service.settings.model.parent
                raise UnknownNetwork(
                    f"There is no network {name!r} to load: {folder} has no such"
                    f" file {name}.onnx, and no --model names one."
                )
            served = Served(name, files[name])
            loader = Loader(service, served)
            try:
                await loader.load()
            except BaseException as error:
                service.networks.refusals[name] = str(error)
                log.error(_NOT_SERVED, name, error)
                await loader.close()
                raise
            self._loaders[name] = loader
            service.add(served)

    async def retire(self, name: str) -> None:
        """Let no request name this network any more; those that came before are still answered.

        Raises:
            UnknownNetwork: no such network serves.
            Unprocessable: it is the default one, which requests without a name need; or other
                processes have the networks too.
        """
        self._check_alone()
        async with self._one_at_a_time:
            served = self._service.networks.named(name)
            if served is self._service.networks.default:
                raise Unprocessable(
                    f"{name!r} is the default network, which requests without a name need: put"
                    " another one into its file and load that."
                )
            self._let_go(name)
            log.info("retired: %s", name)

    async def _load_again(self, name: str) -> None:
        """Load one that serves; whoever asked for it, the log says why it fails."""
        try:
            await self._loaders[name].load()
        except (BackendError, OSError) as error:
            log.error("the network %s is not changed: %s", name, error)
            raise

    def _check_alone(self) -> None:
        if not self._is_alone:
            raise Unprocessable(NOT_ALONE)

    def _let_go(self, name: str, reason: str = "") -> None:
        self._service.retire(name, reason, self._loaders.pop(name).close())

    async def close(self) -> None:
        """Stop building and recovering."""
        await asyncio.gather(*(loader.close() for loader in self._loaders.values()))


def entries(service: Service) -> Iterator[Entry]:
    """The networks of a service that serve, and those that may be loaded."""
    networks = service.networks
    for served in networks:
        reason = "" if served.works else "it fails" if served.is_failing else "it is being loaded"
        yield Entry(served.name, not reason, reason)
    for name in sorted(set(_files(service.settings)) - {served.name for served in networks}):
        yield Entry(name, False, networks.refusals.get(name, NOT_LOADED))


def _files(settings: Settings) -> dict[str, Path]:
    """The files of networks by their names: those in the default one's folder, and in settings."""
    beside = {
        file.stem: file
        for file in settings.model.parent.glob("*.onnx")
        # A pipe would keep whoever reads it waiting, and a device has no end.
        if NETWORK_NAME.fullmatch(file.stem) and file.is_file()
    }
    return {**beside, **settings.networks}
