"""Train several times within one job and submit the run with the lowest held-out loss.

    next trial -> train (the ordinary loop) -> score -> keep or drop -> ... -> average the best -> submit

Rank 0's record decides, so all processes and a resumed job make the same choices.
"""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch

from shared.clock import TokenClock
from shared.errors import EngineError, PlanError
from shared.messages import ErrorCode, Outcome, OutcomeStatus, Phase
from shared.planning.plan import Deviation, Plan
from shared.planning.planner import step_size
from shared.planning.profiles import resolve
from trainer_node.engine import context, prepare
from trainer_node.engine.assemble import Adapted, Place, adapt, load_base, make_saver, make_state
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.evaluate.candidates import (
    Candidate,
    TrainProgress,
    loaded,
    loss_over_base,
    ranked,
)
from trainer_node.engine.evaluate.metric import Score, measure
from trainer_node.engine.finish import free_optimizer, lowest_point, submit, untrained
from trainer_node.engine.model.loading import load_config
from trainer_node.engine.search.strategy import Budget, best_of, next_trial
from trainer_node.engine.search.trial import SearchRecord, Trial, TrialResult, read_search, write_search
from trainer_node.engine.time_budget import SAFETY, SLACK_S, Part, affordable
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.async_saver import Saver
from trainer_node.engine.train.checkpoint import Checkpoint
from trainer_node.engine.train.oom import release
from trainer_node.engine.train.oom_fallback import descend, smaller_by
from trainer_node.engine.train.state import TrainState

KEPT = 3  # trials whose weights stay on disk: the best ones, to be averaged
KEPT_BYTES = 4e9  # of trained weights: above it only the best one's stay
AVERAGE_SHARE = 0.1  # scoring the averaged weights may cost so much of a trial's time
COPY_SHARE = 0.1  # of main memory: the weights that every trial starts from are kept there


def searches(run: RunContext, plan: Plan) -> bool:
    """Whether the job is a search: its profile asks for one, and a trial's weights fit one device."""
    return resolve(run.job.profile).searches and plan.parallel != "fsdp2"


def begin_search(run: RunContext, record: RunRecord, plan: Plan, data: JobData) -> SearchRecord:
    """The record of a search that has not tried anything yet."""
    now = run.clock.time()
    found = SearchRecord(began_at=now, all_s=_end_at(run, record) - now, plans=_arms(run, plan, data))
    _write(run, found)
    return found


def search(
    run: RunContext,
    record: RunRecord,
    known: SearchRecord,
    model: torch.nn.Module | None,
    data: JobData,
    found: Checkpoint | None,
) -> Outcome:
    """Try, choose and submit. `model` is the base model, `found` a checkpoint of the trial under way."""
    dev = data.dev.take(np.arange(len(record.base_losses)))
    bench = Workbench(run, record, data, dev, known, make_saver(run, record), model)
    run.reporter.phase(Phase.TRAIN)
    while trial := bench.known.trial or next_trial(
        _first_trials(bench.known.plans, record), bench.known.done, _budget(run, record, bench.known)
    ):
        if bench.known.trial is None:
            bench.note(bench.known.started(trial, run.clock.time(), _clock_tokens(run)))
        if not bench.run_trial(trial, found):
            return Outcome(status=OutcomeStatus.STOPPED, step=bench.known.steps_before)
        found = None
    return bench.submit_best()


def submittable(
    run: RunContext, known: SearchRecord, found: Checkpoint | None
) -> tuple[Checkpoint, Plan, str]:
    """What to submit when there is no time to look: a checkpoint, its plan and its group of tensors.

    The best trial's; before any has finished, the newest checkpoint of the one under way.
    """
    best = best_of(known.done)
    if best is not None:
        with suppress(OSError, ValueError):
            kept = checkpoint.load(_folder(run, known.done.index(best)), best.weights)
            return kept, known.plans[best.trial.arm], best.weights
    if found is None:
        raise EngineError(ErrorCode.TOO_LATE, "no time is left and no trial has finished")
    arm = known.trial.arm if known.trial else next(iter(known.plans))
    return found, known.plans[arm], "weights"


@dataclass
class Workbench:
    """The model that all trials of one arm train, and what is known so far."""

    run: RunContext
    record: RunRecord
    data: JobData
    dev: Examples
    known: SearchRecord
    saver: Saver
    model: torch.nn.Module | None = None  # the base model, until an arm is added to it
    arm: str = ""
    adapted: Adapted | None = None
    start: dict[str, torch.Tensor] | None = None  # the trained weights before the first step

    def note(self, known: SearchRecord) -> None:
        """The search stands here now."""
        self.known = known
        _write(self.run, known)

    def run_trial(self, trial: Trial, found: Checkpoint | None) -> bool:
        """Train and score one trial; False if the job was asked to stop."""
        run, number = self.run, self.known.number
        run.reporter.message(f"trial {number + 1}: {trial}")
        state = self.prepared(trial, found)
        with run.stop.deferred():
            try:
                descend(run, state)
            except BaseException:
                with suppress(OSError):  # the process ends without waiting for threads
                    self.saver.wait()
                raise
            if run.process_group.broadcast_object(run.stop.asked):
                return False
        if state.step == 0 and best_of(self.known.done) is None:
            raise EngineError(ErrorCode.TOO_LATE, "not one step could be trained in the time that was left")
        trained_at = run.clock.time()
        free_optimizer(state)
        result = self.scored(trial, state)
        train_s = trained_at - self.known.trial_at
        result = msgspec.structs.replace(result, train_s=train_s, other_s=run.clock.time() - trained_at)
        self.keep(result, state)
        self.plan_again(trial.arm, state.plan)
        self.note(self.known.finished(result, state.step, _clock_tokens(run)))
        loss = "no number" if result.loss is None else f"{result.loss:.4f}"
        best = best_of(self.known.done)
        leads = f"; best so far: {best.loss:.4f}" if best and best is not result else ""
        run.reporter.message(f"trial {number + 1}: held-out loss {loss}{leads}")
        return True

    def prepared(self, trial: Trial, found: Checkpoint | None) -> TrainState:
        """The state of a trial, fresh or as a checkpoint left it."""
        adapted = self.with_arm(trial.arm)
        plan = plan_of(trial, adapted.plan, self.record, int(self.data.train.lengths.max()))
        place = Place(
            trial=self.known.number,
            steps_before=self.known.steps_before,
            tokens_before=self.known.tokens_before,
            seed=trial.seed,
            search_at=self.known.began_at,
        )
        return make_state(
            self.run, self.record, replace(adapted, plan=plan), self.data, found, self.saver, place
        )

    def with_arm(self, arm: str) -> Adapted:
        """The model with the arm's weights as they are before the first step."""
        plan = self.known.plans[arm]
        if self.adapted is not None and arm == self.arm and self.start is not None:
            self.adapted.deltas.load_state(self.start)
            return self.adapted
        if self.arm:
            self.adapted = self.start = self.model = None  # two models would be there at once
            release()
        model = self.model or load_base(self.run, plan)
        self.adapted, self.arm, self.model = adapt(self.run, plan, model), arm, None
        state = self.adapted.deltas.state()
        size = sum(value.numel() * value.element_size() for value in state.values())
        if size <= COPY_SHARE * prepare.main_memory(self.run.job.hardware) / self.run.process_group.world:
            self.start = {name: value.to("cpu", copy=True) for name, value in state.items()}
        return self.adapted

    def scored(self, trial: Trial, state: TrainState) -> TrialResult:
        """The result of a trial: the best of its last weights, their average and the curve's lowest point."""
        run, costs = self.run, self.record.costs
        until = run.job.ready_by - SAFETY * (costs.export_s + costs.load_s) - costs.verify_s - SLACK_S

        def score() -> Score:
            group = run.process_group
            return measure(state.deltas.model, self.dev, run.clock, until, group, alive=run.reporter.alive)[0]

        last = Candidate("weights", TrainProgress(state.step, state.tokens, state.train_s)).measured(score)
        candidates = [last]
        with run.patience():
            self.saver.wait()  # from here on the weights change
        trained_s = run.clock.time() - self.known.trial_at
        if state.average and state.average.count > 1 and costs.score_s <= AVERAGE_SHARE * trained_s:
            average = replace(last, name="average", score=None, weights_applied=state.average.applied)
            candidates.append(average.measured(score))
        if lowest := lowest_point(state, last.score):
            candidates.append(replace(lowest, name="best").measured(score))
        best = ranked(candidates, self.record.base_losses)[0]
        over = loss_over_base(best, self.record.base_losses)
        return TrialResult(
            trial=trial,
            loss=self.record.base_loss + over if math.isfinite(over) and state.step else None,
            tokens=state.tokens,
            train_s=0.0,
            weights=best.name,
            losses=best.score.per_example.tolist() if best.score else [],
            step=best.reached.step,
            step_tokens=best.reached.tokens,
            step_s=best.reached.train_s,
        )

    def keep(self, result: TrialResult, state: TrainState) -> None:
        """Keep the weights of the best trials; free the others'."""
        done = [*self.known.done, result]
        size = 4 * sum(value.numel() for value in state.deltas.parameters.values())
        best = sorted((one for one in done if one.loss is not None), key=lambda one: one.loss or 0.0)
        kept = best[: KEPT if size <= KEPT_BYTES else 1]
        if not self.run.process_group.is_main:
            return
        if result in kept:
            step = state.steps_before + state.step
            checkpoint.link(self.saver.folder / f"step-{step:08d}", _folder(self.run, len(done) - 1))
        for number, one in enumerate(done):
            if one not in kept:
                shutil.rmtree(_folder(self.run, number), ignore_errors=True)

    def plan_again(self, arm: str, carried_out: Plan) -> None:
        """Let later trials need as little memory as this one came to need."""
        plan = self.known.plans[arm]
        if len(carried_out.deviations) > len(plan.deviations):  # memory ran out
            plans = {**self.known.plans, arm: smaller_by(plan, carried_out)}
            self.known = msgspec.structs.replace(self.known, plans=plans)

    def submit_best(self) -> Outcome:
        """Submit the best trial, or an average of the best ones that is better."""
        run, record, done = self.run, self.record, self.known.done
        best = best_of(done)
        if best is None:
            raise EngineError(ErrorCode.TOO_LATE, "no trial gave a loss that is a number")
        run.reporter.phase(Phase.CHOOSE)
        state = self.prepared(best.trial, None)
        state.plan = explained(state.plan, done, best)
        if run.process_group.is_main:
            context.write_plan(run.folder, state.plan)
        parts = affordable(run.left_s, record.costs)
        candidates = [self.candidate(state, one) for one in self.kept(best)]
        if Part.AVERAGE in parts:
            candidates = self.with_average(state, candidates)
        if loss_over_base(candidates[0], record.base_losses) >= 0.0 and Part.VERIFY in parts:
            candidates = ranked([*candidates, untrained(run, record, state)], record.base_losses)
            run.reporter.message("the trained weights are worse than the base model's")
        return submit(run, record, state, self.dev, candidates, parts)

    def kept(self, best: TrialResult) -> list[TrialResult]:
        """The trials of the best one's arm whose weights are on disk, best first."""
        group = self.run.process_group
        here = [_folder(self.run, number).is_dir() for number in range(len(self.known.done))]
        here = group.broadcast_object(here)
        found = [
            one
            for one, there in zip(self.known.done, here, strict=True)
            if there and one.loss is not None and one.trial.arm == best.trial.arm
        ]
        return sorted(found, key=lambda one: one.loss or 0.0)

    def weights(self, result: TrialResult) -> dict[str, torch.Tensor]:
        """The best weights of a trial that was kept."""
        return checkpoint.load(_folder(self.run, self.known.done.index(result)), result.weights).tensors(
            result.weights
        )

    def candidate(self, state: TrainState, result: TrialResult) -> Candidate:
        """A trial that was kept, as it could be submitted."""
        losses = np.array(result.losses)
        return Candidate(
            f"trial {self.known.done.index(result) + 1}",
            TrainProgress(result.step, result.step_tokens, result.step_s),
            Score(float(losses.mean()), losses),
            partial(loaded, state.deltas, partial(self.weights, result)),
        )

    def with_average(self, state: TrainState, candidates: list[Candidate]) -> list[Candidate]:
        """Put averages of the best trials in front that are better on both halves of the development rows.

        Of LoRA's factors there is none: the mean of two products isn't the product of the means.
        """
        results = self.kept(best_of(self.known.done) or self.known.done[0])
        if state.deltas.lora:
            return candidates
        run, best, members = self.run, candidates[0], results[:1]
        for result in results[1:]:
            if run.clock.time() + 2 * self.record.costs.score_s > _end_at(run, self.record):
                break
            numbers = [self.known.done.index(one) + 1 for one in (*members, result)]
            name = f"average of trials {', '.join(map(str, numbers))}"
            weights = partial(self.mean_weights, [*members, result])
            mean = replace(
                best, name=name, score=None, weights_applied=partial(loaded, state.deltas, weights)
            )
            with run.patience():
                mean = mean.measured(partial(self.score_all, state))
            if better_on_both_halves(mean, best):
                best, members = mean, [*members, result]
                candidates = [mean, *candidates]
            run.reporter.message(f"{name}: held-out loss {mean.score.loss if mean.score else math.nan:.4f}")
        return candidates

    def mean_weights(self, results: list[TrialResult]) -> dict[str, torch.Tensor]:
        """The mean of several trials' weights, fp32."""
        mean = {name: value.float().clone() for name, value in self.weights(results[0]).items()}
        for count, result in enumerate(results[1:], 2):
            for name, value in self.weights(result).items():
                mean[name].lerp_(value.float(), 1.0 / count)
        return mean

    def score_all(self, state: TrainState) -> Score:
        """The development metric of the weights in the model."""
        run = self.run
        end = _end_at(run, self.record)
        return measure(
            state.deltas.model, self.dev, run.clock, end, run.process_group, alive=run.reporter.alive
        )[0]


def plan_of(trial: Trial, plan: Plan, record: RunRecord, longest: int) -> Plan:
    """The arm's plan with the trial's rate, length and batch."""
    mean_length = record.train_tokens / record.train_examples
    capacity, packs = step_size(trial.batch, mean_length, longest, plan.capacity, plan.devices)
    return msgspec.structs.replace(
        plan,
        lr_lora=plan.lr_lora * trial.rate,
        lr_dense=plan.lr_dense * trial.rate,
        max_epochs=trial.epochs,
        capacity=capacity,
        packs_per_step=packs,
        expected_steps=max(1, int(trial.epochs * record.train_examples / trial.batch)),
    )


def better_on_both_halves(candidate: Candidate, other: Candidate) -> bool:
    """Whether a candidate has the lower loss on the even and on the odd rows: one half could be chance."""
    if candidate.score is None or other.score is None:
        return False
    mine, others = candidate.score.per_example, other.score.per_example
    if len(mine) != len(others):
        return False
    difference = mine - others
    return bool(difference[::2].mean() < 0.0 and difference[1::2].mean() < 0.0)


def explained(plan: Plan, done: list[TrialResult], best: TrialResult) -> Plan:
    """The plan with a deviation that says what was tried and why this was taken."""
    tried = "; ".join(
        f"{number}: {one.trial}: {'no number' if one.loss is None else f'{one.loss:.4f}'}"
        for number, one in enumerate(done, 1)
    )
    found = Deviation(
        "training run",
        f"trial 1 ({done[0].trial})",
        f"trial {done.index(best) + 1} ({best.trial})",
        f"it has the lowest held-out loss of {len(done)} trials ({tried})",
    )
    return msgspec.structs.replace(plan, deviations=[*plan.deviations, found])


def _arms(run: RunContext, plan: Plan, data: JobData) -> dict[str, Plan]:
    """The plans to search among, by name: the job's own, and its profile's other ones that fit."""
    plans = {_name(plan): plan}
    config, job = load_config(run.job.model_path), run.job
    for profile in resolve(job.profile).arms:
        try:
            other = prepare.draw_plan(
                run, config, data, job.ready_by - job.start_at, plan.expected_tokens_per_s, profile
            )
        except (PlanError, EngineError) as error:
            run.reporter.message(f"{profile} is not tried: {error}")
            continue
        if other.parallel != "fsdp2":
            plans.setdefault(_name(other), msgspec.structs.replace(other, profile=job.profile, deviations=[]))
    return plans


def _name(plan: Plan) -> str:
    ranks = sorted({module.rank for module in plan.modules if module.method == "lora"})
    dense = any(module.method == "dense" for module in plan.modules)
    return " and ".join(["dense"] * dense + [f"LoRA r{rank}" for rank in ranks[-1:]])


def _first_trials(plans: dict[str, Plan], record: RunRecord) -> list[Trial]:
    """Each arm's first trial: the plan's rates, and its batch as a power of two."""
    mean_length = record.train_tokens / record.train_examples
    trials = []
    for arm, plan in plans.items():
        batch = plan.packs_per_step * plan.capacity / mean_length
        trials.append(Trial(arm=arm, batch=max(4, 2 ** round(math.log2(max(1.0, batch))))))
    return trials


def _budget(run: RunContext, record: RunRecord, known: SearchRecord) -> Budget:
    """What is left, at the speed of the trials so far."""
    trained_s = sum(one.train_s for one in known.done)
    tokens = sum(one.tokens for one in known.done)
    first = next(iter(known.plans.values()))
    speed = tokens / trained_s if tokens and trained_s > 0 else first.expected_tokens_per_s
    if run.simulated:
        speed = run.job.token_clock_rate
    other = [one.other_s for one in known.done] or [record.costs.score_s + SLACK_S]
    return Budget(
        left_s=_end_at(run, record) - run.clock.time(),
        tokens_per_s=speed,
        epoch_tokens=record.train_tokens,
        examples=record.train_examples,
        trial_s=0.0 if run.simulated else sum(other) / len(other),
        all_s=known.all_s,
    )


def _end_at(run: RunContext, record: RunRecord) -> float:
    """When the last trial must be over: the closing reads the best one's weights again."""
    costs = record.costs
    return run.job.ready_by - costs.closing_s - costs.load_s - 2 * SLACK_S


def _clock_tokens(run: RunContext) -> int:
    return run.own_clock.tokens if isinstance(run.own_clock, TokenClock) else 0


def _folder(run: RunContext, number: int) -> Path:
    return run.folder / "trials" / f"{number:03d}"


def _write(run: RunContext, known: SearchRecord) -> None:
    if run.process_group.is_main:
        write_search(run.folder, known)


def read(run: RunContext) -> SearchRecord | None:
    """Where an earlier start of this run left its search."""
    return run.process_group.broadcast_object(read_search(run.folder) if run.process_group.is_main else None)
