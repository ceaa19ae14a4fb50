"""What containers and units are configured with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from podium.broker import nats_server_path
from shared.settings import load_settings

DEPLOY = Path(__file__).parents[3] / "deploy"


@pytest.mark.parametrize("name", ["nats.conf", "systemd/nats.conf"])
def test_broker_configuration_is_valid_and_syncs_every_write(name: str) -> None:
    done = subprocess.run(
        [nats_server_path(), "-t", "-c", DEPLOY / name], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert "sync_interval: always" in (DEPLOY / name).read_text()


@pytest.mark.parametrize("half", ["a", "b"])
def test_unit_environments_are_settings(half: str) -> None:
    lines = [
        line
        for name in ("podium.env", f"trainer-{half}.env")
        for line in (DEPLOY / "systemd" / name).read_text().splitlines()
        if line and not line.startswith("#")
    ]
    settings = load_settings(dict(line.split("=", 1) for line in lines) | {"PODIUM_SLOT": half})
    assert settings.gpus == {"a": "0,1,2,3", "b": "4,5,6,7"}[half]
