"""One training run, from job.json to outcome.json, readable from top to bottom:

    ingest -> load -> baseline -> plan -> train -> choose -> export -> verify

Started again in the same folder it goes on from the newest checkpoint. Whatever happens, the outcome is
written before `ready_by`: when time is short, parts of the closing are skipped (time_budget.affordable).
"""

from __future__ import annotations

import os
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import structlog
import torch
from msgspec.structs import replace

from shared.clock import TokenClock, WallClock
from shared.errors import EngineError
from shared.messages.runs import ErrorCode, Outcome, OutcomeStatus, Phase, decode_worker_job
from shared.planning.plan import Plan, in_numbers
from shared.planning.throughput import Costs, Measured
from trainer_node.engine import context, prepare
from trainer_node.engine.as_is import checkpoint_as_is, submit_as_is
from trainer_node.engine.assemble import assemble, load_base
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.damage.repair import network_of, repaired
from trainer_node.engine.distributed.launch import AGAIN, rank_of
from trainer_node.engine.distributed.process_group import NotMetError, destroy, is_lost_peer, join
from trainer_node.engine.distributed.sharding import fitted, shard_frozen
from trainer_node.engine.evaluate import base_states, reference_logprobs
from trainer_node.engine.export import unverified
from trainer_node.engine.export.reload_time import reload_s
from trainer_node.engine.failure import explain
from trainer_node.engine.finish import finish_run
from trainer_node.engine.memory.oom import release
from trainer_node.engine.model.loading import load_config
from trainer_node.engine.reporter import Reporter, write_outcome
from trainer_node.engine.search.choose import submittable
from trainer_node.engine.search.known_run import forget, read_known
from trainer_node.engine.search.search import FailedTrial, begin_search, search, take_up
from trainer_node.engine.search.trial import SearchRecord
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.checkpoint import Checkpoint
from trainer_node.engine.train.oom_fallback import SmallerPlan, train_or_stop, was_too_large


def main(job_path: Path, stop: Stop, import_s: float = 0.0) -> int:
    """Run a job and write its outcome; the process's exit status: 0 = ready or stopped, 1 = failed.

    Of several processes rank 0 writes it, unless another is gone. AGAIN: start all, with a smaller plan,
    without a trial that failed, or at another port.
    """
    folder = job_path.parent
    job = decode_worker_job(job_path.read_bytes())
    structlog.contextvars.bind_contextvars(task=job.task, slot=job.slot)
    clock = TokenClock(job.start_at, job.token_clock_rate) if job.clock == "token" else WallClock()
    is_main = (rank_of(os.environ) or 0) == 0
    reporter = Reporter(folder / "progress.jsonl" if is_main else Path(os.devnull), job.task, job.slot)
    stop.write_outcome = lambda: write_outcome(folder, reporter, Outcome(status=OutcomeStatus.STOPPED))
    process_group = None
    try:
        process_group = join(job.hardware, job.ready_by - clock.time())
        job = prepare.with_free_memory(job, process_group, reporter.message)
        outcome = pipeline(RunContext(job, folder, clock, reporter, stop, process_group, import_s))
    except (SmallerPlan, FailedTrial):
        return AGAIN
    except NotMetError:
        traceback.print_exc()
        return AGAIN
    except Exception as error:
        traceback.print_exc()
        if is_lost_peer(error):  # nothing is wrong with this one, nor with the job: start all of them again
            return 1
        code, text = explain(error)
        outcome = Outcome(status=OutcomeStatus.FAILED, code=code, error=text)
    if is_main:
        stop.close()
        write_outcome(folder, reporter, outcome)
    if process_group is not None and outcome.status is not OutcomeStatus.FAILED:
        try:  # when all is said: the library may fail or hang in it
            destroy(process_group)
        except Exception:
            traceback.print_exc()
    return 1 if outcome.status is OutcomeStatus.FAILED else 0


def pipeline(run: RunContext) -> Outcome:
    """Run everything; raise what `explain` explains."""
    checkpoints = run.folder / "checkpoints"
    if run.process_group.is_main:
        checkpoint.clean(checkpoints)
    known, searched = read_known(run)
    # Without its record a run that is over still has an export that was finished.
    late = unverified.is_late(run.left_s, known[0].costs) if known else run.left_s <= 0
    if late and (
        outcome := run.process_group.broadcast_object(unverified.finished(run.folder, run.reporter))
    ):
        return outcome
    found = None
    if known:
        found = run.process_group.broadcast_object(
            newest_checkpoint(checkpoints, run.reporter) if run.process_group.is_main else None
        )
    if isinstance(run.clock, TokenClock):
        known_tokens = [searched.clock_tokens] if searched else []
        if found and not (searched and searched.in_probe):  # a probe is run again from its first step
            known_tokens.append(found.manifest.position.clock_tokens)
        run.clock.tokens = max(known_tokens, default=0)
    if found is None and not (searched and searched.done) and run.left_s <= 0:
        raise EngineError(ErrorCode.TOO_LATE, "no time is left and there is no checkpoint to submit")
    prepare.set_threads(run.job, run.process_group)
    if known and searched:
        return resume_search(run, *known, searched, found)
    if known and (found or was_too_large(known[1])):
        return resume(run, *known, found)
    forget(run)
    return begin(run)


def newest_checkpoint(folder: Path, reporter: Reporter) -> Checkpoint | None:
    """Return rank 0's newest checkpoint, or else that of another process with a trial of its own."""
    for one in (folder, *sorted(folder.glob("rank-*"))):
        if found := checkpoint.newest(one, reporter.message):
            return found
    return None


def begin(run: RunContext) -> Outcome:
    """Begin a fresh run."""
    budget_s, start = run.left_s, run.clock.time()
    run.reporter.phase(Phase.LOADING)
    config = load_config(run.job.model_path)
    data = prepare.load_data(run, config)
    ingested = run.clock.time()
    draft = prepare.draw_plan(run, config, data, budget_s)
    model = load_base(run, draft)
    if draft.parallel == "fsdp2":
        model = shard_frozen(model, run.process_group)
    load_s = run.clock.time() - ingested
    fingerprint = data.train.fingerprint()
    data, base, row_s = prepare.baseline(run, model, data, draft)
    if run.simulated:
        rate = run.job.token_clock_rate
    else:
        rate = prepare.train_rate(draft, float(data.dev.lengths.mean()) / row_s)
        compared = base_states.wanted(run.job)
        hardware, device = run.job.hardware, run.process_group.device
        rate *= prepare.recorded_gain(config, draft, data, hardware, device, divergence=compared)
    closing = Measured(
        load_s=load_s,
        score_s=row_s * len(data.dev),
        save_bytes_per_s=prepare.save_rate(run, draft),
        reload_s=reload_s(draft, network_of(model), load_s),
    )
    plan = prepare.draw_plan(run, config, data, budget_s, rate, closing=None if run.simulated else closing)
    data = base_states.first(run, model, reference_logprobs.first(run, model, data, plan), plan)
    plan = repaired(run, model, data, base, plan)
    closing = replace(closing, reload_s=reload_s(plan, network_of(model), load_s))
    measured = prepare.first_costs(run, config, plan, closing, ingested - start)
    record = RunRecord(
        fingerprint=fingerprint,
        base_losses=base.per_example.tolist(),
        train_examples=len(data.train),
        train_tokens=int(data.train.lengths.sum()),
        dropped=data.dropped,
        copies=data.copies,
        devices=run.process_group.world,
        costs=Costs() if run.simulated else measured,
        without_divergence=base_states.wanted(run.job) and data.train.base is None,
    )
    context.write_record(run, record, plan)
    announce(run, plan)
    sharded = "fsdp2" in (draft.parallel, plan.parallel)
    models = [] if sharded else [model]
    del model  # a search frees it, and sharded weights would be there twice
    if sharded:
        release()
    if searched := begin_search(run, record, plan, data, models):
        return search(run, record, searched, models, data, None)
    # Sharded again: what is trained has other dtypes.
    return train(run, record, plan, models.pop() if models else load_base(run, plan), data, None)


def resume(run: RunContext, record: RunRecord, plan: Plan, found: Checkpoint | None) -> Outcome:
    """Go on from a checkpoint, or start over with a plan that had to shrink before there was one.

    If there is hardly time, or the data is gone, the checkpoint is submitted as it is. Any number of devices
    may go on.
    """
    record, plan = record.resumed(run.process_group.world), fitted(plan, run.process_group)
    context.write_record(run, record, plan)
    if found:
        position = found.manifest.position
        run.reporter.resumed(position.step, position.tokens, record.base_loss)
        run.reporter.message(f"resumed from step {position.step}")
        if position.schedule.progress < 1.0 and not found.has_moments:
            run.reporter.message("the checkpoint has no optimizer moments: they start again from zero")
    data: JobData | str = "no time is left to train or verify"
    if found is None or not unverified.is_late(run.left_s, record.costs):
        data = prepare.reload_data(run, load_config(run.job.model_path), record.fingerprint)
    if not isinstance(data, str):
        model = load_base(run, plan)
        data = asked_again(run, record, plan, model, data)
        if not isinstance(data, str):
            return train(run, record, plan, model, data, found)
        del model  # the next one is whole, in main memory
    if found is None:
        raise EngineError(ErrorCode.DATA_UNAVAILABLE, data)  # at the start it could be used
    whole = partial(load_base, run, plan, whole=True)
    return submit_as_is(run, record, whole, checkpoint_as_is(found, plan), data)


def asked_again(
    run: RunContext, record: RunRecord, plan: Plan, model: torch.nn.Module, data: JobData
) -> JobData | str:
    """Collective: the rows with what the base model said of them, or why that can't be had any more."""
    base = partial(frozen_base, run, plan, model)
    return base_states.again(run, base, reference_logprobs.again(run, base, data, record), record)


def frozen_base(run: RunContext, plan: Plan, model: torch.nn.Module) -> torch.nn.Module:
    """Collective: the base model to be scored with; one without weights is read again and sharded."""
    if plan.parallel != "fsdp2":
        return model
    return shard_frozen(load_base(run, plan), run.process_group)


def resume_search(
    run: RunContext, record: RunRecord, plan: Plan, searched: SearchRecord, found: Checkpoint | None
) -> Outcome:
    """Go on with a search: with the trial that was under way, from its checkpoint if it has one."""
    record = record.resumed(run.process_group.world)
    run.reporter.resumed(searched.steps_before, searched.tokens_before, record.base_loss)
    run.reporter.message(f"resumed in trial {searched.number + 1}")
    data: JobData | str = "no time is left to train or verify"
    if not unverified.is_late(run.left_s, record.costs):
        data = prepare.reload_data(run, load_config(run.job.model_path), record.fingerprint)
    models: list[torch.nn.Module] = []
    # The base model may have to answer again.
    if not isinstance(data, str) and base_states.is_relative(run.job, data.train):
        first = fitted(next(iter(searched.plans.values())), run.process_group)
        models = [load_base(run, first)]
        data = asked_again(run, record, first, models[0], data)
    if isinstance(data, str):
        models.clear()  # the next one is whole, in main memory
        context.write_record(run, record, plan)
        if not run.process_group.is_main:
            return Outcome(status=OutcomeStatus.READY)
        with run.patience():
            chosen = submittable(run, searched, found)
        return submit_as_is(run, record, partial(load_base, run, chosen.plan, whole=True), chosen, data)
    searched, current = take_up(run, searched, plan, found)
    context.write_record(run, record, next(iter(searched.plans.values())))
    return search(run, record, searched, models, data, current)


def announce(run: RunContext, plan: Plan) -> None:
    """Report the plan and every deviation from the profile."""
    run.reporter.message(in_numbers(plan))
    for d in plan.deviations:
        run.reporter.message(f"plan: {d.what} is {d.got} instead of {d.wanted}: {d.reason}")
    if not run.process_group.is_single:
        run.reporter.message(f"{run.process_group.world} processes train together, by {plan.parallel}")


def train(
    run: RunContext,
    record: RunRecord,
    plan: Plan,
    model: torch.nn.Module,
    data: JobData,
    found: Checkpoint | None,
) -> Outcome:
    """Train until the clock says stop, then choose and submit."""
    state = assemble(run, record, plan, model, data, found)
    run.reporter.phase(Phase.TRAIN)
    if not train_or_stop(run, state):
        return Outcome(status=OutcomeStatus.STOPPED, step=state.step)
    if state.step == 0:
        raise EngineError(ErrorCode.TOO_LATE, "not one step could be trained in the time that was left")
    if state.health.skipped >= state.step:
        run.reporter.message("no step had a finite gradient: the weights are still the base model's")
    dev = data.dev.take(np.arange(len(record.base_losses)))
    return finish_run(run, record, state, dev)
