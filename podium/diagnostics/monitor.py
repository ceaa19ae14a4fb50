"""The broker's monitoring, as `podium doctor` reads it over HTTP."""

from __future__ import annotations

import http.client

import msgspec
from msgspec import Struct

from podium.client import fetch
from shared.messages.encoding import decode


class Monitor(Struct, frozen=True, kw_only=True):
    """State reported by the broker's monitoring."""

    url: str
    error: str | None = None  # why it could not be reached
    health: str = ""  # "ok", or what is wrong
    sync_always: bool | None = None
    store_bytes: int = 0
    store_limit: int = 0


class _Health(Struct):
    status: str = "no answer"
    error: str = ""


class _StoreConfig(Struct):
    sync_always: bool = False
    max_storage: int = 0


class _StoreUse(Struct):
    storage: int = 0


class _Store(Struct):
    config: _StoreConfig = msgspec.field(default_factory=_StoreConfig)
    stats: _StoreUse = msgspec.field(default_factory=_StoreUse)


class _Server(Struct):
    jetstream: _Store = msgspec.field(default_factory=_Store)


def probe_monitor(url: str, timeout_s: float) -> Monitor:
    """Read the broker's monitoring. Blocks."""
    try:
        answers = [fetch(f"{url}/{page}", timeout_s)[1] for page in ("healthz", "varz")]
    except http.client.HTTPException as error:
        return Monitor(url=url, error=f"what answers there speaks no HTTP: {str(error).strip():.80}")
    except (OSError, ValueError) as error:
        return Monitor(url=url, error=str(getattr(error, "reason", error)))
    try:
        health = decode(answers[0], _Health)  # an error comes with status 503
        store = decode(answers[1], _Server).jetstream
    except ValueError as error:
        return Monitor(url=url, error=f"what answers there is no broker's monitoring: {error}")
    return Monitor(
        url=url,
        health=health.error or health.status,
        sync_always=store.config.sync_always,
        store_bytes=store.stats.storage,
        store_limit=store.config.max_storage,
    )
