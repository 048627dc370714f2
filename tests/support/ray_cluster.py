"""A Ray cluster of two nodes on this machine with the service on it, for tests and measurements."""

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.schema import ServeDeploySchema

from tests.support import ROOT
from tests.support.launch import free_port
from tests.support.waiting import until

__all__ = ["GATEWAY", "PROXY", "SEGMENTER", "RayService", "ray_service"]

_CONFIG = ROOT / "docker/ray/serve.yaml"

# Each node has this memory for what travels.
_NODE: dict[str, Any] = {"object_store_memory": 128 * 2**20}

# Ray's workers have this process name.
SEGMENTER = "ray::ServeReplica:slsnet:Segmenter"
GATEWAY = "ray::ServeReplica:slsnet:Gateway"
PROXY = "ray::ProxyActor"


@dataclass(frozen=True)
class RayService:
    """The service on the cluster."""

    address: str
    """Address of the cluster."""
    url: str
    """URL of the service, without a slash at the end."""
    _config: dict[str, Any]
    _cluster: Cluster

    def deploy(self, replicas: int, **autoscaling: float) -> None:
        """Deploy so many replicas, with all else as shipped. Replicas that are removed finish
        their requests.

        Args:
            replicas: number of replicas at the start.
            autoscaling: settings that differ from the shipped ones, such as `max_replicas=2`.
        """
        config = copy.deepcopy(self._config)
        deployments = {each["name"]: each for each in config["applications"][0]["deployments"]}
        scaling = {"min_replicas": replicas, "max_replicas": replicas, **autoscaling}
        deployments["Segmenter"]["autoscaling_config"] |= scaling
        client = serve.context._get_global_client()
        assert client is not None
        # Blocking, it would wait for a minute at most, however busy the machine is.
        client.deploy_apps(ServeDeploySchema(**config), _blocking=False)
        until(self._is_running)
        until(lambda: len(self.processes(SEGMENTER)) == replicas)

    def _is_running(self) -> bool:
        (name,) = (each["name"] for each in self._config["applications"])
        application = serve.status().applications.get(name)
        return application is not None and application.status == "RUNNING"

    @contextlib.contextmanager
    def another_node(self, **resources: Any) -> Iterator[psutil.Process]:
        """Add a node for the block; yield the process that its workers are children of."""
        node = self._cluster.add_node(**_NODE, **resources)
        try:
            yield psutil.Process(node.all_processes["raylet"][0].process.pid)
        finally:
            self._cluster.remove_node(node)

    def processes(self, kind: str = "") -> list[psutil.Process]:
        """Processes of this cluster, and of no other, whose name starts with `kind`."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(kind):
                    found.append(process)
        return found


@contextlib.contextmanager
def ray_service(cpus: int = 4) -> Iterator[RayService]:
    """Start two nodes, and two replicas in the shipped configuration.

    Args:
        cpus: what each node has, whatever the machine has.
    """
    environment = {
        # Ray would let everything else on the machine go first.
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_automatic_object_spilling_enabled": "0",
        "PYTHONPATH": str(ROOT),
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    node = {**_NODE, "num_cpus": cpus}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        ray.init(cluster.address, log_to_driver=False)
        config = yaml.safe_load(_CONFIG.read_text())
        # There is one proxy, because both nodes share this machine and its port.
        config["proxy_location"] = "HeadOnly"
        config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
        serve.start(http_options=config["http_options"], proxy_location="HeadOnly")
        url = f"http://127.0.0.1:{config['http_options']['port']}"
        service = RayService(cluster.address, url, config, cluster)
        service.deploy(replicas=2)
        yield service
        serve.shutdown()  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
