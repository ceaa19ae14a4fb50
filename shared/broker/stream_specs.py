"""The streams of Podium: their configurations, and which fields of these carry a promise."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from shared import subjects
from shared.settings import Settings

NONCES_KEPT_S: Final = 300.0  # a nonce from the future is valid for twice upstream's window of 120 s


class StreamSpec(Struct, frozen=True):
    """A stream's configuration, and which of its fields carry a promise and so must not differ."""

    config: dict[str, Any]
    binding: tuple[str, ...]


def stream_specs(settings: Settings) -> list[StreamSpec]:
    """Return all streams of Podium."""
    stores = [_artifacts(settings, slot) for slot in settings.slots if settings.artifacts_kind == "object"]
    return [
        _log(settings, subjects.JOBS_STREAM, [subjects.ANY_JOB, subjects.ANY_RESERVATION]),
        *(state_log(settings, slot) for slot in settings.slots),
        _leases(settings),
        _watched(subjects.PROGRESS_STREAM, subjects.ANY_PROGRESS, max_msgs_per_subject=1000),
        _watched(subjects.DECISIONS_STREAM, subjects.ANY_DECISION, max_msgs=10_000),
        _scores(settings),
        _nonces(),
        *stores,
    ]


def state_log(settings: Settings, slot: str) -> StreamSpec:
    """Return the log of one slot's states: a node that fills it leaves the other slots' alone."""
    return _log(settings, subjects.state_stream(slot), [subjects.states_of_slot(slot)])


def _log(settings: Settings, name: str, bound: list[str]) -> StreamSpec:
    """Return a log: append-only, without an age limit. A full one refuses, and drops no record."""
    config = {
        "name": name,
        "subjects": bound,
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "max_bytes": settings.log_max_bytes,
        "max_age": 0,
        "max_msgs": -1,
        "max_msgs_per_subject": -1,
        "allow_direct": True,
        "deny_delete": True,
        "deny_purge": True,
        "num_replicas": settings.nats_replicas,
    }
    limits = ("max_age", "max_msgs", "max_msgs_per_subject")
    return StreamSpec(config, ("subjects", "storage", "retention", "discard", *limits, "allow_direct"))


def _leases(settings: Settings) -> StreamSpec:
    """Return the bucket of leases, with history 1: an expired lease can't bring back an older one."""
    config = {
        "name": subjects.LEASES_STREAM,
        "subjects": [subjects.ANY_LEASE],
        "storage": "file",  # epochs are sequences: they must not restart with the broker
        "retention": "limits",
        "discard": "new",
        "max_msgs_per_subject": 1,
        "allow_direct": True,
        "allow_msg_ttl": True,
        "allow_rollup_hdrs": False,  # one write with such a header deletes every other slot's lease
        "deny_delete": True,
        "num_replicas": settings.nats_replicas,
    }
    return StreamSpec(
        config, ("subjects", "storage", "max_msgs_per_subject", "allow_direct", "allow_msg_ttl")
    )


def _watched(name: str, subject: str, **limits: int) -> StreamSpec:
    """Return a stream for watchers only: in memory, the oldest messages are dropped."""
    config = {
        "name": name,
        "subjects": [subject],
        **limits,
        "max_bytes": 16 << 20,
        "storage": "memory",
        "retention": "limits",
        "discard": "old",
        "allow_direct": True,
    }
    return StreamSpec(config, ("subjects",))


def _scores(settings: Settings) -> StreamSpec:
    """Return the stream with the newest score of each task."""
    config = {
        "name": subjects.SCORES_STREAM,
        "subjects": [subjects.ANY_SCORE],
        "max_msgs_per_subject": 1,
        "max_bytes": 64 << 20,
        "storage": "file",
        "retention": "limits",
        "discard": "old",  # the oldest score counts least: its evidence has faded
        "allow_direct": True,
        "num_replicas": settings.nats_replicas,
    }
    return StreamSpec(config, ("subjects", "storage", "max_msgs_per_subject", "allow_direct"))


def _nonces() -> StreamSpec:
    """Return the stream of signed requests that gateways have seen and that could still be replayed."""
    config = {
        "name": subjects.NONCES_STREAM,
        "subjects": [subjects.NONCES],
        "max_age": round(NONCES_KEPT_S * 1e9),
        "max_bytes": 64 << 20,
        "storage": "file",  # in memory, a restarted broker would forget what could be replayed
        "retention": "limits",
        "discard": "old",
        "allow_direct": True,
    }
    return StreamSpec(config, ("subjects", "storage", "allow_direct"))


def _artifacts(settings: Settings, slot: str) -> StreamSpec:
    """Return a slot's object store. Unlike a log it forgets: a submission is fetched soon or never."""
    config = {
        "name": subjects.artifacts_stream(slot),
        "subjects": [subjects.artifact_chunks(slot, ">"), subjects.artifacts_of_slot(slot)],
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "max_bytes": settings.artifacts_bucket_max_bytes,
        "max_age": round(settings.artifacts_keep_s * 1e9),
        "allow_direct": True,
        "allow_rollup_hdrs": True,
        "num_replicas": settings.nats_replicas,
    }
    return StreamSpec(config, ("subjects", "storage", "retention", "discard", "allow_direct"))
