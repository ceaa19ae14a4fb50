"""How commands find the broker that `podium up` keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from podium.local.discovery import is_own, monitor_url, with_own_keys
from podium.local.nats_server import write_config
from shared.settings import Settings
from shared.settings_sources import load_settings


def settings(tmp_path: Path, **values: Any) -> Settings:
    return load_settings({}, data_dir=str(tmp_path), **values)


def test_monitoring_is_where_the_brokers_file_says(tmp_path: Path) -> None:
    assert monitor_url(settings(tmp_path)) == "http://127.0.0.1:8222"
    write_config(tmp_path / "nats", 4222, 4711)
    assert monitor_url(settings(tmp_path)) == "http://127.0.0.1:4711"
    elsewhere = settings(tmp_path, nats_url="nats://box:4222")
    assert not is_own(elsewhere)
    assert monitor_url(elsewhere) == "http://box:8222"


def test_its_keys_are_taken_unless_others_are_set(tmp_path: Path) -> None:
    assert with_own_keys(settings(tmp_path)).nats_nkey_seed_file is None  # it has no users
    (tmp_path / "keys").mkdir()
    assert with_own_keys(settings(tmp_path)).nats_nkey_seed_file == str(tmp_path / "keys")
    assert with_own_keys(settings(tmp_path, nats_nkey_seed_file="x")).nats_nkey_seed_file == "x"
    assert with_own_keys(settings(tmp_path, nats_url="nats://box:4222")).nats_nkey_seed_file is None
