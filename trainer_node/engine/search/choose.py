"""Submit the best trial of a search, or an average of its best ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from shared.errors import EngineError
from shared.messages.runs import ErrorCode, Outcome, Phase
from trainer_node.engine import context
from trainer_node.engine.as_is import AsIs, checkpoint_as_is
from trainer_node.engine.context import RunContext
from trainer_node.engine.distributed.sharding import local, placed
from trainer_node.engine.evaluate.candidates import (
    Candidate,
    TrainProgress,
    loaded,
    loss_over_base,
    ranked,
)
from trainer_node.engine.evaluate.metric import Evaluation, measure, score
from trainer_node.engine.evaluate.moved_weights import scaled
from trainer_node.engine.export import rounding
from trainer_node.engine.finish import untrained
from trainer_node.engine.memory.oom import is_out_of_memory, release
from trainer_node.engine.search.explanation import explained
from trainer_node.engine.search.kept_trials import kept_weights, trial_folder
from trainer_node.engine.search.runner import TrialRunner
from trainer_node.engine.search.strategy.best_trial import best_of, repeated_of
from trainer_node.engine.search.time_left import end_at, factors_s, is_rounded, rounding_s
from trainer_node.engine.search.trial import SearchRecord, TrialResult, factor_to_apply
from trainer_node.engine.submission import submit
from trainer_node.engine.time_budget import Part, affordable
from trainer_node.engine.train.checkpoint import Checkpoint
from trainer_node.engine.train.state import TrainState


def submit_best(runner: TrialRunner) -> Outcome:
    """Submit the best trial, or an average of the best ones that is better."""
    run, record, done = runner.run, runner.record, runner.known.done
    best = chosen(runner)
    run.reporter.phase(Phase.CHOOSE)
    runner.saver.free()  # rounding, and reading what was written, need the memory
    state = runner.prepared(best.trial if best else done[0].trial, None)
    parts = affordable(run.left_s, record.costs)
    candidates: list[Candidate] = []
    if best:
        state.plan = explained(state.plan, done, best)
        candidates = [candidate(runner, state, one) for one in kept(runner, best)]
    if run.process_group.is_main:
        context.write_plan(run.folder, state.plan)
    if candidates and Part.AVERAGE in parts:
        candidates = with_average(runner, state, candidates)
        if best:
            candidates = with_factor(runner, state, candidates, best)
    if best:  # its weights may be gone, those of a run on all rows may be there
        candidates = [*refits(runner, state, best, parts), *candidates]
    if candidates and Part.AVERAGE in parts:
        candidates = with_rounding(runner, state, candidates)
    if not candidates or (loss_over_base(candidates[0], record.base_losses) >= 0.0 and Part.VERIFY in parts):
        run.reporter.message(
            "the trained weights are worse than the base model's"
            if candidates
            else "no trial gave usable weights: the base model is submitted"
        )
        model, group = state.deltas.model, run.process_group
        base = untrained(run, record, state, lambda: score(model, runner.dev, process_group=group))
        candidates = ranked([*candidates, base], record.base_losses)
    return submit(run, record, state, runner.dev, candidates, parts)


def submittable(run: RunContext, known: SearchRecord, found: Checkpoint | None) -> AsIs:
    """Return what to submit when there is no time to look.

    It is what `submit_best` prefers without time for averages: a run on all rows, or else the best trial. If
    none was kept whole, it is the newest checkpoint of the trial under way.
    """
    lowest = best_of(known.done)
    best = repeated_of(known.done) or lowest
    again = contenders(known.done, best, refit=True) if best else []
    alone = [result for result in again if not result.trial.averaged]
    others = [*contenders(known.done, best), *contenders(known.done, lowest)] if best and lowest else []
    for result in [*alone, *others]:
        number, shown = known.done.index(result), best if result.trial.refit and best else result
        with suppress(OSError, ValueError):
            return AsIs(
                f"trial {number + 1}",
                explained(known.plans[result.trial.arm], known.done, shown),
                reached_in(result),
                kept_weights(trial_folder(run.folder, number), result),
                evaluation_of(shown),
            )
    if found is None:
        raise EngineError(ErrorCode.TOO_LATE, "no time is left and no trial has finished")
    trials = [*(result.trial for result in known.done), *known.running]
    return checkpoint_as_is(found, known.plans[trials[found.manifest.position.trial].arm])


def chosen(runner: TrialRunner) -> TrialResult | None:
    """Return the trial that runs on all rows repeat, if weights of it or them are there; else the lowest."""
    repeated = repeated_of(runner.known.done)
    if repeated and (kept(runner, repeated) or kept(runner, repeated, refit=True)):
        return repeated
    return best_of(runner.known.done)


def contenders(done: Sequence[TrialResult], best: TrialResult, *, refit: bool = False) -> list[TrialResult]:
    """Return the trials of the best one's arm, lowest loss first; or its refits.

    A refit that is worse than the best trial even on that one's own rows went wrong.
    """
    most = best.loss if refit and best.loss is not None else math.inf
    found = [
        one
        for one in done
        if one.loss is not None
        and one.trial.arm == best.trial.arm
        and one.trial.refit == refit
        and one.loss < most
    ]
    return sorted(found, key=lambda one: one.loss or 0.0)


def kept(runner: TrialRunner, best: TrialResult, *, refit: bool = False) -> list[TrialResult]:
    """Return the contenders whose weights are on disk, or in memory because it is full."""
    done, unsaved = runner.known.done, runner.unsaved
    here = [n in unsaved or trial_folder(runner.run.folder, n).is_dir() for n in range(len(done))]
    here = runner.run.process_group.broadcast_object(here)
    return [one for one in contenders(done, best, refit=refit) if here[done.index(one)]]


def evaluation_of(result: TrialResult) -> Evaluation:
    """Return what a trial was measured to be on the development rows."""
    losses = np.array(result.losses)
    return Evaluation(float(losses.mean()), losses)


def reached_in(result: TrialResult) -> TrainProgress:
    """Return how far training had come at a trial's best weights."""
    return TrainProgress(result.step, result.step_tokens, result.step_s, result.step_skipped)


def candidate(runner: TrialRunner, state: TrainState, result: TrialResult) -> Candidate:
    """Return a trial that was kept, as it could be submitted."""
    return Candidate(
        f"trial {runner.known.done.index(result) + 1}",
        reached_in(result),
        evaluation_of(result),
        partial(loaded, state.deltas, partial(runner.weights_of, result)),
    )


def refits(
    runner: TrialRunner, state: TrainState, best: TrialResult, parts: frozenset[Part]
) -> list[Candidate]:
    """Return the runs on all rows: their average, then the one that is lowest on its rows.

    No row is left that could tell whether they are better. That they are was measured on several data sets
    (docs/experiments.md). The best trial joins their average if they are meant to be averaged with it.
    """
    held_out, good = evaluation_of(best), kept(runner, best, refit=True)
    alone = [one for one in good[:1] if not one.trial.averaged]
    single = [replace(candidate(runner, state, one), held_out=held_out) for one in alone]
    if any(one.trial.with_best for one in good):
        good += [one for one in kept(runner, best) if one is best]
    if len(good) < 2 or Part.AVERAGE not in parts:
        return single
    applied = partial(loaded, state.deltas, partial(mean_weights, runner, good))
    others = sum(one.trial.refit for one in good)
    runs = "1 run" if others == 1 else f"{others} runs"
    name = f"average of {runs} on all rows" + " and the best trial" * (others < len(good))
    mean = Candidate(name, reached_in(good[0]), weights_applied=applied, held_out=held_out)
    with runner.run.patience():
        mean = mean.measured(partial(score_all, runner, state))
    runner.run.reporter.message(
        f"{name}: {mean.score.loss if mean.score else math.nan:.4f} on rows that they were trained on"
    )
    return [mean, *single] if mean.score and lower_on_its_rows(mean.score, held_out) else single


def with_average(runner: TrialRunner, state: TrainState, candidates: list[Candidate]) -> list[Candidate]:
    """Put averages of the best trials in front that are better on both halves of the development rows."""
    results = kept(runner, chosen(runner) or runner.known.done[0])
    run, best, members = runner.run, candidates[0], results[:1]
    for result in results[1:]:
        if run.clock.time() + 2 * runner.record.costs.score_s > last_end(runner):
            break
        numbers = [runner.known.done.index(one) + 1 for one in (*members, result)]
        name = f"average of trials {', '.join(map(str, numbers))}"
        applied = partial(loaded, state.deltas, partial(mean_weights, runner, [*members, result]))
        mean = replace(best, name=name, score=None, weights_applied=applied)
        with run.patience():
            mean = mean.measured(partial(score_all, runner, state))
        if better_on_both_halves(mean, best):
            best, members = mean, [*members, result]
            candidates = [mean, *candidates]
        run.reporter.message(f"{name}: held-out loss {mean.score.loss if mean.score else math.nan:.4f}")
    return candidates


def with_factor(
    runner: TrialRunner, state: TrainState, candidates: list[Candidate], best: TrialResult
) -> list[Candidate]:
    """Put the best trial's weights at the best factor on their delta in front, if both halves are better."""
    run, first, start, factor = runner.run, candidates[0], runner.start, factor_to_apply(best)
    end = last_end(runner) + factors_s(run, runner.record)
    is_late = run.clock.time() + runner.record.costs.score_s > end
    followed = kept(runner, best, refit=True)
    if is_late or followed or factor is None or start is None or best not in kept(runner, best):
        return candidates
    like = state.deltas.parameters
    applied = partial(loaded, state.deltas, lambda: scaled(runner.weights_of(best), start, factor, like))
    name = f"trial {runner.known.done.index(best) + 1}, with {factor:.2f} times its delta"
    new = replace(candidate(runner, state, best), name=name, score=None, weights_applied=applied)
    with run.patience():
        new = new.measured(partial(score_all, runner, state, factors_s(run, runner.record)))
    run.reporter.message(f"{name}: held-out loss {new.score.loss if new.score else math.nan:.4f}")
    return [new, *candidates] if better_on_both_halves(new, first) else candidates


def with_rounding(runner: TrialRunner, state: TrainState, candidates: list[Candidate]) -> list[Candidate]:
    """Put the first candidate in front once more, its matrices rounded by their inputs, if it's no worse."""
    run, first, costs = runner.run, candidates[0], runner.record.costs
    more_s = rounding_s(run, runner.known.plans.values()) + factors_s(run, runner.record)
    until = last_end(runner) + more_s - costs.score_s
    if not is_rounded(run, state.plan) or run.clock.time() + costs.load_s > until:
        return candidates
    with run.patience(), first.weights_applied():
        weights = rounded_weights(runner, state, until)
    if not weights:
        return candidates
    applied = partial(loaded, state.deltas, lambda: weights)
    new = replace(first, name=f"rounded {first.name}", score=None, weights_applied=applied)
    with run.patience():
        new = new.measured(partial(score_all, runner, state, more_s))
    if new.score is None or first.score is None:
        return candidates
    rows = min(len(new.score.per_example), len(first.score.per_example))
    mine, nearest = (float(score.per_example[:rows].mean()) for score in (new.score, first.score))
    run.reporter.message(
        f"matrices are rounded by their inputs: loss {mine:.4f}, to the nearest {nearest:.4f}"
    )
    return [new, *candidates] if mine <= nearest else candidates


def rounded_weights(runner: TrialRunner, state: TrainState, until: float) -> dict[str, torch.Tensor]:
    """Collective: the weights in the model, matrices rounded by their inputs; none without time or memory."""
    run, deltas = runner.run, state.deltas
    names, found = rounding.matrices_of(deltas), dict[str, torch.Tensor]()

    def has_time() -> bool:  # by this process's clock: the others don't ask as often
        run.reporter.alive()
        return run.simulated or run.own_clock.time() <= until

    try:
        found = rounding.rounded(deltas.model, names, runner.data.train, has_time)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        run.reporter.message(f"memory ran out while matrices were rounded: {error}")
        release()
    here = run.process_group.gather_objects(list(found))
    common = set(here[0]).intersection(*here)
    if nearest := len(names) - len(common):
        run.reporter.message(f"{nearest} of {len(names)} matrices are rounded to the nearest")
    if not common:
        return {}
    weights = {f"{name}.weight": found[name] for name in names if name in common}
    others = {name: value for name, value in deltas.state().items() if name not in weights}
    return {**weights, **{name: value.to("cpu", copy=True) for name, value in others.items()}}


def last_end(runner: TrialRunner) -> float:
    """Collective: when the last trial had to be over."""
    return end_at(runner.run, runner.record, runner.known.plans.values())


def mean_weights(runner: TrialRunner, results: list[TrialResult]) -> dict[str, torch.Tensor]:
    """Collective: the mean of several trials' weights, fp32, on the model's device and sharded like it."""
    assert runner.adapted is not None
    parameters, mean = runner.adapted.deltas.parameters, dict[str, torch.Tensor]()
    for count, result in enumerate(results, 1):
        for name, blocks in runner.weights_of(result).items():
            value = placed(blocks, parameters[name], torch.float32)
            if count == 1:
                mean[name] = value
            else:
                local(mean[name]).lerp_(local(value), 1.0 / count)
    return mean


def score_all(runner: TrialRunner, state: TrainState, more_s: float = 0.0) -> Evaluation:
    """Measure the development metric of the weights in the model, `more_s` after the last trial's end."""
    run, until = runner.run, last_end(runner) + more_s
    group, alive = run.process_group, run.reporter.alive
    return measure(state.deltas.model, runner.dev, run.clock, until, group, alive=alive)[0]


def lower_on_its_rows(score: Evaluation, other: Evaluation) -> bool:
    """Return whether a score is lower than another one on the rows of both: time may have cut them short."""
    rows = min(len(score.per_example), len(other.per_example))
    return float(score.per_example[:rows].mean()) < float(other.per_example[:rows].mean())


def better_on_both_halves(candidate: Candidate, other: Candidate) -> bool:
    """Return whether a candidate is better on the even and on the odd rows: one half could be chance."""
    if candidate.score is None or other.score is None:
        return False
    mine, others = candidate.score.per_example, other.score.per_example
    if len(mine) != len(others):
        return False
    difference = mine - others
    return bool(difference[::2].mean() < 0.0 and difference[1::2].mean() < 0.0)
