"""Train several times within one job and submit the run with the lowest held-out loss.

    next trial -> train (the ordinary loop) -> score -> keep or drop -> ... -> average the best -> submit

Rank 0's record decides, so all processes and a resumed job make the same choices.
"""

from __future__ import annotations

import traceback

import numpy as np
import torch
from msgspec.structs import replace

from shared.errors import EngineError, PlanError
from shared.messages.offers import TaskType
from shared.messages.runs import Outcome, OutcomeStatus, Phase
from shared.planning.plan import Plan
from shared.planning.profiles import resolve
from shared.planning.recipe import Recipe
from shared.planning.throughput import COMPILE_GAIN
from trainer_node.engine import prepare
from trainer_node.engine.assemble import make_saver
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.distributed.process_group import is_lost_peer
from trainer_node.engine.distributed.sharding import fitted
from trainer_node.engine.model.loading import load_config
from trainer_node.engine.model.shape import model_shape
from trainer_node.engine.search import rounds
from trainer_node.engine.search.arm_speed import estimate, on_devices
from trainer_node.engine.search.choose import submit_best
from trainer_node.engine.search.runner import TrialRunner, clock_tokens, write_known
from trainer_node.engine.search.speed import is_wanted, measure_speed
from trainer_node.engine.search.strategy.best_trial import best_of, is_long
from trainer_node.engine.search.strategy.budget import Budget
from trainer_node.engine.search.strategy.first_trial import arm_name
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.time_left import budget_of, end_at
from trainer_node.engine.search.trial import MOST_STARTS, SearchRecord, Trial, read_search, write_search
from trainer_node.engine.search.winner import rate_search
from trainer_node.engine.search.winner.weight_rate import with_weight_rate
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.checkpoint import Checkpoint
from trainer_node.engine.train.oom_fallback import SmallerPlan, smaller_by, was_too_large


class FailedTrial(Exception):
    """A trial failed in one of several processes, and is noted as failed: all must start again without it.

    The others may be inside a collective that this one will never join.
    """


def begin_search(
    run: RunContext, record: RunRecord, plan: Plan, data: JobData, models: list[torch.nn.Module]
) -> SearchRecord | None:
    """Return the record of a search that has tried nothing yet; None if the job is one training run.

    It is one if its profile doesn't search, or if it searches by probes and every arm must be sharded: the
    probes' rates come from the model's weights, which a sharded model doesn't have yet.
    """
    plans = _arms(run, plan, data) if resolve(run.job.profile).searches else {}
    if not plans:
        return None
    plans = _with_weight_rates(run, plans, models)
    now = run.clock.time()
    found = SearchRecord(began_at=now, all_s=end_at(run, record, plans.values()) - now, plans=plans)
    if not resolve(run.job.profile).probes:
        found = rounds.as_population(run, record, found, data)
    write_known(run, found)
    return found


def take_up(
    run: RunContext, known: SearchRecord, plan: Plan, found: Checkpoint | None
) -> tuple[SearchRecord, Checkpoint | None]:
    """Return the record to go on with after a restart, and the checkpoint of the trial under way, if any.

    `plan` is the newest on disk: if memory ran out since the record was written, the arm under way needs less
    from now on. A trial that ends its worker MOST_STARTS times, without a checkpoint, is given up if another
    one has a loss: the node would give up the whole job. A start with a smaller plan doesn't count.
    """
    if known.width > 1:
        return rounds.take_up(run, known), None
    known = on_devices(known, run.process_group.world)
    plans = {arm: fitted(one, run.process_group) for arm, one in known.plans.items()}
    is_told = any(one.deviations == plan.deviations for one in known.plans.values())  # maybe of another arm
    needs_less = was_too_large(plan) and not is_told
    if known.trial and needs_less:
        arm = known.trial.arm
        smaller = smaller_by(plans[arm], fitted(plan, run.process_group))
        if plan.deviations[-1].what != "parallel" or not is_searched(smaller, resolve(run.job.profile)):
            smaller = replace(smaller, parallel=plans[arm].parallel)
        plans[arm] = smaller
    known = replace(known, plans=plans)
    if found and found.manifest.position.trial != known.number:
        found = None  # of a trial that is done
    if known.in_probe:
        found = None  # a probe is short, and judged by all its steps: it is run again
    if known.trial and found is None and not needs_less:
        known = replace(known, starts=known.starts + 1)
        if known.starts > MOST_STARTS and (known.in_probe or best_of(known.done)):
            run.reporter.message(
                f"trial {known.number + 1} is given up: its worker ended {MOST_STARTS} times"
            )
            known = known.failed()
    write_known(run, known)
    return known, found


def search(
    run: RunContext,
    record: RunRecord,
    known: SearchRecord,
    models: list[torch.nn.Module],
    data: JobData,
    found: Checkpoint | None,
) -> Outcome:
    """Try, choose and submit.

    `models` holds the base model, if it is loaded; it is taken out. `found` is a checkpoint of the trial
    under way. Once a trial has a loss, one that fails does not fail the job.
    """
    dev = data.dev.take(np.arange(len(record.base_losses)))
    if known.width > 1:
        return rounds.search(run, record, known, models, data, dev)
    runner = TrialRunner(run, record, data, dev, known, make_saver(run, record, known.plans.values()), models)
    run.reporter.phase(Phase.TRAIN)
    while True:
        trial = runner.known.trial or _begin_trial(runner)
        if trial is None:
            return submit_best(runner)
        try:
            went_on = runner.run_trial(trial, found)
        except Exception as error:
            if best_of(runner.known.done) is None or isinstance(error, SmallerPlan) or is_lost_peer(error):
                raise
            traceback.print_exc()
            run.reporter.message(f"trial {runner.number + 1} failed: {error}")
            _note_failed(runner)
            if not run.process_group.is_single:
                raise FailedTrial from error
            runner.forget()
            if any(result.loss is not None and is_long(result.trial) for result in runner.known.done):
                return submit_best(runner)
            found = None
            continue  # so far there are only trials that compare rates
        if not went_on:
            return Outcome(status=OutcomeStatus.STOPPED, step=runner.known.steps_before)
        found = None


def _note_failed(runner: TrialRunner) -> None:
    """Give the trial under way up, also where another process than the main one failed alone."""
    failed = runner.known.failed()
    runner.note(failed)
    on_disk = read_search(runner.run.folder)
    if on_disk and on_disk.number < failed.number:  # or the main process is further already
        write_search(runner.run.folder, failed)


def _begin_trial(runner: TrialRunner) -> Trial | None:
    """Collective: choose the next trial and note that it is under way; None if none is worth its time."""
    run, known = runner.run, runner.known
    trial = _choose(runner)
    if trial is not None and is_wanted(run, known):
        measure_speed(run, runner, trial, budget_of(run, runner.record, known, runner.data))
        trial = _choose(runner)
    if trial is not None:
        if run.process_group.is_main:
            checkpoint.drop_later(run.checkpoints, known.steps_before)
        runner.note(runner.known.started(trial, clock_tokens(run)))
    return trial


def _choose(runner: TrialRunner) -> Trial | None:
    run, record, known = runner.run, runner.record, runner.known
    budget = budget_of(run, record, known, runner.data)
    return run.process_group.broadcast_object(_next(run, record, known, budget))


def _next(run: RunContext, record: RunRecord, known: SearchRecord, budget: Budget) -> Trial | None:
    """Return the next trial, by the profile's way of searching."""
    if not resolve(run.job.profile).probes:
        return next_trial(rounds.starts(known, record), known.done, budget)
    arm, plan = next(iter(known.plans.items()))
    first = rate_search.trial_of(arm, plan, record.train_tokens / record.train_examples)
    judge = rate_search.OF_PAIRS if run.job.task_type is TaskType.DPO else rate_search.OF_TEXT
    return rate_search.next_trial(first, known.done, budget, judge)


def _arms(run: RunContext, plan: Plan, data: JobData) -> dict[str, Plan]:
    """Return the plans to search among, by name: the job's own, and its profile's other ones that fit."""
    job = run.job
    plans = {arm_name(plan): plan} if is_searched(plan, resolve(job.profile)) else {}
    rate = plan.expected_tokens_per_s / (COMPILE_GAIN if plan.compile else 1.0)  # measured without compiling
    for profile in resolve(job.profile).arms:
        try:
            other = _drawn(run, data, plan, rate, profile)
        except (PlanError, EngineError) as error:
            run.reporter.message(f"{profile} is not tried: {error}")
            continue
        if is_searched(other, resolve(job.profile)):
            as_own = replace(other, profile=job.profile, betas=plan.betas, deviations=[], repair=plan.repair)
            plans.setdefault(arm_name(other), as_own)
    return plans


def _drawn(run: RunContext, data: JobData, own: Plan, rate: float, profile: str) -> Plan:
    """Return another profile's plan, at its own speed where the job's own plan has `rate` tokens/s."""
    config, all_s = load_config(run.job.model_path), run.job.ready_by - run.job.start_at
    plan = prepare.draw_plan(run, config, data, all_s, rate, profile)
    if run.simulated:  # a token takes as long with any method
        return plan
    faster = estimate(run, config, data, plan) / estimate(run, config, data, own)
    return prepare.draw_plan(run, config, data, all_s, faster * rate, profile)


def is_searched(plan: Plan, recipe: Recipe) -> bool:
    """Return whether a plan is one of those that a profile's search tries."""
    return plan.parallel != "fsdp2" or not recipe.probes


def _with_weight_rates(
    run: RunContext, plans: dict[str, Plan], models: list[torch.nn.Module]
) -> dict[str, Plan]:
    """Return the plans with the rates that their weights ask for, if the profile has such a rule."""
    recipe, job = resolve(run.job.profile), run.job
    if not models or not recipe.weight_rate:
        return plans
    parameters = model_shape(load_config(job.model_path)).parameters
    found = {}
    for arm, plan in plans.items():
        sized = recipe.sized(parameters, plan.devices, pairs=job.task_type is TaskType.DPO)
        found[arm] = with_weight_rate(plan, sized, models[0], job.task_type)
    return found
