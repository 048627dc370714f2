"""V2 over gRPC beside V2 over HTTP: `python -m benchmarks.rpc`.

It starts one server with a network of 0 ms (`benchmarks.peers.slsnet`), which speaks both, and
sends the same tensors by NVIDIA's clients over the one and the other, in turn. For each load it
prints a Markdown row: p50 of a request, images a second, and CPU time of the server for an image.
Figures are medians over the turns; ratios are medians of the turns' own ratios, gRPC / HTTP.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

from benchmarks.latency import machine
from benchmarks.turns import compared
from common.program import Help
from tests.support.launch import ServerProcess, free_port, serve


@dataclass(frozen=True)
class Load:
    """What is sent in a turn, by each of two ways."""

    clients: int
    requests: int
    """Of each client."""
    images: int
    """In a request."""


LOADS = (Load(1, 100, 1), Load(8, 25, 1), Load(1, 10, 32))


def compare(server: ServerProcess, grpc_port: int, load: Load, turns: int) -> str:
    """Send a load over HTTP and gRPC in turn, once more than `turns`, and make a row of the table.

    Args:
        server: speaks HTTP on its port.
        grpc_port: its port for gRPC.
        load: what is sent.
        turns: number of turns that the medians are of; the first one only warms up.
    """
    cells = compared(
        partial(_measure, server, tritonclient.http, server.port, load),
        partial(_measure, server, tritonclient.grpc, grpc_port, load),
        turns,
    )
    return f"| {load.clients} | {load.images} | {' | '.join(cells)} |"


def _measure(
    server: ServerProcess, library: Any, port: int, load: Load
) -> tuple[float, float, float]:
    """p50 of a request in ms, images a second, and ms of CPU time an image."""
    image = library.InferInput("image", [load.images, 128, 128, 3], "UINT8")
    image.set_data_from_numpy(np.full((load.images, 128, 128, 3), 90, np.uint8))

    def send(_: int) -> list[float]:
        with library.InferenceServerClient(f"127.0.0.1:{port}") as client:
            return [_seconds(lambda: client.infer("slsnet", [image])) for _ in range(load.requests)]

    cpu_s, started = server.cpu_s(), time.perf_counter()
    with ThreadPoolExecutor(load.clients) as threads:
        taken = [one for series in threads.map(send, range(load.clients)) for one in series]
    seconds, cpu_s = time.perf_counter() - started, server.cpu_s() - cpu_s
    images = len(taken) * load.images
    return statistics.median(taken) * 1000, images / seconds, cpu_s / images * 1000


def _seconds(ask: Callable[[], object]) -> float:
    started = time.perf_counter()
    ask()
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rpc", description=__doc__, formatter_class=Help
    )
    parser.add_argument(
        "--turns", type=int, default=9, help="turns that are measured, of each load"
    )
    options = parser.parse_args(arguments)
    port = free_port()
    command = ("-m", "benchmarks.peers.slsnet")
    with serve(
        "--grpc-port", str(port), command=command, environment={"PEER_NETWORK": "stub:0"}
    ) as server:
        print(f"Machine: {machine()}. Medians of {options.turns} turns.\n")
        columns = ("p50, ms", "images/s", "CPU, ms an image")
        heads = " | ".join(f"{column}: HTTP | gRPC | ratio" for column in columns)
        print(f"| clients | images in a request | {heads} |\n|--:" + "|--:" * 10 + "|")
        for load in LOADS:
            print(compare(server, port, load, options.turns), flush=True)


if __name__ == "__main__":
    main()
