"""Every message Podium puts on the wire or on disk: frozen structs, JSON, additive only.

Unknown fields are ignored and a new field has a default, so that a gateway and a node of different
versions understand each other. `tests/unit/shared/test_messages.py` freezes the schemas.
Times are Unix seconds (UTC) unless a name says otherwise; sizes are bytes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta, Struct


class TaskType(StrEnum):
    """Kinds of work an upstream offers; the values are upstream's own words."""

    INSTRUCT = "InstructTextTask"
    CHAT = "ChatTask"
    DPO = "DpoTask"
    GRPO = "GrpoTask"
    IMAGE = "ImageTask"


class Scorer(StrEnum):
    """The upstream evaluator whose encoding of rows a job follows, by the month it is known from."""

    OFFERS = "gradients-2025-07"  # what offered jobs are scored by
    CONTESTS = "gradients-2026-07"  # what contests are scored by


class FileFormat(StrEnum):
    """The format of a data reference; `s3` is upstream's word for a presigned JSON URL."""

    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    HF = "hf"
    S3 = "s3"


class Phase(StrEnum):
    """Phases of one training run, in order."""

    LOADING = "loading"
    INGEST = "ingest"
    BASELINE = "baseline"
    TRAIN = "train"
    CHOOSE = "choose"
    EXPORT = "export"
    VERIFY = "verify"
    DONE = "done"


class ResultStatus(StrEnum):
    """How a task can end."""

    SUBMITTED = "submitted"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class OutcomeStatus(StrEnum):
    """How a worker process reports its own end."""

    READY = "ready"  # an export is on disk, verified, and waits to be submitted
    FAILED = "failed"  # the job can't be run; trying again would not help
    STOPPED = "stopped"  # asked to stop; a checkpoint is on disk


class ErrorCode(StrEnum):
    """Why a worker failed, as far as the node must distinguish the cases."""

    BAD_DATA = "bad_data"  # for anyone
    DATA_UNAVAILABLE = "data_unavailable"  # here: the network, a token or a disk may be the cause
    MODEL_UNAVAILABLE = "model_unavailable"
    UNSUPPORTED = "unsupported"
    DOES_NOT_FIT = "does_not_fit"
    OUT_OF_MEMORY = "out_of_memory"
    DEVICE = "device"
    DISK_FULL = "disk_full"
    TOO_LATE = "too_late"
    INTERNAL = "internal"


class ControlKind(StrEnum):
    """Requests of an operator to a slot's node."""

    LOOK = "look"  # its task has new records in the logs: poll now
    REQUEUE = "requeue"  # end the worker, restart the job with the attempts counted from 1


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
    """An operator drains a slot, which then gets no new job, or ends that; the newest one counts."""

    record_id: str
    slot: str
    drained: bool
    reason: str = ""
    gateway: str = ""
    at: float = 0.0


class Metrics(Struct, frozen=True, kw_only=True):
    """Measurements of a finished run; losses are the scorer's metric on the held-out development rows."""

    base_loss: float
    final_loss: float | None = None  # None = not measured: there was no time for it
    dev_examples: int = 0
    train_examples: int = 0
    dropped_rows: dict[str, int] = {}  # reason -> count
    steps: int = 0
    tokens: int = 0
    tokens_per_s: float = 0.0
    train_s: float = 0.0
    epochs: float = 0.0
    kind: str = ""  # "adapter" or "model"
    bytes: int = 0
    resumes: int = 0
    skipped_steps: int = 0  # without a finite gradient: they changed nothing


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


JobRecord = Reservation | Job
StateRecord = Claimed | Moved | Submitting | Result


class Hardware(Struct, frozen=True, kw_only=True):
    """The hardware of one slot. `device` is "cpu" or a GPU's short name such as "H100"."""

    device: str
    count: int  # GPUs, or CPU cores
    memory_bytes: int  # of one GPU, or of the whole machine for a CPU

    @property
    def name(self) -> str:
        """Short form used in settings, reasons and plans: `4xH100-80GB`, `cpu`."""
        if self.device == "cpu":
            return "cpu"
        return f"{self.count}x{self.device}-{round(self.memory_bytes / 2**30)}GB"


class Lease(Struct, frozen=True, kw_only=True):
    """A node's exclusive, expiring claim on its slot (value in the `leases` bucket)."""

    slot: str
    node: str
    epoch: int  # 0 in the creating write itself: then the epoch is that write's revision
    hardware: Hardware
    at: float = 0.0


class GpuStatus(Struct, frozen=True, kw_only=True):
    """One GPU at one moment."""

    index: int
    name: str
    memory_total: int
    memory_used: int
    utilization: float | None = None  # 0..1
    uuid: str = ""  # the device's own: an index is only this container's
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None


class Heartbeat(Struct, frozen=True, kw_only=True):
    """A node's heartbeat, every second."""

    slot: str
    node: str
    epoch: int  # 0 = no lease held
    hardware: Hardware
    gpus: list[GpuStatus] = []
    memory_total: int = 0
    memory_used: int = 0
    task: str | None = None
    phase: Phase | None = None
    step: int = 0
    worker_alive: bool = False
    at: float = 0.0
    version: str = ""  # of Podium
    faults: list[str] = []  # that the slot's self-test found: it is offered no job
    warnings: list[str] = []  # likewise: it is offered jobs, which are slower than they should be
    upload_bytes_per_s: float | None = None  # of this node's uploads to a hub; none yet: null
    download_bytes_per_s: float | None = None  # of models from a hub; none yet: null


class Progress(Struct, frozen=True, kw_only=True):
    """Where a run stands; written by the worker as JSON lines, published by the node."""

    task: str
    slot: str
    phase: Phase
    step: int = 0
    progress: float = 0.0  # 0..1 of the training budget
    tokens: int = 0
    loss: float | None = None
    lr: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    base_loss: float | None = None
    dev_loss: float | None = None
    skipped_steps: int = 0  # without a finite gradient: they changed nothing
    message: str | None = None  # a deviation, a dropped row, a fallback: nothing is silent
    at: float = 0.0


class WorkerJob(Struct, frozen=True, kw_only=True):
    """All a worker needs to know (`job.json` in its run folder); the run folder is the file's folder."""

    task_id: str
    task: str
    slot: str
    task_type: TaskType
    model: str  # the upstream model id: goes into the export
    model_path: str  # where the weights are: a folder, a GGUF file, or the id itself where a hub is reachable
    dataset: str
    file_format: FileFormat
    dataset_type: DatasetType
    start_at: float  # when the budget began: receipt of the job
    ready_by: float  # the outcome must be on disk by then; deadline minus what the node needs to submit
    hardware: Hardware
    profile: str = "maximum_accuracy"
    seed: int = 0
    checkpoint_interval_s: float = 60.0
    allow_private_urls: bool = False
    clock: str = "wall"  # or "token": time is tokens trained, for repeatable runs
    token_clock_rate: float = 1000.0  # tokens per simulated second
    threads: int | None = None  # CPU threads; None = this slot's share
    memory_share: float = 0.5  # of main memory, on a slot of GPUs; the rest is the other slot's
    processes: int = 0  # that train together; 0 = one per GPU, on a CPU one
    scorer: Scorer = Scorer.OFFERS  # whose rules the rows are encoded by
    kl_coefficient: float = 0.0  # what the divergence from the base model counts for in the score


class ModelDownload(Struct, frozen=True, kw_only=True):
    """How a model's weights came from the hub (`download.json`, written once, removed by the node)."""

    size: int  # bytes that were not on this machine
    seconds: float


class Outcome(Struct, frozen=True, kw_only=True):
    """The outcome of a worker (`outcome.json`, written atomically)."""

    status: OutcomeStatus
    digest: str | None = None  # of the export folder, see shared.files
    export: str | None = None  # the export folder, relative to the run folder
    metrics: Metrics | None = None
    code: ErrorCode | None = None
    error: str | None = None  # one clear sentence for people
    step: int = 0
    at: float = 0.0


class Control(Struct, frozen=True, kw_only=True):
    """A request to the node that holds a slot; the node answers with a ControlAnswer."""

    kind: ControlKind
    task: str
    reason: str = ""
    gateway: str = ""


class ControlAnswer(Struct, frozen=True):
    """Whether it was done; if not, why not."""

    done: bool
    reason: str = ""


def encode(message: Struct) -> bytes:
    """Encode one message as JSON bytes."""
    return msgspec.json.encode(message)


decode_offer = msgspec.json.Decoder(Offer).decode
decode_job_record = msgspec.json.Decoder(JobRecord).decode
decode_drain = msgspec.json.Decoder(SlotDrain).decode
decode_state_record = msgspec.json.Decoder(StateRecord).decode
decode_score = msgspec.json.Decoder(Score).decode
decode_lease = msgspec.json.Decoder(Lease).decode
decode_heartbeat = msgspec.json.Decoder(Heartbeat).decode
decode_progress = msgspec.json.Decoder(Progress).decode
decode_worker_job = msgspec.json.Decoder(WorkerJob).decode
decode_control = msgspec.json.Decoder(Control).decode
decode_control_answer = msgspec.json.Decoder(ControlAnswer).decode
decode_download = msgspec.json.Decoder(ModelDownload).decode
decode_outcome = msgspec.json.Decoder(Outcome).decode
