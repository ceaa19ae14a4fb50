"""What containers and units are configured with."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gateway.connections import SPARE_FILES
from podium.local.nats_server import nats_server_path
from podium.security.key_files import make_certificates, make_users
from shared.settings import Settings
from shared.settings_sources import load_settings

DEPLOY = Path(__file__).parents[3] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
TRAINER_UNIT = DEPLOY / "systemd" / "podium-trainer@.service"


@pytest.mark.parametrize("name", ["nats.conf", "systemd/nats.conf"])
def test_broker_configuration_is_valid_and_syncs_every_write(name: str, tmp_path: Path) -> None:
    make_users(tmp_path / "keys", ("a", "b"))
    make_certificates(tmp_path / "keys", [], ())
    config = tmp_path / "nats.conf"
    text = (DEPLOY / name).read_text()
    config.write_text(text.replace("/etc/podium/", f"{tmp_path}/"))
    done = subprocess.run(
        [nats_server_path(), "-t", "-c", config], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert "sync_interval: always" in text
    assert 'include "keys/broker/users.conf"' in text


@pytest.mark.parametrize("half", ["a", "b"])
def test_unit_environments_are_settings(half: str) -> None:
    lines = [
        line
        for name in ("systemd/units.env", "podium.env", f"systemd/trainer-{half}.env")
        for line in (DEPLOY / name).read_text().splitlines()
        if line and not line.startswith("#")
    ]
    settings = load_settings(dict(line.split("=", 1) for line in lines) | {"PODIUM_SLOT": half})
    # The folders that the unit gives to this slot's user, and no other's.
    folders = {settings.node, settings.data / "slots" / half, settings.artifacts}
    given = re.search(r"^StateDirectory=(.*)$", TRAINER_UNIT.read_text(), re.MULTILINE)
    assert given
    assert {Path("/var/lib", name.replace("%i", half)) for name in given[1].split()} == folders
    assert settings.gpus == {"a": "0,1,2,3", "b": "4,5,6,7"}[half]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("systemd/podium-gateway.service", "LimitNOFILE="),
        ("../docker-compose.yml", 'ulimits: {nofile: "${PODIUM_OPEN_FILES:-'),
    ],
)
def test_the_gateway_has_descriptors_for_its_connections(name: str, words: str) -> None:
    (after,) = (DEPLOY / name).read_text().split(words)[1:]
    allowed = re.match(r"\d+", after)
    assert allowed
    assert int(allowed[0]) >= Settings().max_connections + SPARE_FILES


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    """In a folder of their own, with a program that exists here."""
    for unit in (*UNITS, *(DEPLOY / "systemd").glob("*.socket")):
        text = re.sub(r"/opt/podium/\.venv/bin/\w+", "/bin/true", unit.read_text())
        (tmp_path / unit.name).write_text(text)
    names = [unit.name for unit in sorted(tmp_path.iterdir())]
    done = subprocess.run(
        ["systemd-analyze", "verify", *names], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_no_timeout_ends_the_brokers_upgrade() -> None:
    text = (DEPLOY / "systemd" / "podium-broker.service").read_text()
    assert "TimeoutStartSec=infinity\n" in text
    assert "ExecStartPost=/opt/podium/.venv/bin/podium bootstrap\n" in text


def test_dockers_proxy_is_no_crowd_from_one_address() -> None:
    """All clients of a published port come from the address of Docker's bridge."""
    compose = (DEPLOY / "../docker-compose.yml").read_text()
    (limit,) = re.findall(r'PODIUM_MAX_CONNECTIONS_PER_ADDRESS: "(\d+)"', compose)
    assert int(limit) == Settings().max_connections


def test_each_unit_has_a_user_of_its_own() -> None:
    users = [user for unit in UNITS for user in re.findall(r"^User=(.*)$", unit.read_text(), re.MULTILINE)]
    assert sorted(users) == ["podium-broker", "podium-gateway", "podium-track", "podium-trainer-%i"]
    made = re.findall(r"^u +(\S+)", (DEPLOY / "systemd" / "podium.sysusers").read_text(), re.MULTILINE)
    assert sorted(made) == [
        *("podium-broker", "podium-gateway", "podium-track"),
        *(f"podium-trainer-{slot}" for slot in Settings().slots),
    ]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_no_unit_can_take_the_machine(unit: Path) -> None:
    lines = unit.read_text().splitlines()
    assert {"NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes"} < set(lines)
    assert any(line.startswith("MemoryMax=") for line in lines)
    if unit == TRAINER_UNIT:
        assert {"OOMPolicy=continue", "KillMode=process", "StateDirectoryMode=0700"} < set(lines)
        assert "Environment=PODIUM_OWN_MEMORY_LIMIT=true" in lines  # a unit is one slot
