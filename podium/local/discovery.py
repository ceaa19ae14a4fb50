"""The broker that `podium up` keeps on this machine, as other commands find it: its keys, its monitoring."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import msgspec

from podium.local.stack import KEYS, LOOPBACK
from shared.settings import Settings

MONITOR_PORT = 8222  # nats-server's own custom, and deploy/nats.conf's

_HTTP = re.compile(r'^\s*http:\s*"?([^"\s]+?)"?\s*$', re.MULTILINE)


def is_own(settings: Settings) -> bool:
    """Whether the settings name a broker on this machine."""
    return urlsplit(settings.nats_url).hostname in LOOPBACK


def with_own_keys(settings: Settings) -> Settings:
    """The settings, with the keys that `podium up` made for its broker if none are set."""
    keys = settings.data / KEYS
    if settings.nats_nkey_seed_file is not None or not is_own(settings) or not keys.is_dir():
        return settings
    own: dict[str, Any] = {"nats_nkey_seed_file": str(keys), "nats_ca_file": None}
    return msgspec.structs.replace(settings, **own)


def monitor_url(settings: Settings) -> str:
    """Where the broker's monitoring should answer; it has no authentication, so mostly on loopback only."""
    config = settings.data / "nats" / "nats.conf"
    if is_own(settings) and config.exists() and (found := _HTTP.search(config.read_text())):
        return f"http://{found[1]}"
    return f"http://{urlsplit(settings.nats_url).hostname or '127.0.0.1'}:{MONITOR_PORT}"
