"""Manifests render, fit Kubernetes' schemas, and name what the server has."""

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.observe.metrics import Metrics
from server.settings import Settings, settings_table
from tests.support import ROOT
from tests.support.launch import ServerProcess

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="needs kubernetes-validate (docker/requirements-tools.txt)"
)

FOLDER = ROOT / "docker/kubernetes"
KUBECTL = shutil.which("kubectl", path=Path(sys.executable).parent) or shutil.which("kubectl")
SETTINGS = {variable for _, variable, _, _ in settings_table()}

_LOCKED_UP = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
# Of the Prometheus operator, whose schemas are no part of Kubernetes.
_OPERATOR = {"PrometheusRule", "ServiceMonitor"}

Manifests = dict[str, dict[str, Any]]
"""By kind."""


@functools.cache
def _rendered(folder: Path) -> Manifests:
    assert KUBECTL is not None
    result = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    documents = list(yaml.safe_load_all(result.stdout))
    manifests = {document["kind"]: document for document in documents}
    assert len(manifests) == len(documents)
    return manifests


needs_kubectl = pytest.mark.skipif(
    KUBECTL is None, reason="needs kubectl (docker/requirements-tools.txt)"
)


@pytest.fixture(params=["cpu", "gpu"])
def manifests(request: pytest.FixtureRequest) -> Manifests:
    if KUBECTL is None:
        pytest.skip("needs kubectl (docker/requirements-tools.txt)")
    return _rendered(FOLDER / "overlays" / request.param)


def _validate(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def _settings(container: dict[str, Any]) -> dict[str, str]:
    """Settings of the container; the ones that are its share of the CPU in whole cores."""
    requests = container["resources"]["requests"]
    return {
        item["name"]: item["value"] if "value" in item else requests["cpu"]
        for item in container["env"]
    }


def _check_container(container: dict[str, Any], grace_s: float, server: ServerProcess) -> Settings:
    """Its settings exist, a drain fits into `grace_s`, and `server` answers to the probes."""
    environment = _settings(container)
    assert environment.keys() <= SETTINGS
    settings = Settings.model_validate(
        {name.removeprefix("SLSNET_").lower(): value for name, value in environment.items()}
    )
    assert grace_s > settings.drain_grace_s + settings.drain_timeout_s
    assert container["securityContext"].items() >= _LOCKED_UP.items()
    for probe, path in (("startup", "ready"), ("readiness", "ready"), ("liveness", "live")):
        asked = container[f"{probe}Probe"]["httpGet"]["path"]
        assert asked.endswith(f"/health/{path}")
        assert httpx.get(server.url + asked).status_code == 200
    return settings


def test_manifests_fit_the_schemas(manifests: Manifests) -> None:
    assert manifests.keys() >= _OPERATOR
    for kind in manifests.keys() - _OPERATOR:
        _validate(manifests[kind])


def test_the_schemas_tell_a_mistake(manifests: Manifests) -> None:
    broken = {**manifests["Service"], "spec": {"port": [{"port": 80}]}}
    with pytest.raises(kubernetes_validate.ValidationError):
        _validate(broken)


def test_the_pod_is_what_the_server_needs(manifests: Manifests, server: ServerProcess) -> None:
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    _check_container(container, pod["terminationGracePeriodSeconds"], server)
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    # A service of the name slsnet would set SLSNET_PORT to an address.
    assert pod["enableServiceLinks"] is False
    assert manifests["Namespace"]["metadata"]["labels"] == {
        "pod-security.kubernetes.io/enforce": "restricted"
    }
    assert re.search(r":\d+\.\d+\.\d+", container["image"])


def test_selectors_find_the_pods(manifests: Manifests) -> None:
    template = manifests["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    selectors = [
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    service = manifests["Service"]
    monitor = manifests["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    # Alerts and dashboard select job="slsnet", which the operator takes from the service's name.
    assert service["metadata"]["name"] == "slsnet"
    ports = {port["name"]: port["targetPort"] for port in service["spec"]["ports"]}
    (container,) = template["spec"]["containers"]
    named = {port["name"] for port in container["ports"]}
    assert set(ports.values()) <= named
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in ports


def test_the_autoscaler_goes_by_metrics_that_exist(manifests: Manifests) -> None:
    scaler = manifests["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == manifests["Deployment"]["metadata"]["name"]
    assert "replicas" not in manifests["Deployment"]["spec"]
    metrics = {item["type"]: item for item in scaler["metrics"]}
    assert metrics["Resource"]["resource"]["name"] == "cpu"
    name = metrics["Pods"]["pods"]["metric"]["name"]
    adapter = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())
    exposed = {family.name for family in Metrics().registry.collect()}
    offered = {rule["seriesQuery"].split("{")[0] for rule in adapter["rules"]["custom"]}
    assert name in offered
    assert offered <= exposed


@needs_kubectl
@pytest.mark.parametrize(
    "components",
    [
        chosen
        for count in range(5)
        for chosen in itertools.combinations(["monitoring", "api-keys", "tls", "grpc"], count)
    ],
    ids="+".join,
)
def test_components_go_together(
    components: tuple[str, ...], tmp_path: Path, server: ServerProcess
) -> None:
    # Kustomize takes paths that are relative alone.
    here = os.path.relpath(FOLDER.resolve(), tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "resources": [f"{here}/base"],
                "components": [f"{here}/components/{name}" for name in components],
            }
        )
    )
    manifests = _rendered(tmp_path)
    for kind in manifests.keys() - _OPERATOR:
        _validate(manifests[kind])
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = _check_container(container, pod["terminationGracePeriodSeconds"], server)
    mounted = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
    for path in (settings.api_keys_file, settings.tls_cert, settings.tls_key):
        assert path is None or str(path.parent) in mounted
    assert (settings.api_keys_file is not None) == ("api-keys" in components)
    scheme = container["readinessProbe"]["httpGet"].get("scheme", "HTTP")
    assert scheme == ("HTTPS" if "tls" in components else "HTTP")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    named = {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]}
    assert named == ports.keys()
    (allowed,) = manifests["NetworkPolicy"]["spec"]["ingress"]
    assert {port["port"] for port in allowed["ports"]} == ports.keys()
    assert settings.grpc_port == ports.get("grpc")
    assert (settings.grpc_port is not None) == ("grpc" in components)
    if "monitoring" in components:
        (endpoint,) = manifests["ServiceMonitor"]["spec"]["endpoints"]
        assert endpoint.get("scheme", "http") == scheme.lower()


def test_kserve_runs_the_same_pod(server: ServerProcess) -> None:
    runtime = yaml.safe_load((FOLDER / "kserve/runtime.yaml").read_text())
    service = yaml.safe_load((FOLDER / "kserve/inferenceservice.yaml").read_text())
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"] in [
        {"name": item["name"], "version": item["version"]}
        for item in runtime["spec"]["supportedModelFormats"]
    ]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert predictor["enableServiceLinks"] is False
    (container,) = runtime["spec"]["containers"]
    _check_container(container, predictor["terminationGracePeriodSeconds"], server)
    # The part that Kubernetes has a schema for.
    pod = {"containers": [container], "enableServiceLinks": False}
    _validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod})


@needs_kubectl
@pytest.mark.parametrize("name", ["archive", "label-studio"])
def test_what_stands_beside_the_server(name: str, tmp_path: Path) -> None:
    manifests = _rendered(FOLDER / name)
    for kind in manifests.keys() - _OPERATOR:
        _validate(manifests[kind])
    kind = "StatefulSet" if name == "archive" else "Deployment"
    spec = manifests[kind]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"].items() >= _LOCKED_UP.items()
    # Its own pods, and no other's, get its traffic and its policy.
    labels = spec["template"]["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/name": f"slsnet-{name}"}
    assert spec["selector"]["matchLabels"] == labels
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]} == ports
    # The first word is the program (docker/entrypoint.py); the rest it understands.
    first, *flags = container["args"]
    assert first == name
    _parse(name, [flag.replace("/var/lib/slsnet-archive", str(tmp_path)) for flag in flags])
    if name == "archive":
        (monitored,) = manifests["ServiceMonitor"]["spec"]["endpoints"]
        assert monitored["port"] in ports
        (claim,) = spec["volumeClaimTemplates"]
        assert claim["metadata"]["name"] in {one["name"] for one in container["volumeMounts"]}
        egress = manifests["NetworkPolicy"]["spec"]["egress"]
        (found,) = egress[0]["to"][0]["podSelector"]["matchExpressions"]
        assert found["values"] == ["slsnet"]


def _parse(name: str, flags: list[str]) -> None:
    """Hold them against the program's own options."""
    pytest.importorskip("pynetdicom", reason="needs requirements-dicom.txt")
    from server.archive.__main__ import parsed

    if name == "archive":
        parsed(flags)
