"""Engines that are built, and mended where damaged, while another backend serves.

An engine file's name holds its key (ONNX file, TensorRT version, GPU, precision, buckets). So an
engine that does not fit is never found. A missing or damaged one is built in a process of its own,
under a lock that the builder holds too. Two servers never build the same engine, even where the
server that began the build is gone. After each failed build, the pause before the next doubles.

TensorRT chooses kernels by their times, which mean little on a GPU that serves meanwhile. So an
engine that was built beside serving is marked, and built again once no photo has come for a while.
"""

import contextlib
import fcntl
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import engines
from engines.device import Gpu, NoGpuError, current_gpu
from engines.plan import (
    BUCKETS,
    PlanError,
    PlanInfo,
    PlanKey,
    Precision,
    file_sha256,
    read_engine,
    read_plan_info,
    sidecar_path,
)
from engines.runtime import SLOTS, check_fits
from engines.tensorrt_api import (
    RTX_PORTABLE,
    TensorRT,
    TensorRTError,
    find_tensorrt,
    plan_key,
)
from server.backends import Backend, BackendError
from server.backends.tensorrt import TensorRtBackend

__all__ = ["CORES_TO_SPIN", "ENGINE_EVENTS", "EngineCache", "EngineEvent", "open_engine_cache"]

log = logging.getLogger("slsnet.engine")

# Where the builder's and the trial's modules are found.
_ROOT = Path(engines.__file__).parent.parent

EngineEvent = Literal[
    "hit",
    "miss",
    "damaged",
    "build_waiting",
    "build_started",
    "build_succeeded",
    "build_failed",
    "build_put_off",
    "gate_failed",
    "load_failed",
    "serving",
    "lost",
]
"""Events. Each is one log line, and one count of the metric."""

ENGINE_EVENTS: tuple[EngineEvent, ...] = get_args(EngineEvent)

_STOPPING = "the server stops"
_POLL_S = 0.2
_TERMINATION_S = 5
_TRIAL_S = 300

# Spinning threads get the GPU's answer sooner, but each slot's takes a core. They spin only where
# that leaves three quarters of the cores; with fewer, decoding would lack the time.
CORES_TO_SPIN = 4 * SLOTS


class EngineCache:
    """The engine of one key, in a folder that servers on one machine may share.

    Args:
        folder: folder of the engine; made if it is missing.
        key: what the engine must have been built for.
        command: gives the builder's command line for the engine's path; None where engines are
            built elsewhere, and only loaded here.
        load: opens the engine; raises BackendError.
        trial: gives the command line that loads the engine at a path and runs it once.
        on_event: called with every event; it counts them.
        engine: path of the engine file, if its name does not hold the key.
        first_pause_s: pause after the first failed build; it doubles after each further one.
        longest_pause_s: the longest such pause.
        build_timeout_s: a build that takes longer is ended and counts as failed.
        lull_s: seconds without a photo after which an engine built beside serving is built again.
        look_s: seconds between two looks for such a lull.
    """

    def __init__(
        self,
        folder: Path,
        key: PlanKey,
        *,
        command: Callable[[Path], Sequence[str]] | None,
        load: Callable[[Path], Backend],
        trial: Callable[[Path], Sequence[str]],
        on_event: Callable[[EngineEvent], None] = lambda _: None,
        engine: Path | None = None,
        first_pause_s: float = 30,
        longest_pause_s: float = 3600,
        build_timeout_s: float = 3600,
        lull_s: float = 600,
        look_s: float = 1,
    ) -> None:
        self.engine = engine or folder / f"slsnet-{key.precision}-{key.digest()}.engine"
        self._key = key
        self._command = command
        self._load = load
        self._trial = trial
        self._on_event = on_event
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self._build_timeout_s = build_timeout_s
        self._lull_s = lull_s
        self._look_s = look_s

    def load(self) -> Backend | None:
        """Load the engine, if there is one that fits, is whole and has passed the gate.

        A process of its own tries the engine first: one that crashes in the driver, or costs the
        process its GPU, would do so to the server at every start. Such an engine is removed, if it
        can be built again.
        """
        return self._open(tried=False)

    def _open(self, *, tried: bool) -> Backend | None:
        try:
            info = self._checked()
        except FileNotFoundError:
            self._say("miss", f"no engine for {self._key.precision} on this GPU yet")
            return None
        except PlanError as error:
            self._say("damaged", str(error))
            return None
        if _gate_failures(info):
            self._say(
                "gate_failed",
                f"{self.engine} is not served, its masks differ: {_gate_failures(info)}",
            )
            return None
        try:
            if not tried:
                self._try()
            backend = self._load(self.engine)
        except PlanError as error:
            if self._command is not None:
                self.engine.unlink(missing_ok=True)
            self._say("damaged", str(error))
            return None
        except BackendError as error:
            self._say("load_failed", str(error))
            return None
        self._say("hit", f"{self.engine}")
        return backend

    def obtain(self, stop: threading.Event) -> Backend | None:
        """Build until an engine exists that may be served, and load it. This blocks for minutes.

        If engines are built elsewhere, try to load the present one until that works.

        Returns:
            The backend; None once `stop` is set, or if the engine fails the parity gate, which it
            would fail again after another build.
        """
        pause_s = self._first_pause_s
        while not stop.is_set():
            command = self._command
            if command is None or self._build(command, stop):
                # The builder's own process has tried the engine in the gate.
                backend = self._open(tried=command is not None)
                if backend is not None:
                    self._say("serving", f"{self.engine} takes over")
                    return backend
                if self._failed_gate():
                    return None
            if stop.is_set():
                return None
            log.info("next try at the TensorRT engine in %g s", pause_s)
            stop.wait(pause_s)
            pause_s = min(2 * pause_s, self._longest_pause_s)
        return None

    def rebuild(self, stop: threading.Event, idle_s: Callable[[], float]) -> Backend | None:
        """At the next lull, build the engine again if it was built beside serving. Blocks.

        A photo that comes meanwhile ends the build. It begins anew at the next lull.

        Args:
            stop: ends the wait, and the build.
            idle_s: gives the seconds since this process last ran a photo.

        Returns:
            The new engine, whichever server built it. None if no new one is needed, `stop` is set,
            or the build fails, since the engine in use is good.
        """
        command = self._command
        if command is None or not self._was_built_beside_serving():
            return None
        while self._was_built_beside_serving():
            if stop.wait(self._look_s):
                return None
            if self._idle_s(idle_s) >= self._lull_s:
                try:
                    if not self._build_again(command, stop, idle_s):
                        return None
                except OSError as error:
                    self._say("build_failed", f"{self.engine.parent}: {error.strerror}")
                    return None
        return self._open(tried=True)

    def _was_built_beside_serving(self) -> bool:
        try:
            return read_plan_info(self.engine).beside_serving
        except PlanError:
            return False

    def _idle_s(self, idle_s: Callable[[], float]) -> float:
        """Seconds without a photo on all servers that use the folder, by the time of a file."""
        used = self.engine.with_name(self.engine.name + ".used")
        mine = idle_s()
        if mine < 2 * self._look_s:
            used.touch()
        try:
            return min(mine, time.time() - used.stat().st_mtime)
        except FileNotFoundError:
            return mine

    def _build_again(
        self,
        command: Callable[[Path], Sequence[str]],
        stop: threading.Event,
        idle_s: Callable[[], float],
    ) -> bool:
        """Build once more; return whether to go on, which is false after a failure."""
        with self._lock(stop) as lock:
            if lock is None or not self._was_built_beside_serving():
                return True
            self._remove_leftovers()
            # The present engine stays until the new one has passed the gate.
            anew = self.engine.with_name(f".{self.engine.name}.anew")
            started = time.monotonic()

            def interrupted() -> str | None:
                if stop.is_set():
                    return _STOPPING
                is_idle = self._idle_s(idle_s) > time.monotonic() - started
                return None if is_idle else "a photo came"

            built = self._run_builder(command(anew), lock, interrupted)
            if built == "build_succeeded":
                anew.replace(self.engine)
                sidecar_path(anew).replace(sidecar_path(self.engine))
            self._remove_leftovers()
            return built in ("build_succeeded", "build_put_off")

    def _checked(self) -> PlanInfo:
        if not self.engine.exists():
            raise FileNotFoundError(self.engine)
        info = read_plan_info(self.engine)
        if differences := info.key.differences(self._key):
            raise PlanError(f"{self.engine} is another engine: {'; '.join(differences)}")
        if info.parity is None:
            raise PlanError(f"{self.engine} has not been through the parity gate")
        read_engine(self.engine, info)
        return info

    def _try(self) -> None:
        """Try the engine. Raises PlanError if its process was killed, BackendError if it fails."""
        try:
            trial = subprocess.run(
                self._trial(self.engine),
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_TRIAL_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BackendError(f"{self.engine} could not be tried: {error}") from error
        if trial.returncode < 0:
            raise PlanError(f"{self.engine} kills who loads it, by signal {-trial.returncode}")
        if trial.returncode:
            raise BackendError("".join(_last_lines(trial.stdout, 1)) or f"exit {trial.returncode}")

    def _failed_gate(self) -> bool:
        try:
            return bool(_gate_failures(self._checked()))
        except (OSError, PlanError):
            return False

    def _build(self, command: Callable[[Path], Sequence[str]], stop: threading.Event) -> bool:
        """Build; return whether an engine exists now. Another server may have built it."""
        try:
            self.engine.parent.mkdir(parents=True, exist_ok=True)
            with self._lock(stop) as lock:
                if lock is None:
                    return False
                with contextlib.suppress(OSError, PlanError):
                    self._checked()
                    return True
                self._remove_leftovers()
                built = self._run_builder(
                    [*command(self.engine), "--beside-serving"],
                    lock,
                    lambda: _STOPPING if stop.is_set() else None,
                )
                return built in ("build_succeeded", "gate_failed")
        except OSError as error:
            self._say("build_failed", f"{self.engine.parent}: {error.strerror}")
            return False

    @contextlib.contextmanager
    def _lock(self, stop: threading.Event) -> Iterator[int | None]:
        """Take the engine's lock, and yield its file descriptor; None if `stop` came first."""
        path = self.engine.with_name(self.engine.name + ".lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        waiting = False
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not waiting:
                        self._say("build_waiting", "another server is building this engine")
                        waiting = True
                if stop.wait(_POLL_S):
                    yield None
                    return
            yield descriptor
        finally:
            # This releases the lock, unless a builder that outlived its server still holds it.
            os.close(descriptor)

    def _remove_leftovers(self) -> None:
        for path in self.engine.parent.glob(f".{self.engine.name}*"):
            path.unlink(missing_ok=True)

    def _run_builder(
        self, command: Sequence[str], lock: int, interrupted: Callable[[], str | None]
    ) -> EngineEvent:
        """Run the builder and return the result; `interrupted` gives a reason to end it."""
        self._say("build_started", f"{self.engine}, in a process of its own")
        with tempfile.TemporaryFile() as output:
            builder = subprocess.Popen(
                command,
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # The builder holds the lock too, since it outlives a server that is killed.
                pass_fds=[lock],
            )
            event, reason = self._wait(builder, interrupted)
            output.seek(0)
            last_lines = _last_lines(output.read(), 3)
        if builder.returncode == 0:
            self._say("build_succeeded", last_lines[-1] if last_lines else str(self.engine))
            return "build_succeeded"
        if reason is None and self._failed_gate():
            return "gate_failed"  # `load` reports it
        if reason is None:
            code = builder.returncode
            reason = f"the builder was killed by signal {-code}" if code < 0 else f"exit {code}"
        self._say(event, "; ".join([reason, *last_lines]))
        return event

    def _wait(
        self, builder: subprocess.Popen[bytes], interrupted: Callable[[], str | None]
    ) -> tuple[EngineEvent, str | None]:
        """Wait for the builder; return the name of a failure, and why it was ended, or None."""
        deadline = time.monotonic() + self._build_timeout_s
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                builder.wait(_POLL_S)
                return "build_failed", None
            event: EngineEvent = "build_failed"
            if reason := interrupted():
                event = "build_put_off"
            elif time.monotonic() > deadline:
                reason = f"no engine within {self._build_timeout_s:g} s"
            else:
                continue
            builder.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                builder.wait(_TERMINATION_S)
                return event, reason
            builder.kill()
            builder.wait()
            return event, reason

    def _say(self, event: EngineEvent, text: str) -> None:
        fine = event in (
            "hit",
            "miss",
            "build_waiting",
            "build_started",
            "build_succeeded",
            "build_put_off",
            "serving",
        )
        log.log(logging.INFO if fine else logging.WARNING, "engine %s: %s", event, text)
        self._on_event(event)


def _last_lines(output: bytes, count: int) -> list[str]:
    return output.decode(errors="replace").strip().splitlines()[-count:]


def open_engine_cache(
    folder: Path,
    model: Path,
    precision: Precision,
    on_event: Callable[[EngineEvent], None],
    *,
    cores: int = 1,
) -> EngineCache:
    """Open the cache of engines of `model` for this process's GPU.

    TensorRT's lean runtime cannot build. It takes the best engine in the folder.

    Args:
        folder: folder of the engine files.
        model: path of the ONNX file.
        precision: precision of the engine.
        on_event: called with every event.
        cores: number of cores that this process may use.

    Raises:
        BackendError: TensorRT, driver, GPU or file is missing, or a lean runtime has no engine.
    """
    folder, model = folder.resolve(), model.resolve()
    try:
        gpu = current_gpu()
        trt = find_tensorrt()
        trt.check_runs_on(gpu)
        log.info("%s on %s, compute capability %s", trt.library, gpu.name, gpu.compute_capability)
        digest = file_sha256(model)
        engine, command = None, None
        if trt.is_lean:
            engine, key = _built_elsewhere(folder, digest, precision, trt, gpu)
        else:
            portable = not trt.is_rtx or gpu.compute_capability in RTX_PORTABLE
            target = None if portable else gpu.compute_capability
            key = plan_key(digest, precision, BUCKETS, trt, compute_capability=target)
            command = _builder(model, key, target)
    except PlanError as error:
        on_event("miss")
        log.warning("engine miss: %s", error)
        raise BackendError(f"TensorRT cannot be used: {error}") from error
    except (NoGpuError, TensorRTError) as error:
        raise BackendError(f"TensorRT cannot be used: {error}") from error
    except OSError as error:
        raise BackendError(f"{model} cannot be read: {error.strerror}") from error
    return EngineCache(
        folder,
        key,
        command=command,
        load=lambda engine: TensorRtBackend(engine, spin=cores >= CORES_TO_SPIN),
        trial=lambda engine: [sys.executable, "-m", "engines.runtime", str(engine)],
        on_event=on_event,
        engine=engine,
    )


def _builder(model: Path, key: PlanKey, target: str | None) -> Callable[[Path], list[str]]:
    """Give the builder's command line for a path; `target` is the only card to build for."""

    def command(engine: Path) -> list[str]:
        return [
            *("nice", "-n", "10", sys.executable, "-m", "trt_build"),
            *("--onnx", str(model), "--output", str(engine), "--parity"),
            *("--precision", key.precision, "--buckets", ",".join(map(str, key.buckets))),
            *(("--compute-capability", target) if target is not None else ()),
        ]

    return command


def _built_elsewhere(
    folder: Path, onnx_sha256: str, precision: Precision, trt: TensorRT, gpu: Gpu
) -> tuple[Path, PlanKey]:
    """Find the engine in `folder` that the lean runtime `trt` runs best on `gpu`, and its key.

    An engine for this very card goes before a portable one.

    Raises:
        PlanError: there is no such engine; the message says for each file why not.
    """
    fitting: list[tuple[Path, PlanInfo]] = []
    others: list[str] = []
    for engine in sorted(folder.glob("*.engine")):
        try:
            info = read_plan_info(engine)
            if info.key.onnx_sha256 != onnx_sha256:
                raise PlanError("it is of another network")
            if info.key.precision != precision:
                raise PlanError(f"it is {info.key.precision}, not {precision}")
            check_fits(info, trt, gpu)
        except PlanError as error:
            others.append(f"{engine.name}: {error}")
        else:
            fitting.append((engine, info))
    if not fitting:
        raise PlanError(
            f"{folder} has no engine that {trt.library} can run here"
            + (f" ({'; '.join(others)})" if others else "")
        )
    engine, info = min(fitting, key=lambda found: found[1].hardware_compatible)
    return engine, info.key


def _gate_failures(info: PlanInfo) -> str:
    failures = (info.parity or {}).get("failures", [])
    return "; ".join(map(str, failures))
