"""Find the keys and the monitoring of the broker that `podium up` runs on this machine."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import msgspec

from shared.net import LOOPBACK, LOOPBACK_HOSTS
from shared.settings import Settings

KEYS = "keys"  # folder in the data folder
MONITOR_PORT = 8222  # the usual port of nats-server, also in deploy/nats.conf

_HTTP = re.compile(r'^\s*http:\s*"?([^"\s]+?)"?\s*$', re.MULTILINE)


def is_own(settings: Settings) -> bool:
    """Return whether the settings name a broker on this machine."""
    return urlsplit(settings.nats_url).hostname in LOOPBACK_HOSTS


def with_own_keys(settings: Settings) -> Settings:
    """Return the settings; if no keys are set, with the keys that `podium up` made for its broker."""
    keys = settings.data / KEYS
    if settings.nats_nkey_seed_file is not None or not is_own(settings) or not keys.is_dir():
        return settings
    own: dict[str, Any] = {"nats_nkey_seed_file": str(keys), "nats_ca_file": None}
    return msgspec.structs.replace(settings, **own)


def monitor_url(settings: Settings) -> str:
    """Return the URL of the broker's monitoring. It has no authentication, so usually only on loopback."""
    config = settings.data / "nats" / "nats.conf"
    if is_own(settings) and config.exists() and (found := _HTTP.search(config.read_text())):
        return f"http://{found[1]}"
    return f"http://{urlsplit(settings.nats_url).hostname or LOOPBACK}:{MONITOR_PORT}"
