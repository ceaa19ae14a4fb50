"""Offers, and what is decided on them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from shared.messages.encoding import decoder


class TaskType(StrEnum):
    """Kinds of work an upstream offers; the values are upstream's own words."""

    INSTRUCT = "InstructTextTask"
    CHAT = "ChatTask"
    DPO = "DpoTask"
    GRPO = "GrpoTask"
    IMAGE = "ImageTask"


class FileFormat(StrEnum):
    """The format of a data reference; `s3` is upstream's word for a presigned JSON URL."""

    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    HF = "hf"
    S3 = "s3"


_CHAT: Final = (  # columns that only a chat task names
    "chat_template",
    "chat_column",
    "chat_role_field",
    "chat_content_field",
    "chat_user_reference",
    "chat_assistant_reference",
)
_INSTRUCT: Final = ("field_instruction", "field_input", "field_output", "field")
_DPO: Final = ("field_prompt", "field_chosen", "field_rejected")


class DatasetType(Struct, frozen=True, kw_only=True):
    """Which columns of the data mean what: the union of upstream's dataset types, by its own names."""

    # instruct and completion (completion = no field_output)
    system_prompt: str | None = None
    system_format: str | None = None
    field_system: str | None = None
    field_instruction: str | None = None
    field_input: str | None = None
    field_output: str | None = None
    format: str | None = None
    no_input_format: str | None = None
    field: str | None = None
    # DPO
    field_prompt: str | None = None
    field_chosen: str | None = None
    field_rejected: str | None = None
    prompt_format: str | None = None
    chosen_format: str | None = None
    rejected_format: str | None = None
    # chat
    chat_template: str | None = None
    chat_column: str | None = None
    chat_role_field: str | None = None
    chat_content_field: str | None = None
    chat_user_reference: str | None = None
    chat_assistant_reference: str | None = None


def task_type_of(columns: DatasetType, otherwise: TaskType = TaskType.INSTRUCT) -> TaskType:
    """Return the task type that the named columns belong to, as in upstream's own union of their types.

    If none of them names one it is `otherwise`.
    """
    if any(getattr(columns, name) for name in _DPO):
        return TaskType.DPO
    if any(getattr(columns, name) for name in _CHAT) and not columns.field_instruction:
        return TaskType.CHAT
    return TaskType.INSTRUCT if any(getattr(columns, name) for name in _INSTRUCT) else otherwise


class BareOffer(Struct, frozen=True, kw_only=True):
    """Upstream's question without the data: all that a decision may depend on."""

    task_id: Annotated[str, Meta(min_length=1, max_length=1024)]
    task_type: TaskType
    model: Annotated[str, Meta(min_length=1, max_length=512)]
    hours_to_complete: Annotated[float, Meta(gt=0)]
    model_params_count: Annotated[int, Meta(gt=0)] | None = None
    ds_size: int | None = None  # a constant upstream, carries no information; kept for the record


class Offer(BareOffer, frozen=True, kw_only=True):
    """Upstream's question: can you fine-tune this model on this data within so many hours?"""

    dataset: Annotated[str, Meta(min_length=1, max_length=8192)]  # path, https URL or HF data set id
    file_format: FileFormat = FileFormat.JSON
    dataset_type: DatasetType = msgspec.field(default_factory=DatasetType)
    expected_repo_name: str | None = None


class Term(Struct, frozen=True):
    """One summand of the priority: its value, its weight, and where the value comes from."""

    value: float
    weight: float
    cause: str = ""


class Terms(Struct, frozen=True, kw_only=True):
    """The five summands of the house policy; priority = min(1, sum of value * weight)."""

    task_weight: Term
    model_performance: Term
    task_success: Term
    maximum_accuracy_bonus: Term
    h100_maximum_bonus: Term


class DecisionKind(StrEnum):
    """The ground for a decision on an offer, without the numbers and names that a reason carries.

    A value that a newer version added is read as `other`.
    """

    ACCEPTED = "accepted"
    CAPACITY = "capacity"  # all slots are busy or reserved
    TOO_LONG = "too_long"  # more hours than `max_hours`
    KEY_TAKEN = "token_taken"  # another accepted task has the same key; keys were once called tokens
    LOG_FULL = "log_full"  # JOBS, or the log of each free slot, has hardly any room
    RESERVED = "reserved"  # its validator holds a reservation already, while other validators ask
    PLAN = "plan"  # unsupported, too short, or too large for memory or deadline
    HARDWARE = "hardware"  # no slot is free, live and shows the expected hardware
    PRIORITY = "priority"  # the learned rates: below the threshold, or too few points per hour
    OTHER = "other"  # a custom policy that names no kind, or that failed

    @classmethod
    def _missing_(cls, value: object) -> DecisionKind:
        return cls.OTHER


class Decision(Struct, frozen=True, kw_only=True):
    """Accept or reject, with the reason and every term of the score."""

    task_id: str
    task: str  # the task's key
    accepted: bool
    reason: str
    kind: DecisionKind = DecisionKind.OTHER  # also in records of versions that did not write it
    slot: str | None = None  # set if accepted
    priority: float | None = None
    terms: Terms | None = None
    policy: str = "maximum_accuracy"
    deadline_at: float | None = None  # set if accepted
    decided_at: float = 0.0
    gateway: str = ""
    validator: str = ""  # ss58 address of the sender; empty if it came from an operator or over NATS
    offer: BareOffer | None = None  # in the gateway's file and on `podium.decisions.*`; a job has its own


decode_offer = decoder(Offer)
