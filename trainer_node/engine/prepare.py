"""Everything before the first step: read the data, load the model, measure the base model, make the plan."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from shared.errors import DataError, DataUnavailableError, EngineError, PlanError, SettingsError
from shared.messages.hardware import Hardware
from shared.messages.runs import ErrorCode, Outcome, OutcomeStatus, Phase, WorkerJob
from shared.planning.hardware import computes_bf16, machine_memory
from shared.planning.memory_fit import layout_of
from shared.planning.plan import SUPPORTED_TASKS, DataStats, Plan
from shared.planning.planner import make_plan
from shared.planning.profiles import PROFILES, resolve
from shared.planning.throughput import (
    SAVE_BYTES_PER_S,
    Costs,
    Measured,
    Rows,
    expected_costs,
    flops_per_token,
    is_recorded,
    small_model_gain,
)
from trainer_node.engine import limits
from trainer_node.engine.context import JobData, RunContext
from trainer_node.engine.damage.repair import will_restore_frozen
from trainer_node.engine.data.download import public_name
from trainer_node.engine.data.examples import Examples, longest_row
from trainer_node.engine.data.held_out import alike, hold_out
from trainer_node.engine.data.token_cache import TokenCache, kept, tokens_of
from trainer_node.engine.distributed.process_group import ProcessGroup, least_free_memory
from trainer_node.engine.distributed.sharding import fitted
from trainer_node.engine.evaluate import base_states
from trainer_node.engine.evaluate.metric import Evaluation, measure, reference_logprobs, score
from trainer_node.engine.model.attention import waits_for_documents
from trainer_node.engine.model.exactness import label_model
from trainer_node.engine.model.loading import load_tokenizer
from trainer_node.engine.model.shape import model_shape, outline_of
from trainer_node.engine.reporter import write_outcome
from trainer_node.engine.safetensors_file import write_tensors

SCORE_SHARE = 0.03  # of the budget: what scoring the development rows once may cost
FREE_SHARE = 0.95  # of a GPU's memory is free before the first tensor: the driver and the context take some
SILENT_S = 600.0  # while the data is prepared: less than after what a node replaces a worker, to no avail
# Of a checkpoint, to measure the disk with: its speed, and not only how long a sync takes.
LEAST_TRIED, MOST_TRIED, TRIED_SHARE = 2**16, 2**26, 0.05


def ingest(run: RunContext, config: Any) -> JobData:
    """Rows into training and development examples."""
    job = run.job
    if job.task_type not in SUPPORTED_TASKS:
        raise EngineError(ErrorCode.UNSUPPORTED, f"the engine doesn't train {job.task_type.value} yet")
    run.reporter.phase(Phase.INGEST)
    if (template := job.dataset_type.chat_template) not in (None, "chatml", "tokenizer_default"):
        run.reporter.message(f"chat template {template!r:.80}: the model's own is used")
    length = longest_row(config, job.task_type, job.scorer)
    tokens = bounded_tokens(run, length)
    data = divided(job, tokens, length, vocabulary_of(config))
    for reason, count in sorted(data.dropped.items()):
        run.reporter.message(f"{count} of {tokens.rows} rows dropped: {reason}")
    if data.copies:
        text = "rows are the same as an earlier one, or nearly: they are held out with it or not at all"
        run.reporter.message(f"{data.copies} of {tokens.rows} {text}")
    return data


def bounded_tokens(run: RunContext, length: int) -> TokenCache:
    """Return the job's rows as tokens, in the job's share of the machine's memory, and never silent for long.

    The rest is the other slot's, also on a CPU, if there is one. Raises DataError.
    """
    most = int(run.job.memory_share * machine_memory()[0])

    def give_up() -> None:
        text = (
            f"no row was tokenised for {SILENT_S:.0f} s: the model's tokenizer or chat template "
            "doesn't finish on these rows"
        )
        outcome = Outcome(status=OutcomeStatus.FAILED, code=ErrorCode.UNSUPPORTED, error=text)
        write_outcome(run.folder, run.reporter, outcome)
        os._exit(1)  # nothing else ends a loop in a library

    try:
        with limits.silence_limit(run.reporter, SILENT_S, give_up), limits.memory_limit(most):
            tokenizer = load_tokenizer(run.job.model_path)
            return tokens_of(run.job, run.folder, tokenizer, length, run.reporter)
    except MemoryError as error:
        text = f"reading and tokenising the data needs more than {most / 1e9:.1f} GB of memory"
        raise DataUnavailableError(f"{public_name(run.job.dataset)}: {text}") from error


def vocabulary_of(config: Any) -> int:
    """Return how many tokens a model has embeddings for."""
    return int(config.get_text_config().vocab_size)


def divided(
    job: WorkerJob, tokens: TokenCache, length: int, vocabulary: int, *, near: bool = True
) -> JobData:
    """Return a job's tokens with the development rows held out; these are all that the scorer would score.

    Of the others those are dropped that are longer than the profile trains on. Raises DataError if none is
    left. Rows are dropped, too, with tokens that were added to the tokenizer and not to the model: a GPU
    would fail on them in a way that no later job survives. Without `near` only equal rows stay on one side.
    """
    examples, dropped = tokens.examples, tokens.dropped
    known = np.flatnonzero(examples.highest < vocabulary)
    if not len(known):
        raise DataError(f"every row has tokens above the {vocabulary} that the model has embeddings for")
    if count := len(examples) - len(known):
        dropped = {**dropped, "has a token that the model has no embedding for": count}
        examples = examples.take(known)
    groups = alike(examples, near=near)
    train, dev = hold_out(examples, job.seed, groups)
    most = PROFILES[job.profile].max_length if job.profile in PROFILES else length
    kept = np.flatnonzero(train.lengths <= most * train.group)
    if not len(kept):
        raise DataError(
            f"every training row is longer than the {most} tokens that the profile {job.profile} trains on: "
            "take another profile"
        )
    if count := len(train) - len(kept):
        dropped = {**dropped, f"longer than the profile's {most} tokens": count}
        train = train.take(kept)
    return JobData(train, dev, dropped, length, copies=len(examples) - sum(map(bool, groups)))


def load_data(run: RunContext, config: Any) -> JobData:
    """Return the job's rows, read by rank 0 for all."""
    return cast(
        JobData,
        run.process_group.broadcast_object(ingest(run, config) if run.process_group.is_main else None),
    )


def reload_data(run: RunContext, config: Any, fingerprint: str) -> JobData | str:
    """Return the rows that the run began with, read by rank 0 for all, or why they can't be had any more.

    From their tokens in the run's folder; without them from the data again.
    """
    answer: JobData | str | None = None
    if run.process_group.is_main:
        try:
            answer = _begun_with(run, config, fingerprint)
            if answer is None:
                read = ingest(run, config)
                same = read.train.fingerprint() == fingerprint
                answer = read if same else _begun_with(run, config, fingerprint)
            answer = answer or f"{public_name(run.job.dataset)} has changed since the run began"
        except DataError as error:
            answer = str(error)
    return cast(JobData | str, run.process_group.broadcast_object(answer))


def _begun_with(run: RunContext, config: Any, fingerprint: str) -> JobData | None:
    """Return the rows that the run began with, from the tokens in its folder; None if these are others."""
    known, length = kept(run.folder), longest_row(config, run.job.task_type, run.job.scorer)
    if known is None:
        return None
    for near in (True, False):  # older versions kept only equal rows on one side
        data = divided(run.job, known, length, vocabulary_of(config), near=near)
        if data.train.fingerprint() == fingerprint:
            return data
    return None


def baseline(
    run: RunContext, model: torch.nn.Module, data: JobData, draft: Plan
) -> tuple[JobData, Evaluation, float]:
    """Return the data with the development rows that were scored, the base model's metric, seconds per row.

    Preference pairs leave with their references. A model that is its own reference scores ln 2 on any pair.
    """
    job, references = run.job, list[NDArray[np.float32]]()
    run.reporter.phase(Phase.BASELINE)

    def untrained(model: torch.nn.Module, piece: Examples, *, process_group: ProcessGroup) -> Evaluation:
        references.append(reference_logprobs(model, piece, process_group=process_group))
        return Evaluation(math.log(2), np.full(len(piece), math.log(2)))

    most = len(data.dev) if run.simulated else min(len(data.dev), draft.dev_examples)
    until = run.clock.time() + SCORE_SHARE * (job.ready_by - job.start_at)
    dev = data.dev.take(np.arange(most))
    scored = score if dev.group == 1 else untrained
    model = label_model(model)  # once: its check costs as much as a piece
    result, row_s = measure(model, dev, run.clock, until, run.process_group, scored, run.reporter.alive)
    rows = len(result.per_example)
    if rows < len(data.dev):
        run.reporter.message(
            f"the metric is taken on {rows} of {len(data.dev)} held-out rows: no time for more"
        )
    run.reporter.losses(base=result.loss, dev=result.loss)
    dev = dev.take(np.arange(rows))
    if references:
        dev = dev.with_reference(np.concatenate(references))
    return replace(data, dev=dev), result, row_s


def data_stats(train: Examples) -> DataStats:
    """Return what the planner needs to know about the training rows."""
    return DataStats(
        examples=len(train),
        tokens=int(train.lengths.sum()),
        label_tokens=train.label_tokens,
        max_length=int(train.lengths.max()),
    )


def draw_plan(
    run: RunContext,
    config: Any,
    data: JobData,
    budget_s: float,
    train_tokens_per_s: float | None = None,
    profile: str = "",
    closing: Measured | None = None,
) -> Plan:
    """Return the plan for this job on these processes' devices in `budget_s`; the profile is the job's.

    Raises EngineError: UNSUPPORTED; DOES_NOT_FIT, or TOO_LATE if more than half of the job's time is gone.
    """
    job = run.job
    try:
        recipe = resolve(profile or job.profile)
    except SettingsError as error:
        raise EngineError(ErrorCode.UNSUPPORTED, str(error)) from error
    try:
        plan = make_plan(
            recipe,
            model_shape(config),
            data_stats(data.train),
            usable(job.hardware, run.process_group),
            budget_s,
            scored_length=data.max_length,
            tokens_per_s=train_tokens_per_s,
            family=job.model,
            bf16=computes_bf16(job.hardware),
            task_type=job.task_type,
            divergence=base_states.wanted(job),
            closing=closing,
        )
    except PlanError as error:
        if 2 * budget_s < job.ready_by - job.start_at:
            raise EngineError(ErrorCode.TOO_LATE, f"{budget_s:.0f} s are left: {error}") from error
        raise
    return fitted(plan, run.process_group)


def train_rate(plan: Plan, forward_rate: float) -> float:
    """Return training tokens/s from those of a forward pass.

    Dense: 3 passes' worth of work; frozen weights: 2; one more to recompute activations.
    """
    dense = any(module.method == "dense" for module in plan.modules)
    return forward_rate / ((3.0 if dense else 2.0) + (1.0 if plan.activation_checkpointing else 0.0))


def usable(hardware: Hardware, process_group: ProcessGroup) -> Hardware:
    """Return the part of the slot that is trained on: a GPU for each process."""
    return hardware if hardware.device == "cpu" else replace(hardware, count=process_group.world)


def with_free_memory(job: WorkerJob, process_group: ProcessGroup, report: Callable[[str], None]) -> WorkerJob:
    """Collective: the job with the GPU memory that is free, if that is clearly less than stated."""
    free, stated = least_free_memory(process_group), job.hardware.memory_bytes
    if free is None or free >= FREE_SHARE * stated:
        return job
    report(
        f"only {free / 2**30:.1f} of {stated / 2**30:.1f} GiB of a GPU are free: the plan is made for that"
    )
    return replace(job, hardware=replace(job.hardware, memory_bytes=free))


def first_costs(run: RunContext, config: Any, plan: Plan, closing: Measured, ingest_s: float) -> Costs:
    """Return what was measured, and bytes over the disk's measured speed for what wasn't yet."""
    budget_s = run.job.ready_by - run.job.start_at
    whole = will_restore_frozen(plan)
    costs = expected_costs(model_shape(config), plan.modules, closing, budget_s, plan.extras, whole=whole)
    costs.import_s, costs.ingest_s = run.import_s, ingest_s
    return costs


def save_rate(run: RunContext, plan: Plan) -> float:
    """Collective: bytes per second of a hashed, synced save on the run's disk, of a part of a checkpoint."""
    if run.simulated:
        return SAVE_BYTES_PER_S
    rate = SAVE_BYTES_PER_S
    if run.process_group.is_main:
        size = int(min(MOST_TRIED, max(LEAST_TRIED, TRIED_SHARE * 12 * plan.trained_parameters)))
        path, began = run.folder / ".disk-speed", time.monotonic()
        try:
            write_tensors(path, {"bytes": torch.ones(size, dtype=torch.uint8)})
            rate = size / max(1e-6, time.monotonic() - began)
        except OSError:
            pass  # a full disk is found out, and reported, by the first checkpoint
        finally:
            path.unlink(missing_ok=True)
    return run.process_group.broadcast_floats(rate)[0]


def recorded_gain(
    config: Any,
    plan: Plan,
    data: JobData,
    hardware: Hardware,
    device: torch.device,
    *,
    divergence: bool = False,
) -> float:
    """Return how much faster a small model's steps are than its forward passes say, which aren't recorded.

    `divergence`: that from the base model is a part of the loss.
    """
    shape, stats = model_shape(config), data_stats(data.train)
    lora = any(module.method == "lora" for module in plan.modules)
    layout, dropout = layout_of(plan, cpu=hardware.device == "cpu"), plan.dropout if lora else 0.0
    if not is_recorded(shape, layout, dropout=dropout, plain=data.train.group == 1 and not divergence):
        return 1.0
    if waits_for_documents(outline_of(config), device):
        return 1.0
    rows = Rows(stats.examples, stats.tokens / stats.examples, stats.label_tokens / stats.tokens)
    flops = flops_per_token(shape, plan.modules, rows, checkpointing=False, extras=plan.extras)
    return small_model_gain(shape, layout, flops, hardware)


def set_threads(job: WorkerJob, process_group: ProcessGroup) -> int:
    """Use this slot's share of the cores, and this process's share of those."""
    threads = max(1, (job.threads or len(os.sched_getaffinity(0)) // 2) // process_group.world)
    torch.set_num_threads(threads)
    return threads
