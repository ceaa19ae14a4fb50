"""Names of all subjects, streams and buckets."""

from __future__ import annotations

import base64
import hashlib
import re

OFFERS = "podium.offers"
OFFERS_QUEUE = "gateway"

DIRECT_GET = "$JS.API.DIRECT.GET"
STREAM_INFO = "$JS.API.STREAM.INFO"

JOBS_STREAM = "JOBS"
OLD_STATE_STREAM = "STATE"  # of all slots; `podium bootstrap` splits it
PROGRESS_STREAM = "PROGRESS"
DECISIONS_STREAM = "DECISIONS"
SCORES_STREAM = "SCORES"
NONCES_STREAM = "NONCES"
LEASES_BUCKET = "leases"
LEASES_STREAM = f"KV_{LEASES_BUCKET}"

ANY_JOB = "podium.jobs.>"
ANY_RESERVATION = "podium.reservations.>"
ANY_STATE = "podium.state.>"
ANY_PROGRESS = "podium.progress.>"
ANY_HEARTBEAT = "podium.heartbeats.>"
ANY_DECISION = "podium.decisions.>"
ANY_SCORE = "podium.scores.>"
NONCES = "podium.nonces"
ANY_LEASE = f"$KV.{LEASES_BUCKET}.>"

_DRAIN = "@drain"  # in the place of a task's key; no key has this form
_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SLOT = re.compile(r"[A-Za-z0-9_-]{1,32}")


def task_key(task_id: str) -> str:
    """Return the form of an upstream id that is safe in subjects, keys, folders and object names.

    The id itself if it matches `[A-Za-z0-9_-]{1,64}`, else `x` and the first 32 hex digits of its sha256.
    """
    if _KEY.fullmatch(task_id):
        return task_id
    return "x" + hashlib.sha256(task_id.encode()).hexdigest()[:32]


def is_slot_name(text: str) -> bool:
    """Return whether a slot may have this name: it is a part of subjects, streams, folders and users."""
    return _SLOT.fullmatch(text) is not None


def job(slot: str, task: str) -> str:
    """Return the subject under which a job is stored."""
    return f"podium.jobs.{slot}.{task}"


def jobs_of_slot(slot: str) -> str:
    """Return the pattern of every job of one slot; its last message is the slot's newest job."""
    return f"podium.jobs.{slot}.*"


def job_on_any_slot(task: str) -> str:
    """Return the pattern that makes a task unique across slots."""
    return f"podium.jobs.*.{task}"


def reservation(slot: str, task: str) -> str:
    """Return the subject under which a reservation is stored."""
    return f"podium.reservations.{slot}.{task}"


def drain(slot: str) -> str:
    """Return the subject under which an operator drains a slot, or ends that."""
    return f"podium.reservations.{slot}.{_DRAIN}"


def is_drain(subject: str) -> bool:
    """Return whether records of this subject drain a slot."""
    return subject.endswith(f".{_DRAIN}")


def state(slot: str, task: str) -> str:
    """Return the subject of one task's chain: claimed, submitting, result."""
    return f"podium.state.{slot}.{task}"


def state_stream(slot: str) -> str:
    """Return the name of the log of a slot's chains."""
    return f"STATE-{slot}"


def slot_of_log(stream: str) -> str:
    """Return the slot whose chains a log holds."""
    return stream.removeprefix("STATE-")


def states_of_slot(slot: str) -> str:
    """Return the pattern of every record of a slot's chains."""
    return f"podium.state.{slot}.>"


def slot_in(subject: str) -> str | None:
    """Return the slot that a stored record's subject names; None if it names none that can have a log."""
    parts = subject.split(".", 3)
    if len(parts) != 4 or parts[0] != "podium" or not is_slot_name(parts[2]):
        return None
    return parts[2]


def progress(slot: str, task: str) -> str:
    """Progress of one task's run."""
    return f"podium.progress.{slot}.{task}"


def heartbeat(slot: str) -> str:
    """Return the subject of a node's heartbeats."""
    return f"podium.heartbeats.{slot}"


def task_in(subject: str) -> dict[str, str]:
    """Return the slot and the task that a subject names, for a log line; empty if it names none."""
    parts = subject.split(".")
    if len(parts) != 4 or parts[0] != "podium":
        return {}
    return {"task": parts[3], "slot": parts[2]}


def stream_info(stream: str) -> str:
    """Return where guests ask about a stream: JetStream's own subjects lead to the guest's account."""
    return f"podium.streams.{stream}"


def control(slot: str) -> str:
    """Requests of operators to the node that holds a slot."""
    return f"podium.control.{slot}"


def decision(task: str) -> str:
    """Decisions, accepted or not, for watchers."""
    return f"podium.decisions.{task}"


def score(task: str) -> str:
    """Upstream's score of a task's submission."""
    return f"podium.scores.{task}"


def lease(slot: str) -> str:
    """Return the key of a slot's lease, as a subject."""
    return f"$KV.{LEASES_BUCKET}.{slot}"


def artifacts_bucket(slot: str) -> str:
    """Return the name of a slot's object store."""
    return f"artifacts-{slot}"


def artifacts_stream(slot: str) -> str:
    """Return the stream below a slot's object store."""
    return f"OBJ_{artifacts_bucket(slot)}"


def artifact_chunks(slot: str, upload: str) -> str:
    """Return the subject of the pieces of one upload."""
    return f"$O.{artifacts_bucket(slot)}.C.{upload}"


def artifact(slot: str, name: str) -> str:
    """Return the subject of an object's metadata; the object is complete once this is stored."""
    return f"$O.{artifacts_bucket(slot)}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"


def artifacts_of_slot(slot: str) -> str:
    """Return the pattern of every object of a slot's store."""
    return f"$O.{artifacts_bucket(slot)}.M.>"
