"""A cache of TensorRT engines where there is no GPU."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.backends import Backend, BackendInfo, Images
from server.backends.engine_cache import EngineCache, EngineEvent
from tests.support import ROOT
from tests.support.fake_builder import KEY

BUILDER = ROOT / "tests/support/fake_builder.py"


class EngineStub:
    """What loading an engine gives where there is no GPU."""

    def __init__(self, engine: Path) -> None:
        self.engine = engine

    def describe(self) -> BackendInfo:
        return BackendInfo("tensorrt", "11.4.0", "a GPU", "fp16", 4, buckets=(1, 2, 4))

    def warm_up(self) -> None: ...

    def infer(self, batch: Images) -> NDArray[np.float32]:
        return np.ones((len(batch), 128, 128), np.float32)

    def close(self) -> None: ...


class Harness:
    """A cache in a folder of its own, its events, and the journal of its builds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = folder / "journal"
        self.events: list[EngineEvent] = []

    def cache(
        self,
        behaviour: str | Callable[[], str] = "good",
        load: Callable[[Path], Backend] = EngineStub,
        trial: str = "",
        on_event: Callable[[EngineEvent], None] | None = None,
        **options: Any,
    ) -> EngineCache:
        def command(engine: Path) -> list[str]:
            how = behaviour if isinstance(behaviour, str) else behaviour()
            return [sys.executable, str(BUILDER), str(engine), str(self.journal), how]

        return EngineCache(
            self.folder / "engines",
            KEY,
            command=command,
            load=load,
            trial=lambda _: [sys.executable, "-c", trial],
            on_event=on_event or self.events.append,
            **{"first_pause_s": 0.05, **options},
        )

    def let_go(self) -> None:
        """Builds that are "held" may go on."""
        self.journal.with_name("go").touch()

    def builds(self) -> int:
        return self.journal.read_text().count("start") if self.journal.exists() else 0
