"""A training run: what its worker gets, what it reports on its way, and how it ends."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from shared.messages.encoding import decoder
from shared.messages.hardware import Hardware
from shared.messages.offers import DatasetType, FileFormat, TaskType


class Scorer(StrEnum):
    """The upstream evaluator whose encoding of rows a job follows, by the month it is known from."""

    OFFERS = "gradients-2025-07"  # what offered jobs are scored by
    CONTESTS = "gradients-2026-07"  # what contests are scored by


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


class ErrorCode(StrEnum):
    """Why a worker failed, as far as the node must distinguish the cases."""

    BAD_DATA = "bad_data"  # unusable for every miner
    DATA_UNAVAILABLE = "data_unavailable"  # here: the network, a token or a disk may be the cause
    MODEL_UNAVAILABLE = "model_unavailable"
    UNSUPPORTED = "unsupported"
    DOES_NOT_FIT = "does_not_fit"
    OUT_OF_MEMORY = "out_of_memory"
    DEVICE = "device"
    DISK_FULL = "disk_full"
    TOO_LATE = "too_late"
    INTERNAL = "internal"


class OutcomeStatus(StrEnum):
    """How a worker process reports its own end."""

    READY = "ready"  # an export is on disk, verified, and waits to be submitted
    FAILED = "failed"  # the job can't be run; trying again would not help
    STOPPED = "stopped"  # asked to stop; a checkpoint is on disk


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
    copied_rows: int = 0  # the same as an earlier one, or nearly


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
    memory_share: float = 0.5  # of main memory, or of the limit on it; the rest is the other slot's
    processes: int = 0  # that train together; 0 = one per GPU, on a CPU one
    scorer: Scorer = Scorer.OFFERS  # whose rules the rows are encoded by
    kl_coefficient: float = 0.0  # what the divergence from the base model counts for in the score


class ModelDownload(Struct, frozen=True, kw_only=True):
    """How a model's weights came from the hub (`download.json`, written once, removed by the node)."""

    size: int  # bytes that were not on this machine
    seconds: float


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


decode_worker_job = decoder(WorkerJob)

decode_progress = decoder(Progress)

decode_outcome = decoder(Outcome)
