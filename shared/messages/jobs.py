"""The records of a job in the logs, from the reserved slot to its result and its score."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from shared.messages.encoding import decoder
from shared.messages.offers import BareOffer, Decision, Offer, TaskType
from shared.messages.runs import ErrorCode, Metrics


class ResultStatus(StrEnum):
    """How a task can end."""

    SUBMITTED = "submitted"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class Reservation(Struct, frozen=True, kw_only=True, tag_field="kind", tag="reservation"):
    """A slot kept free for an accepted offer whose data comes later; lapses at `expires_at`."""

    record_id: str
    task_id: str
    task: str
    slot: str
    gateway: str
    reserved_at: float
    expires_at: float
    decision: Decision
    offer: BareOffer | None = None  # what was accepted; None in records of older versions


class Job(Struct, frozen=True, kw_only=True, tag_field="kind", tag="job"):
    """An accepted task with its data, on its way to one slot. Storing it is the acceptance."""

    record_id: str
    task_id: str
    task: str
    slot: str
    gateway: str
    offer: Offer
    decision: Decision
    received_at: float
    deadline_at: float
    moved_from: str | None = None  # the slot whose nodes left it unclaimed; a job moves at most once
    moved_at: float | None = None


class SlotDrain(Struct, frozen=True, kw_only=True, tag_field="kind", tag="drain"):
    """Whether an operator drains a slot, which then gets no new job; the newest record counts."""

    record_id: str
    slot: str
    drained: bool
    reason: str = ""
    gateway: str = ""
    at: float = 0.0


JobRecord = Reservation | Job


class Claimed(Struct, frozen=True, kw_only=True, tag_field="kind", tag="claimed"):
    """A node under lease takes the job; rewritten for every epoch and every worker start."""

    record_id: str
    task: str
    slot: str
    node: str
    epoch: int
    attempt: int  # 1 = first; grows only after a worker died by itself without a newer checkpoint
    step: int = 0  # optimiser step of the checkpoint this start begins from
    at: float = 0.0


class Submitting(Struct, frozen=True, kw_only=True, tag_field="kind", tag="submitting"):
    """The node is about to store this digest under the task's one submission name."""

    record_id: str
    task: str
    slot: str
    node: str
    epoch: int
    digest: str
    at: float = 0.0


class Moved(Struct, frozen=True, kw_only=True, tag_field="kind", tag="moved"):
    """A gateway takes a job that no node has claimed off its slot; only as the chain's first record."""

    record_id: str
    task: str
    slot: str  # the one that it leaves
    gateway: str
    reason: str = ""
    node: str = ""  # none: gateways hold no lease
    epoch: int = 0
    at: float = 0.0


class Result(Struct, frozen=True, kw_only=True, tag_field="kind", tag="result"):
    """The one terminal record of a task."""

    record_id: str
    task: str
    task_id: str
    slot: str
    status: ResultStatus
    reason: str = ""
    code: ErrorCode | None = None
    node: str = ""
    epoch: int = 0
    digest: str | None = None
    artifact: str | None = None  # where it is: a folder, nats://bucket/object or hf://repository@commit
    metrics: Metrics | None = None
    deadline_margin_s: float | None = None  # deadline minus the moment the submission was stored
    model_hash: str | None = None  # of a stored submission, as upstream computes it
    at: float = 0.0


StateRecord = Claimed | Moved | Submitting | Result


class Score(Struct, frozen=True, kw_only=True):
    """Upstream's score of a task's submission; the newest one of a task counts."""

    record_id: str
    task_id: str
    task: str
    task_type: TaskType
    model: str
    quality_score: float  # upstream's own: 3 = first place, 0 = another valid one, -1 = none that is valid
    test_loss: float | None = None
    synth_loss: float | None = None  # 1000 = not among the first four
    reason: str = ""
    scored_at: float = 0.0  # when upstream scored, if it reports that; else when we received the score
    at: float = 0.0


decode_job_record = decoder(JobRecord)

decode_drain = decoder(SlotDrain)

decode_state_record = decoder(StateRecord)

decode_score = decoder(Score)
