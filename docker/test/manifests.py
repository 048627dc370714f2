"""What `docker/test/kubernetes.sh` does with rendered manifests, which come on standard input.

python docker/test/manifests.py validate          against Kubernetes' schemas
python docker/test/manifests.py play IMAGE PORT   the Deployment alone, for `podman kube play`
"""

import sys
from typing import Any

import kubernetes_validate
import yaml

_NOT_OF_KUBERNETES = {"PrometheusRule", "ServiceMonitor"}


def validate(manifests: list[dict[str, Any]]) -> None:
    """Raise ValidationError unless each is what its schema wants, and nothing beside."""
    version = kubernetes_validate.latest_version()
    kinds = [item["kind"] for item in manifests if item["kind"] not in _NOT_OF_KUBERNETES]
    for item in manifests:
        if item["kind"] in kinds:
            kubernetes_validate.validate(item, version, strict=True)
    print(f"valid for Kubernetes {version}: {', '.join(kinds)}")


def play(manifests: list[dict[str, Any]], image: str, port: int) -> None:
    """Write the Deployment with `image`, on `port` of this machine."""
    (deployment,) = (item for item in manifests if item["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container["image"] = image
    container["imagePullPolicy"] = "Never"
    container["ports"][0]["hostPort"] = port
    deployment["spec"]["replicas"] = 1
    yaml.safe_dump(deployment, sys.stdout)


if __name__ == "__main__":
    given = list(yaml.safe_load_all(sys.stdin))
    match sys.argv[1:]:
        case ["validate"]:
            validate(given)
        case ["play", image, port]:
            play(given, image, int(port))
        case _:
            sys.exit(__doc__)
