"""The structs of /v1; decisions are in shared.messages.offers, problems in gateway.api.problems."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from gateway.learning.rates import Rate
from gateway.state.ledger import ChainRecord, TaskState
from shared.messages.hardware import GpuStatus, Hardware
from shared.messages.jobs import Job, Reservation, Result, Score, SlotDrain
from shared.messages.offers import Decision, TaskType
from shared.messages.runs import Phase, Progress

__all__ = [
    "LONGEST_PAGE",
    "ChainRecord",
    "GatewayInfo",
    "MirrorInfo",
    "RefusedScore",
    "ScoresTaken",
    "SlotPage",
    "SlotView",
    "Status",
    "TableView",
    "TablesView",
    "TaskPage",
    "TaskRecords",
    "TaskState",
    "TaskView",
]

LONGEST_PAGE: Final = 500  # tasks


class TaskView(Struct, frozen=True, kw_only=True):
    """One accepted task."""

    task_id: str
    task: str  # its key
    slot: str
    state: TaskState
    decision: Decision
    model: str | None  # none if it is a reservation of an older version
    task_type: TaskType | None
    hours_to_complete: float | None
    received_at: float
    deadline_at: float | None
    attempts: int
    node: str | None
    epoch: int | None
    progress: Progress | None
    result: Result | None
    score: Score | None = None  # upstream's, if it was posted; events don't carry it
    damaged: str | None = None  # why the newest record of its states can't be read: its node can't go on


class TaskRecords(Struct, frozen=True, kw_only=True):
    """All that is stored of one task, and its current state."""

    now: TaskView
    reservation: Reservation | None
    job: Job | None
    chain: list[ChainRecord]  # oldest first


class TaskPage(Struct, frozen=True):
    """Tasks, newest first; `next` is the `after` of the next page, or null."""

    tasks: list[TaskView]
    next: int | None


class SlotView(Struct, frozen=True, kw_only=True):
    """One slot, as the logs and its node report it."""

    slot: str
    state: str  # free, reserved or busy
    live: bool
    hardware: Hardware | None
    node: str | None
    epoch: int | None
    task: str | None  # the key of the job or reservation that keeps it busy
    phase: Phase | None
    step: int | None
    last_heartbeat_age_s: float | None
    gpus: list[GpuStatus] = []  # these five as in the newest heartbeat
    memory_total: int = 0
    memory_used: int = 0
    faults: list[str] = []
    version: str = ""
    drain: SlotDrain | None = None  # set while an operator keeps new jobs away
    damaged: str | None = None  # as of its task


class SlotPage(Struct, frozen=True):
    """Every slot of the fleet."""

    slots: list[SlotView]


class MirrorInfo(Struct, frozen=True):
    """The progress of a gateway's mirror of the logs."""

    path: str
    last: dict[str, int]  # by stream, the newest sequence in the file
    behind: bool
    error: str | None = None  # why it is not being written


class RefusedCaller(Struct, frozen=True, kw_only=True):
    """One caller of upstream's endpoints that was refused for one reason within the last hour."""

    validator: str  # the address that its requests claim; it need not be its own
    reason: str
    detail: str
    requests: int = 0
    first_at: float
    last_at: float


class GatewayInfo(Struct, frozen=True, kw_only=True):
    """One gateway's settings and condition at one moment."""

    gateway: str
    version: str
    now: float  # its clock
    not_ready: str | None
    settings: dict[str, Any]  # those that must agree between all services
    folded: dict[str, int]
    malformed_records: int
    malformed_messages: int
    lost_decisions: int
    denied: list[str]
    mirror: MirrorInfo
    full_log: str | None = None  # how full JOBS is if it has hardly any room: no offer is accepted
    full_slots: dict[str, str] = {}  # the same of slots' logs: no offer is accepted for these slots
    refused: list[RefusedCaller] = []  # at upstream's endpoints, in the last hour


class DecisionPage(Struct, frozen=True):
    """Decisions of this gateway, newest first; `next` is the `before` of the next page, or null."""

    decisions: list[Decision]
    next: int | None


class TableView(Struct, frozen=True):
    """One table as the API shows it."""

    rate_of: str
    house: float
    rates: dict[str, Rate]


class TablesView(Struct, frozen=True, kw_only=True):
    """All rates and their evidence."""

    policy: str
    prior_strength: float  # trials that a house value counts as
    half_life_days: float  # half-life of evidence
    results: int  # tasks whose end is evidence
    unused_results: int = 0  # tasks whose end is none: cancelled, or failed for data that nobody could use
    scores: int  # tasks whose score is evidence
    tables: dict[str, TableView]


class RefusedScore(Struct, frozen=True):
    """A score that was not stored, and why not."""

    task_id: str
    why: str


class ScoresTaken(Struct, frozen=True):
    """The outcome of posted scores; the first two are task ids."""

    stored: list[str] = []
    known: list[str] = []  # the same is stored already: nothing was changed
    refused: list[RefusedScore] = []


class Status(Struct, frozen=True):
    """The status of the gateway."""

    status: str
