"""Stands in for the engine builder: same files, same exit codes, and the ways to fail.

Run as `python fake_builder.py ENGINE JOURNAL BEHAVIOUR [--beside-serving]`. The journal gets a
line when a build starts and one when it ends. A build that is "held" goes on once there is a file
`go` beside the journal.
"""

import hashlib
import os
import resource
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from common.files import replacing, write_atomically
from engines.plan import Layer, PlanInfo, PlanKey

KEY = PlanKey(
    "0" * 64,
    "tensorrt 11.4.0",
    "9.0",
    "NVIDIA H100 80GB HBM3, 132 multiprocessors",
    "fp16",
    (1, 2, 4),
)
CONTENT = b"an engine " * 10_000


def plan_info(key: PlanKey = KEY, *, failures: tuple[str, ...] | None = ()) -> PlanInfo:
    """The sidecar of an engine that holds CONTENT; `failures` None has not been to the gate."""
    return PlanInfo(
        key=key,
        gpu="a GPU",
        attention="fused",
        hardware_compatible=False,
        version_compatible=False,
        build_seconds=1.0,
        engine_sha256=hashlib.sha256(CONTENT).hexdigest(),
        engine_bytes=len(CONTENT),
        scratch_bytes={bucket: 1000 * bucket for bucket in key.buckets},
        layers=(Layer("conv", "correlation", ("fp16",), ("fp16",), ("node_conv",)),),
        layers_from="inspector",
        model={"name": "slsnet"},
        parity=None if failures is None else {"failures": list(failures)},
    )


def main() -> int:
    engine, journal, behaviour = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    with journal.open("a") as file:
        file.write(f"start {os.getpid()}\n")
    if behaviour == "broken":
        print("error: asked for fp16, but the engine differs: conv_1 reads fp32")
        return 1
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "hangs":
        time.sleep(600)
    if behaviour == "held":
        give_up = time.perf_counter() + 600
        while not journal.with_name("go").exists() and time.perf_counter() < give_up:
            time.sleep(0.02)
    if behaviour == "dies half-way":
        with replacing(engine) as temporary:
            temporary.write_bytes(CONTENT[:1000])
            os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "disk full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    try:
        write_atomically(engine, CONTENT)
        failures = ("mean mask IoU 0.9 < 0.995",) if behaviour == "differs" else ()
        beside_serving = "--beside-serving" in sys.argv
        replace(plan_info(failures=failures), beside_serving=beside_serving).write(engine)
    except OSError as error:
        print(f"error: {error.filename or engine}: {error.strerror}")
        return 1
    with journal.open("a") as file:
        file.write(f"end {os.getpid()}\n")
    return 3 if behaviour == "differs" else 0


if __name__ == "__main__":
    sys.exit(main())
