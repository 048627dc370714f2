"""The compose files parse, and what they name exists."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import Settings, read_settings, settings_table
from tests.support import ROOT

FOLDER = ROOT / "docker"
COMPOSE = Path(sys.executable).with_name("podman-compose")
SETTINGS = {variable for _, variable, _, _ in settings_table()}

_OURS = {"server", "load"}
_PORTS = {"server": 8000, "prometheus": 9090, "grafana": 3000}


def _services(*files: str) -> dict[str, dict[str, Any]]:
    """What the files give together, as podman-compose reads them, without any variable set."""
    options = [option for name in files for option in ("--file", FOLDER / name)]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    result = subprocess.run(
        [COMPOSE, *options, "--profile", "load", "config"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    services: dict[str, dict[str, Any]] = yaml.safe_load(result.stdout)["services"]
    return services


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def services(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    if not COMPOSE.exists():
        pytest.skip("needs podman-compose (docker/requirements-tools.txt)")
    if shutil.which("podman") is None:
        pytest.skip("needs podman, which podman-compose asks even to read a file")
    extra = ["compose.gpu.yaml"] if request.param == "gpu" else []
    return _services("compose.yaml", *extra)


def test_every_container_is_locked_up(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_ports_are_open_to_this_machine_alone(services: dict[str, dict[str, Any]]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {name: [f"127.0.0.1:{port}:{port}"] for name, port in _PORTS.items()}


def test_images_of_others_have_a_version(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        if name not in _OURS:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        else:
            build = service["build"]
            assert (FOLDER / build["context"] / build["dockerfile"]).is_file()


def test_the_server_has_the_settings_that_are_set(services: dict[str, dict[str, Any]]) -> None:
    first, last = services["server"]["env_file"]
    lines = (FOLDER / first).read_text().splitlines()
    environment = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert environment.keys() <= SETTINGS
    # The last one wins, and what is set in `environment` would win over it.
    assert last == {"path": "server.env", "required": False}
    assert "environment" not in services["server"]
    Settings.model_validate(
        {name.removeprefix("SLSNET_").lower(): value for name, value in environment.items()}
    )


def test_the_worst_case_fits_into_memory(services: dict[str, dict[str, Any]]) -> None:
    # docs/operations.md, Memory: ONNX Runtime's most threads, and CUDA's libraries.
    limit_mib = 1024 * int(services["server"]["mem_limit"].removesuffix("g"))
    defaults = Settings()
    photos = defaults.max_bytes_in_flight + 20 * defaults.max_pixels_decoding
    network_mib = 140 + 9 * 80
    gpu_mib = 3072 if "deploy" in services["server"] else 0
    assert limit_mib > network_mib + gpu_mib + photos / 2**20


def test_a_drain_fits_into_the_grace_of_a_stop(services: dict[str, dict[str, Any]]) -> None:
    grace_s = float(services["server"]["stop_grace_period"].removesuffix("s"))
    defaults = Settings()
    assert grace_s > defaults.drain_grace_s + defaults.drain_timeout_s


def test_what_is_mounted_exists(services: dict[str, dict[str, Any]]) -> None:
    mounts = [
        mount.split(":")
        for service in services.values()
        for mount in service.get("volumes", [])
        if mount.startswith(".")
    ]
    assert mounts
    for source, _, mode in mounts:
        assert (FOLDER / source).is_dir(), source
        assert mode == "ro"


def test_prometheus_and_grafana_find_each_other(services: dict[str, dict[str, Any]]) -> None:
    config = yaml.safe_load((FOLDER / "prometheus/prometheus.yml").read_text())
    scrape, archive = config["scrape_configs"]
    # By the service's name: an address changes with the container, and SlsnetRestarting counts the
    # starts of one instance.
    assert "server" in services
    assert scrape["static_configs"] == [{"targets": [f"server:{_PORTS['server']}"]}]
    (found,) = archive["dns_sd_configs"]
    assert found == {"names": ["archive"], "type": "A", "port": 11113}
    (source,) = yaml.safe_load(
        (FOLDER / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )["datasources"]
    assert source["url"] == f"http://prometheus:{_PORTS['prometheus']}"
    (provider,) = yaml.safe_load(
        (FOLDER / "grafana/provisioning/dashboards/slsnet.yaml").read_text()
    )["providers"]
    targets = [mount.split(":")[1] for mount in services["grafana"]["volumes"]]
    assert provider["options"]["path"] in targets


def test_what_stands_beside_the_server() -> None:
    compose = yaml.safe_load((FOLDER / "compose.full.yaml").read_text())["services"]
    assert compose["server"]["build"]["args"] == {"REQUIREMENTS": "requirements-full"}
    assert (FOLDER / "requirements-full.lock").is_file()
    assert read_settings(compose["server"]["command"]).grpc_port == 8001
    for name in ("archive", "label-studio-backend"):
        service = compose[name]
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        # Only where somebody asks for it.
        assert service["profiles"] == [name.removesuffix("-backend")]
        assert service["command"][0] == name.removesuffix("-backend")
    for service in compose.values():
        assert all(re.match(r"\$\{\w+:-127\.0\.0\.1:", port) for port in service["ports"])


def test_the_archive_takes_the_flags_of_compose() -> None:
    pytest.importorskip("pynetdicom", reason="needs requirements-dicom.txt")
    from server.archive.__main__ import parsed

    compose = yaml.safe_load((FOLDER / "compose.full.yaml").read_text())["services"]
    _, *flags = compose["archive"]["command"]
    given = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", flag) for flag in flags]
    parsed(given)
