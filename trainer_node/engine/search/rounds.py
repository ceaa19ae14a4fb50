"""A search as a population: in each round every process trains a trial of its own, on its own device.

    next round -> each trains, scores and keeps its weights -> all results into one record -> ... -> submit

A process is alone while it trains: its own clock, its own checkpoints, no collective. At the end of a round
all meet. A trial that fails has no loss; the search goes on as long as another one has.
"""

from __future__ import annotations

import shutil
import traceback
from dataclasses import replace

import msgspec
import torch
from msgspec import Struct

from shared.clock import TokenClock
from shared.errors import EngineError
from shared.messages.runs import ErrorCode, Outcome, OutcomeStatus, Phase
from shared.planning.plan import Plan
from trainer_node.engine import prepare
from trainer_node.engine.assemble import make_saver
from trainer_node.engine.context import LEAST_PATIENCE_S, JobData, RunContext, RunRecord
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.distributed.sharding import fitted
from trainer_node.engine.failure import explain
from trainer_node.engine.memory.oom import is_broken_device
from trainer_node.engine.model.loading import load_config
from trainer_node.engine.search.choose import submit_best
from trainer_node.engine.search.runner import Trained, TrialRunner, clock_tokens, write_known
from trainer_node.engine.search.speed import is_wanted, measure_speed
from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.strategy.budget import Budget
from trainer_node.engine.search.strategy.first_trial import trial_of
from trainer_node.engine.search.strategy.population import give_up, is_population, next_round, on_one_device
from trainer_node.engine.search.time_left import budget_of
from trainer_node.engine.search.trial import MOST_STARTS, SearchRecord, Trial, TrialResult, without_loss
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.checkpoint import Checkpoint

LATE = 2.0  # a trial may take so many times what it was planned to, before its silence counts


class TrialReport(Struct, frozen=True, kw_only=True):
    """What a process has to say at the end of a round."""

    stopped: bool = False
    result: TrialResult | None = None  # None: it had nothing to train, or was stopped
    steps: int = 0
    plan: Plan | None = None  # as it was carried out; None: it was not
    size: int = 0  # bytes of the trained weights in fp32
    clock_tokens: int = 0
    save_s: float = 0.0
    error: tuple[ErrorCode, str] | None = None


def as_population(run: RunContext, record: RunRecord, known: SearchRecord, data: JobData) -> SearchRecord:
    """Let a search run a trial on each device, if one has the time for it. Every process must call it.

    No arm may need all devices' memory.
    """
    group = run.process_group
    if group.is_single or any(plan.parallel == "fsdp2" for plan in known.plans.values()):
        return known
    plans = {arm: _alone(run, plan, data) for arm, plan in known.plans.items()}
    population = msgspec.structs.replace(known, plans=plans, width=group.world)
    budget = budget_of(run, on_own_rows(record, group.world), population, data)
    found = group.broadcast_object(population if is_population(starts(population, record), budget) else known)
    if found.width > 1:
        run.reporter.message(f"{found.width} devices train a trial each, at the same time")
    return found


def _alone(run: RunContext, plan: Plan, data: JobData) -> Plan:
    """Return a plan as one device carries it out, which may record a small model's passes."""
    alone, hardware = on_one_device(plan), run.job.hardware
    if hardware.device == "cpu" or plan.parallel == "single":
        return alone
    config, compared = load_config(run.job.model_path), data.train.base is not None
    gain = prepare.recorded_gain(config, alone, data, hardware, run.process_group.device, divergence=compared)
    return msgspec.structs.replace(alone, expected_tokens_per_s=gain * alone.expected_tokens_per_s)


def take_up(run: RunContext, known: SearchRecord) -> SearchRecord:
    """Return the record to go on with after a restart, maybe on another number of devices.

    Their round is chosen again, and its checkpoints are deleted. On one device there are no rounds.
    """
    group = run.process_group
    if known.width != group.world:
        run.reporter.message(f"{group.world} devices instead of {known.width}: the trials under way are lost")
        plans = {arm: fitted(plan, group) if group.is_single else plan for arm, plan in known.plans.items()}
        known = msgspec.structs.replace(known, plans=plans, width=group.world, trial=None, others=[])
        if group.is_main:
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    if known.trial:
        known = msgspec.structs.replace(known, starts=known.starts + 1)
    write_known(run, known)
    return known


def search(
    run: RunContext,
    record: RunRecord,
    known: SearchRecord,
    models: list[torch.nn.Module],
    data: JobData,
    dev: Examples,
) -> Outcome:
    """Try, choose and submit; every process must call it."""
    alone, group = run.alone(), run.process_group
    own = on_own_rows(record, group.world)
    saver = make_saver(alone, own)
    runner = TrialRunner(alone, own, data, dev, known, saver, models, place=group.rank)
    run.reporter.phase(Phase.TRAIN)
    while True:
        trials = runner.known.running or choose_round(run, runner)
        if not trials:
            if group.is_main:
                free_checkpoints(run)
            return submit_best(replace(runner, run=run, record=record, place=0))
        begin_round(run, runner, trials)
        reports = meet(run, runner, trials, budget_of(run, own, runner.known, data))
        if any(report.stopped for report in reports):
            return Outcome(status=OutcomeStatus.STOPPED, step=runner.known.steps_before)
        end_round(run, runner, record, reports)


def choose_round(run: RunContext, runner: TrialRunner) -> list[Trial]:
    """Collective: choose the trials of the next round, the first ones by the speed that steps have."""
    forget_stop(run)  # before the others time steps, which they don't if they are asked to stop

    def chosen() -> list[Trial]:
        known, record = runner.known, runner.record
        budget = budget_of(run, record, known, runner.data)
        return run.process_group.broadcast_object(next_round(starts(known, record), known.done, budget))

    trials = chosen()
    if trials and is_wanted(run, runner.known):
        budget = budget_of(run, runner.record, runner.known, runner.data)
        measure_speed(run, runner, trials[0], budget)
        trials = chosen()
    return trials


def begin_round(run: RunContext, runner: TrialRunner, trials: list[Trial]) -> None:
    """Write down which trials are under way, unless they were before a restart."""
    known = runner.known
    if not known.running:
        checkpoint.drop_later(runner.run.checkpoints, known.steps_before)
        runner.known = known.started(trials[0], clock_tokens(run), trials[1:])
        write_known(run, runner.known)
    forget_stop(run)
    for place, trial in enumerate(trials):
        run.reporter.message(f"trial {known.number + place + 1}, on device {place}: {trial}")


def forget_stop(run: RunContext) -> None:
    """Remove an earlier stop's file; the others look for it after their next meeting."""
    if run.process_group.is_main:
        run.stop_file.unlink(missing_ok=True)


def meet(run: RunContext, runner: TrialRunner, trials: list[Trial], budget: Budget) -> list[TrialReport]:
    """Train a trial in each process; return what every one has to say of its own."""
    known, group, place = runner.known, run.process_group, runner.place
    found = own_checkpoint(runner) if known.starts > 1 and place < len(trials) else None
    here = group.gather_objects(found is not None)[: len(trials)]
    given_up = give_up(here, known.starts, MOST_STARTS, has_loss=best_of(known.done) is not None)
    if isinstance(runner.run.own_clock, TokenClock):
        runner.run.own_clock.tokens = known.clock_tokens
    report = TrialReport()
    if place < len(trials):
        if given_up[place]:
            error = (ErrorCode.INTERNAL, f"its worker ended {MOST_STARTS} times: it is given up")
            report = TrialReport(result=without_loss(trials[place]), error=error)
        else:
            report = train_alone(runner, trials[place], found)
    if report.stopped and group.is_main:
        run.stop_file.touch()
    planned_s = max(map(budget.cost_s, trials))
    with run.reporter.patience(max(LEAST_PATIENCE_S, LATE * planned_s)):
        return group.gather_objects(report)


def train_alone(runner: TrialRunner, trial: Trial, found: Checkpoint | None) -> TrialReport:
    """Train a trial on this process's device; one that fails is reported, and the model is forgotten."""
    costs, run = runner.record.costs, runner.run
    error: tuple[ErrorCode, str] | None = None
    trained: Trained | None = None
    try:
        trained = runner.train(trial, found)
    except Exception as failure:
        if is_broken_device(failure):
            raise
        traceback.print_exc()
        error = explain(failure)
    if error:  # outside of the handler, which holds what the trial had in memory
        runner.forget()
        return TrialReport(result=without_loss(trial), error=error, clock_tokens=clock_tokens(run))
    if trained is None:
        return TrialReport(stopped=True)
    return TrialReport(
        result=trained.result,
        steps=trained.steps,
        plan=trained.plan,
        size=trained.size,
        clock_tokens=clock_tokens(run),
        save_s=costs.save_s,
    )


def end_round(run: RunContext, runner: TrialRunner, record: RunRecord, reports: list[TrialReport]) -> None:
    """Put the results of a round on record. Raises EngineError if a trial failed and none has a loss."""
    first, finished = runner.known.number, [report for report in reports if report.result]
    tokens = max(runner.known.clock_tokens, *(report.clock_tokens for report in finished))
    if isinstance(run.own_clock, TokenClock):
        run.own_clock.tokens = tokens
    for report in finished:
        assert report.result is not None
        if report.plan:
            tell_smaller(run, runner, report)
            runner.plan_again(report.result.trial.arm, report.plan)
        runner.known = runner.known.finished(report.result, report.steps, tokens)
    for number, report in enumerate(finished, first):
        if report.error:
            run.reporter.message(f"trial {number + 1} failed: {report.error[1]}")
    if best_of(runner.known.done) is None:
        for report in finished:
            if report.error:
                raise EngineError(*report.error)
    write_known(run, runner.known)
    save_s = max(report.save_s for report in finished)
    for costs in (record.costs, runner.record.costs):  # as the slowest says, in every process
        costs.save_s = save_s or costs.save_s
    replace(runner, run=run).prune(max(report.size for report in finished))
    for number in range(first, runner.known.number):
        replace(runner, run=run).tell(number)


def tell_smaller(run: RunContext, runner: TrialRunner, report: TrialReport) -> None:
    """Report where a trial needed less memory than its arm's plan."""
    assert report.result is not None
    assert report.plan is not None
    before = len(runner.known.plans[report.result.trial.arm].deviations)
    for deviation in report.plan.deviations[before:]:
        run.reporter.message(
            f"{deviation.what} is {deviation.got} instead of {deviation.wanted}: {deviation.reason}"
        )


def own_checkpoint(runner: TrialRunner) -> Checkpoint | None:
    """Return the newest checkpoint of this process's trial under way, or None."""
    checkpoint.clean(runner.run.checkpoints)
    for found in checkpoint.whole(runner.run.checkpoints, runner.run.reporter.message):
        return found if found.manifest.position.trial == runner.number else None
    return None


def free_checkpoints(run: RunContext) -> None:
    """Delete the checkpoints of the processes that were alone: what is submitted is kept elsewhere."""
    for folder in run.folder.glob("checkpoints/rank-*"):
        shutil.rmtree(folder)


def on_own_rows(record: RunRecord, devices: int) -> RunRecord:
    """Return the record as one device has it, which scores all development rows alone."""
    costs = msgspec.structs.replace(record.costs, score_s=devices * record.costs.score_s)
    return msgspec.structs.replace(record, costs=costs)


def starts(known: SearchRecord, record: RunRecord) -> list[Trial]:
    """Return the arms' first trials."""
    mean_length = record.train_tokens / record.train_examples
    return [trial_of(arm, plan, mean_length) for arm, plan in known.plans.items()]
