"""The engine cache with real processes, and builders that are slow, killed and broken."""

import dataclasses
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engines import tensorrt_api
from engines.device import Gpu, NoGpuError
from engines.plan import file_sha256, read_plan_info, sidecar_path
from server.backends import Backend, BackendError, engine_cache
from server.backends.engine_cache import EngineCache, EngineEvent, open_engine_cache
from tests.support import MODEL, ROOT, surface
from tests.support.devices import has_gpu
from tests.support.engines import EngineStub, Harness
from tests.support.fake_builder import CONTENT, KEY, plan_info
from tests.support.waiting import until


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_a_miss_is_built_and_the_next_start_finds_it(
    harness: Harness, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "slsnet.engine")
    cache = harness.cache()

    assert cache.load() is None
    backend = cache.obtain(stop)

    assert backend is not None
    assert backend.describe().name == "tensorrt"
    assert harness.events == ["miss", "build_started", "build_succeeded", "hit", "serving"]
    steps = [record.getMessage().split(":")[0] for record in caplog.records]
    assert steps == [f"engine {event}" for event in harness.events], "one log line for each step"

    assert harness.cache().load() is not None
    assert harness.builds() == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("onnx_sha256", "1" * 64),
        ("library", "tensorrt 10.16.1"),
        ("compute_capability", "8.9"),
        ("device", "NVIDIA H200, 132 multiprocessors"),
        ("precision", "bf16"),
        ("buckets", (1, 2)),
    ],
)
def test_every_field_of_the_key_asks_for_an_engine_of_its_own(
    harness: Harness, field: str, value: object
) -> None:
    other = dataclasses.replace(KEY, **{field: value})  # type: ignore[arg-type]
    mine = harness.cache()
    theirs = EngineCache(
        harness.folder / "engines",
        other,
        command=lambda _: [],
        load=EngineStub,
        trial=lambda _: ["true"],
    )
    assert mine.engine != theirs.engine

    # And where a file lies under a name that is not its own, it is not taken for what it is not.
    mine.engine.parent.mkdir()
    mine.engine.write_bytes(CONTENT)
    plan_info(other).write(mine.engine)
    assert mine.load() is None
    assert harness.events == ["damaged"]


@pytest.mark.parametrize(
    "damage",
    ["truncated", "flipped", "no sidecar", "sidecar of noise", "sidecar of a list", "not gated"],
)
def test_damage_is_noticed_and_built_over(
    harness: Harness, stop: threading.Event, damage: str
) -> None:
    cache = harness.cache()
    assert cache.obtain(stop) is not None
    harness.events.clear()
    sidecar = sidecar_path(cache.engine)
    if damage == "truncated":
        cache.engine.write_bytes(CONTENT[:-1])
    elif damage == "flipped":
        cache.engine.write_bytes(b"A" + CONTENT[1:])
    elif damage == "no sidecar":
        sidecar.unlink()
    elif damage == "sidecar of noise":
        sidecar.write_bytes(b"\xff{")
    elif damage == "sidecar of a list":
        sidecar.write_text("[]")
    else:
        plan_info(failures=None).write(cache.engine)

    assert cache.load() is None
    assert harness.events == ["damaged"]
    assert cache.obtain(stop) is not None
    assert cache.load() is not None


def test_two_servers_never_build_the_same_engine(harness: Harness, stop: threading.Event) -> None:
    caches = [harness.cache("held") for _ in range(3)]
    found: list[Backend | None] = []
    threads = [
        threading.Thread(target=lambda cache=cache: found.append(cache.obtain(stop)))
        for cache in caches
    ]
    for thread in threads:
        thread.start()
    until(lambda: harness.events.count("build_waiting") == 2)
    harness.let_go()
    for thread in threads:
        thread.join(600)

    assert len(found) == 3
    assert all(backend is not None for backend in found)
    assert harness.builds() == 1
    assert harness.events.count("build_waiting") == 2
    assert harness.events.count("serving") == 3


SERVER = """
import sys, threading
from pathlib import Path
from tests.support.engines import Harness
harness = Harness(Path(sys.argv[1]))
cache = harness.cache("held", on_event=lambda event: print(event, flush=True))
print("nothing" if cache.obtain(threading.Event()) is None else "served", flush=True)
"""


def _server(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_build_outlives_its_server_and_is_not_begun_again(harness: Harness) -> None:
    first = _server(harness.folder)
    until(lambda: harness.builds() == 1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = _server(harness.folder)
    assert second.stdout is not None
    assert second.stdout.readline() == "build_waiting\n"
    harness.let_go()
    output, _ = second.communicate(timeout=600)
    if first.stdout is not None:
        first.stdout.close()

    assert output.endswith("served\n")
    assert harness.builds() == 1, "the second server waited for the orphaned build"


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("broken", "conv_1 reads fp32"),
        ("killed", "killed by signal 9"),
        ("dies half-way", "killed by signal 9"),
        ("disk full", "File too large"),
    ],
)
def test_a_failed_build_is_said_and_tried_again_later(
    harness: Harness,
    stop: threading.Event,
    caplog: pytest.LogCaptureFixture,
    behaviour: str,
    message: str,
) -> None:
    behaviours = iter([behaviour, behaviour, "good"])
    cache = harness.cache(lambda: next(behaviours))
    started = time.monotonic()

    assert cache.obtain(stop) is not None

    assert harness.events.count("build_failed") == 2
    assert harness.builds() == 3
    assert message in caplog.text
    assert time.monotonic() - started >= 0.05 + 0.1, "the pause doubles"
    names = {path.name for path in cache.engine.parent.iterdir()}
    engine = cache.engine.name
    assert names == {engine, f"{engine}.json", f"{engine}.lock"}, "nothing half-made is left"


def test_pauses_double_up_to_the_longest(
    harness: Harness, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def wait(timeout: float | None = None) -> bool:
        assert timeout is not None
        pauses.append(timeout)
        if len(pauses) == 5:
            stop.set()
        return stop.is_set()

    monkeypatch.setattr(stop, "wait", wait)
    cache = harness.cache("broken", first_pause_s=30, longest_pause_s=100)
    assert cache.obtain(stop) is None
    assert pauses == [30, 60, 100, 100, 100]


def test_an_engine_whose_masks_differ_is_not_served_nor_built_again(
    harness: Harness, stop: threading.Event
) -> None:
    cache = harness.cache("differs")
    assert cache.obtain(stop) is None
    assert harness.events == ["build_started", "gate_failed"]

    harness.events.clear()
    again = harness.cache()
    assert again.load() is None
    assert again.obtain(stop) is None
    assert harness.builds() == 1
    assert set(harness.events) == {"gate_failed"}


def test_an_engine_that_kills_who_loads_it_is_built_anew(
    harness: Harness, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    assert harness.cache().obtain(stop) is not None
    harness.events.clear()
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    cache = harness.cache(trial=dies)
    assert cache.load() is None
    assert harness.events == ["damaged"]
    assert "kills who loads it, by signal 11" in caplog.text
    assert cache.obtain(stop) is not None
    assert harness.builds() == 2


def test_an_engine_that_fails_its_trial_is_not_loaded_by_the_server(
    harness: Harness, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    assert harness.cache().obtain(stop) is not None
    harness.events.clear()
    cache = harness.cache(load=lambda _: pytest.fail("loaded"), trial="exit('out of GPU memory')")
    assert cache.load() is None
    assert harness.events == ["load_failed"]
    assert "out of GPU memory" in caplog.text
    assert cache.engine.exists()


def test_an_engine_that_was_timed_beside_serving_is_built_again_in_a_lull(
    harness: Harness, stop: threading.Event
) -> None:
    cache = harness.cache(lull_s=5, look_s=0.02)
    assert cache.obtain(stop) is not None
    assert read_plan_info(cache.engine).beside_serving
    harness.events.clear()

    assert cache.rebuild(stop, lambda: 100.0) is not None
    assert harness.events == ["build_started", "build_succeeded", "hit"]
    assert not read_plan_info(cache.engine).beside_serving
    assert harness.cache().load() is not None, "engine and sidecar belong together"
    assert not list(cache.engine.parent.glob(".*")), "nothing is left"

    assert cache.rebuild(stop, lambda: 100.0) is None, "once is enough"
    assert harness.builds() == 2


@pytest.mark.parametrize("whose", ["this server's", "another server's"])
def test_nothing_is_built_again_while_photos_come(
    harness: Harness, stop: threading.Event, whose: str
) -> None:
    cache = harness.cache(lull_s=5, look_s=0.02)
    assert cache.obtain(stop) is not None
    other = harness.cache(lull_s=5, look_s=0.02)

    def idle_s() -> float:
        if whose == "this server's":
            return 0.0
        # Private: what the other tells of its photos, without a build of its own.
        other._idle_s(lambda: 0.0)
        return 100.0

    timer = threading.Timer(0.3, stop.set)
    timer.start()
    assert cache.rebuild(stop, idle_s) is None
    timer.join()
    assert harness.builds() == 1


def test_a_photo_puts_the_second_build_off(harness: Harness, stop: threading.Event) -> None:
    behaviours = iter(["good", "hangs", "good"])
    cache = harness.cache(lambda: next(behaviours), lull_s=5, look_s=0.02)
    assert cache.obtain(stop) is not None
    harness.events.clear()

    def idle_s() -> float:
        is_building = harness.builds() == 2 and "build_put_off" not in harness.events
        return 0.1 if is_building else 100.0

    assert cache.rebuild(stop, idle_s) is not None
    assert harness.events == [
        *("build_started", "build_put_off"),
        *("build_started", "build_succeeded", "hit"),
    ]


@pytest.mark.parametrize("behaviour", ["broken", "differs", "killed"])
def test_a_second_build_that_fails_leaves_the_first_engine(
    harness: Harness, stop: threading.Event, behaviour: str
) -> None:
    behaviours = iter(["good", behaviour])
    cache = harness.cache(lambda: next(behaviours), lull_s=5, look_s=0.02)
    assert cache.obtain(stop) is not None
    assert cache.rebuild(stop, lambda: 100.0) is None
    assert harness.events[-1] == "build_failed"
    assert harness.cache().load() is not None
    assert not list(cache.engine.parent.glob(".*"))


@pytest.mark.parametrize(("cores", "spin"), [(2, False), (16, True)])
def test_waiting_for_the_gpu_spins_where_cores_are_plenty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, spin: bool
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    monkeypatch.setattr(engine_cache, "current_gpu", lambda: Gpu("a GPU", "8.9", 24 << 30, 58))
    monkeypatch.setattr(tensorrt_api, "MODULES", ("tensorrt_rtx_bindings",))
    opened: list[bool] = []

    def backend(engine: Path, *, spin: bool) -> Backend:
        opened.append(spin)
        return EngineStub(engine)

    monkeypatch.setattr(engine_cache, "TensorRtBackend", backend)
    cache = open_engine_cache(tmp_path, MODEL, "fp16", lambda _: None, cores=cores)
    # Private, for `load` tries the engine first, in a process that has to have a GPU.
    cache._load(cache.engine)
    assert opened == [spin]


def test_a_build_that_hangs_is_ended(harness: Harness, stop: threading.Event) -> None:
    # A good one may take that long too, on a busy machine, and is begun again.
    behaviours = itertools.chain(["hangs"], itertools.repeat("good"))
    cache = harness.cache(lambda: next(behaviours), build_timeout_s=2)
    assert cache.obtain(stop) is not None
    assert harness.events[:2] == ["build_started", "build_failed"]


def test_a_server_that_stops_takes_its_builder_along(
    harness: Harness, stop: threading.Event
) -> None:
    cache = harness.cache("hangs")
    found: list[Backend | None] = []
    thread = threading.Thread(target=lambda: found.append(cache.obtain(stop)))
    thread.start()
    until(lambda: harness.builds() == 1)
    builder = int(harness.journal.read_text().split()[1])
    stop.set()
    thread.join(600)

    assert found == [None]
    with pytest.raises(ProcessLookupError):
        os.kill(builder, 0)


def test_an_engine_that_does_not_load_is_loaded_again_not_built_again(
    harness: Harness, stop: threading.Event
) -> None:
    refusals = iter([True, True, False])

    def load(engine: Path) -> Backend:
        if next(refusals):
            raise BackendError("out of GPU memory: 2 contexts need 0.62 GB")
        return EngineStub(engine)

    cache = harness.cache(load=load)
    assert cache.obtain(stop) is not None
    assert harness.events.count("load_failed") == 2
    assert harness.builds() == 1


def test_a_folder_that_cannot_be_written_is_said(
    harness: Harness, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    (harness.folder / "engines").write_text("a file is in the way")

    def on_event(event: EngineEvent) -> None:
        harness.events.append(event)
        if event == "build_failed":
            stop.set()

    cache = harness.cache(on_event=on_event)
    assert cache.load() is None
    assert cache.obtain(stop) is None
    assert harness.events[:2] == ["miss", "build_failed"]
    assert "engines: File exists" in caplog.text
    assert harness.builds() == 0


@pytest.mark.slow
def test_the_real_builder_as_the_server_starts_it_asks_for_the_gpu_before_it_builds(
    tmp_path: Path,
    stop: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    if has_gpu():
        pytest.skip("there is a GPU: test_gpu.py goes on to the end")
    gpu = Gpu("a GPU that will be gone", "8.9", 24 << 30, 58)
    monkeypatch.setattr(engine_cache, "current_gpu", lambda: gpu)
    events: list[EngineEvent] = []

    def on_event(event: EngineEvent) -> None:
        events.append(event)
        if event == "build_failed":
            stop.set()

    cache = open_engine_cache(tmp_path, MODEL, "fp16", on_event)
    assert cache.load() is None
    assert cache.obtain(stop) is None

    assert events == ["miss", "build_started", "build_failed"]
    assert "error: no NVIDIA driver" in caplog.text
    assert not cache.engine.exists(), "a build that cannot pass the gate is not begun"
    assert cache.load() is None


def test_a_cache_without_gpu_or_tensorrt_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpu() -> Gpu:
        raise NoGpuError("no NVIDIA GPU is visible to this process")

    monkeypatch.setattr(engine_cache, "current_gpu", no_gpu)
    with pytest.raises(BackendError, match="TensorRT cannot be used: no NVIDIA GPU is visible"):
        open_engine_cache(tmp_path, MODEL, "fp16", lambda _: None)

    monkeypatch.setattr(engine_cache, "current_gpu", lambda: Gpu("a GPU", "9.0", 1 << 30, 132))
    monkeypatch.setattr(tensorrt_api, "MODULES", ("no_such_tensorrt",))
    with pytest.raises(BackendError, match="no usable TensorRT: install one of those in req"):
        open_engine_cache(tmp_path, MODEL, "fp16", lambda _: None)


@pytest.mark.parametrize(
    ("capability", "target"), [("8.9", []), ("8.0", ["--compute-capability", "8.0"]), ("9.0", None)]
)
def test_rtx_builds_for_the_card_alone_where_portable_engines_do_not_run_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str, target: list[str] | None
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    gpu = Gpu("a GPU", capability, 24 << 30, 58)
    monkeypatch.setattr(engine_cache, "current_gpu", lambda: gpu)
    monkeypatch.setattr(tensorrt_api, "MODULES", ("tensorrt_rtx_bindings",))
    if target is None:
        with pytest.raises(BackendError, match=r"does not run on a GPU.*only on 7\.5, 8\.0, 8\.6"):
            open_engine_cache(tmp_path, MODEL, "fp16", lambda _: None)
        return
    commands: list[Sequence[str]] = []

    def remember(command: Sequence[str], **_: object) -> None:
        commands.append(command)
        raise OSError(0, "not now")

    monkeypatch.setattr("subprocess.Popen", remember)
    stop = threading.Event()
    cache = open_engine_cache(
        tmp_path, MODEL, "fp16", lambda event: stop.set() if event == "build_failed" else None
    )
    assert cache.obtain(stop) is None
    (command,) = commands
    assert command[-1] == "--beside-serving"
    assert list(command[-3:-1]) == target or (not target and "--compute-capability" not in command)


class Lean:
    """A machine with TensorRT's lean runtime, and a folder of engines that were built elsewhere."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.events: list[EngineEvent] = []
        lean = tensorrt_api.TensorRT(surface.module("tensorrt-lean-11.4"))
        gpu = Gpu("NVIDIA H100 80GB HBM3", "9.0", 80 << 30, 132)
        monkeypatch.setattr(engine_cache, "current_gpu", lambda: gpu)
        monkeypatch.setattr(engine_cache, "find_tensorrt", lambda: lean)
        monkeypatch.setattr(engine_cache, "TensorRtBackend", lambda engine, **_: EngineStub(engine))
        monkeypatch.setattr("subprocess.run", self._try)
        self.trial_says: tuple[int, bytes] = (0, b"")

    def _try(self, command: Sequence[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, *self.trial_says)

    def add(self, name: str, *, version_compatible: bool = True, **changes: Any) -> Path:
        key = dataclasses.replace(KEY, **{"onnx_sha256": file_sha256(MODEL), **changes})
        portable = key.compute_capability.endswith("+")
        engine = self.folder / name
        engine.write_bytes(CONTENT)
        dataclasses.replace(
            plan_info(key), version_compatible=version_compatible, hardware_compatible=portable
        ).write(engine)
        return engine

    def open(self) -> EngineCache:
        return open_engine_cache(self.folder, MODEL, "fp16", self.events.append)


@pytest.fixture
def lean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lean:
    return Lean(tmp_path, monkeypatch)


def test_a_lean_runtime_serves_what_was_built_elsewhere(lean: Lean) -> None:
    lean.add("a.engine", compute_capability="8.0+", device="any")
    mine = lean.add("b.engine")
    lean.add("c.engine", compute_capability="8.9", device="NVIDIA L4, 58 multiprocessors")
    lean.add("d.engine", precision="bf16")
    lean.add("e.engine", version_compatible=False)
    backend = lean.open().load()
    assert isinstance(backend, EngineStub)
    assert backend.engine == mine, "an engine for this very card is faster than a portable one"
    mine.unlink()
    backend = lean.open().load()
    assert isinstance(backend, EngineStub)
    assert backend.engine.name == "a.engine"
    assert lean.events == ["hit", "hit"]
    assert not list(lean.folder.glob("*.lock")), "such a folder may be one that cannot be written"


def test_a_lean_runtime_without_an_engine_says_what_is_wrong_with_each(
    lean: Lean, caplog: pytest.LogCaptureFixture
) -> None:
    lean.add("a.engine", version_compatible=False)
    lean.add("b.engine", compute_capability="8.9", device="any")
    lean.add("c.engine", precision="bf16")
    lean.add("d.engine", onnx_sha256="1" * 64)
    (lean.folder / "e.engine").write_bytes(CONTENT)
    with pytest.raises(BackendError, match=r"has no engine that tensorrt_lean 11\.4\.0\.106 can"):
        lean.open()
    for reason in (
        "a.engine: the engine was built by tensorrt 11.4.0, .* build it with --version-compatible",
        "b.engine: the engine was built for compute capability 8.9, NVIDIA H100 80GB HBM3 has 9.0",
        "c.engine: it is bf16, not fp16",
        "d.engine: it is of another network",
        "e.engine: .*e.engine.json is missing",
    ):
        assert re.search(reason, caplog.text), reason
    assert lean.events == ["miss"]


def test_a_lean_runtime_keeps_an_engine_that_it_cannot_build_again(
    lean: Lean, stop: threading.Event
) -> None:
    engine = lean.add("a.engine")
    lean.trial_says = (-signal.SIGSEGV, b"")
    cache = lean.open()
    assert cache.load() is None
    assert lean.events == ["damaged"]
    assert engine.exists()
    lean.trial_says = (1, b"out of GPU memory")
    assert cache.load() is None
    assert lean.events[1:] == ["load_failed"]
    lean.trial_says = (0, b"")
    assert cache.obtain(stop) is not None, "memory that others held is free again"
    assert lean.events[2:] == ["hit", "serving"]
