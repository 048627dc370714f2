"""The comparison of gRPC with HTTP: both are asked, and a row has their ratios."""

import pytest

from tests.support.launch import free_port, serve

rpc = pytest.importorskip("benchmarks.rpc", reason="tritonclient[grpc] is not installed")


def test_both_ways_are_measured() -> None:
    port = free_port()
    command = ("-m", "benchmarks.peers.slsnet")
    stub = {"PEER_NETWORK": "stub:0"}
    with serve("--grpc-port", str(port), command=command, environment=stub) as server:
        row = rpc.compare(server, port, rpc.Load(2, 40, 2), turns=2)
    clients, images, *figures = [cell.strip(" *") for cell in row.strip("|").split("|")]
    assert (clients, images, len(figures)) == ("2", "2", 9)
    assert all(float(figure) >= 0 for figure in figures)
