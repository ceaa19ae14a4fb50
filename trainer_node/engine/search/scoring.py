"""What a finished trial is worth, and how far it should have gone; a probe by its last training losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from msgspec.structs import replace as replace_fields

from shared.planning.recipe import CurveRule
from shared.planning.throughput import SAFETY, SLACK_S
from trainer_node.engine.context import RunContext, RunRecord
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.evaluate.candidates import Candidate, loss_over_base, ranked
from trainer_node.engine.evaluate.metric import Evaluation, measure
from trainer_node.engine.evaluate.moved_weights import moving
from trainer_node.engine.finish import lowest_point, reached_by
from trainer_node.engine.search.soup import greedy_soup
from trainer_node.engine.search.strategy.delta_factor import PASSES, Losses, best_factor, rows_to_score
from trainer_node.engine.search.trial import Trial, TrialResult
from trainer_node.engine.search.winner.rate_search import LAST_SHARE
from trainer_node.engine.train.saved_state import snapshot_name
from trainer_node.engine.train.state import TrainState

AVERAGE_TIME_SHARE = 0.1  # scoring the averaged weights may cost so much of a trial's time
SOUP_TIME_SHARE = 0.5  # of the time that is left: scoring averages of snapshots may take it


def probed(run: RunContext, record: RunRecord, dev: Examples, trial: Trial, state: TrainState) -> TrialResult:
    """Return a probe's result: the median of its last training losses, or the loss of pairs held out."""
    losses = state.step_losses or []
    if dev.group == 2:
        rows = dev.take(np.arange(min(CurveRule().rows, len(dev))))
        found = scorer(run, record, rows, state)().loss
    else:
        found = median(losses[-max(1, round(LAST_SHARE * len(losses))) :]) if losses else math.nan
    return TrialResult(
        trial=trial,
        loss=None,
        probe_loss=found if math.isfinite(found) else None,
        tokens=state.tokens,
        train_s=state.train_s,
        step=state.step,
        step_tokens=state.tokens,
        step_s=state.train_s,
    )


def scored(
    run: RunContext,
    record: RunRecord,
    dev: Examples,
    trial: Trial,
    state: TrainState,
    saved: frozenset[str],
    *,
    first: bool,
    start: Mapping[str, torch.Tensor] | None,
    factors_until: float,
) -> TrialResult:
    """Return a trial's result: the best of its last weights and of what was kept of earlier ones.

    Only what is `saved` on disk can be submitted later. A score that is cut short by time counts only for the
    `first` trial, the main run and runs on all rows. With the untrained weights to `start` from, the result
    has the factor on what the run changed, if there is time.
    """
    score = scorer(run, record, dev, state)
    last = Candidate("weights", reached_by(state)).measured(score)
    (trained_s,) = run.process_group.broadcast_floats(state.train_s)
    cheap = record.costs.score_s <= AVERAGE_TIME_SHARE * trained_s
    candidates = [last, *_kept_earlier(state, last, saved, score, with_average=cheap)]
    members: list[int] = []
    if {"best", *map(snapshot_name, state.snapshots)} <= saved and (
        soup := greedy_soup(state, score, _has_time(run, record))
    ):
        candidates, members = [*candidates, soup[0]], soup[1]
    whole = [one for one in candidates if one.score and len(one.score.per_example) == len(dev)]
    best = ranked(whole or candidates, record.base_losses)[0]
    result = _result_of(trial, record, state, best, members, counts=bool(whole) or first)
    if start is None:
        return result
    return _with_factors(run, record, dev, state, result, (last, best), start, trained_s, factors_until)


def _kept_earlier(
    state: TrainState,
    last: Candidate,
    saved: frozenset[str],
    score: Callable[[], Evaluation],
    *,
    with_average: bool,
) -> list[Candidate]:
    """Return the average over the tail and the lowest point, measured, as far as they are saved."""
    kept = []
    if "average" in saved and state.average and state.average.count > 1 and with_average:
        average = replace(last, name="average", score=None, weights_applied=state.average.applied)
        kept.append(average.measured(score))
    if "best" in saved and (lowest := lowest_point(state, last.score)):
        kept.append(replace(lowest, name="best").measured(score))
    return kept


def _result_of(
    trial: Trial, record: RunRecord, state: TrainState, best: Candidate, members: list[int], *, counts: bool
) -> TrialResult:
    """Return a trial's result with its best weights: `members` of a soup, if they are one.

    A loss that doesn't count, or is no number, is left out.
    """
    over = loss_over_base(best, record.base_losses)
    rows = best.score.per_example.tolist() if best.score else []
    valid = math.isfinite(over) and state.step > 0 and (counts or trial.main or trial.refit)
    return TrialResult(
        trial=trial,
        loss=record.base_loss + over if valid else None,
        tokens=state.tokens,
        train_s=state.train_s,
        weights="best" if best.name == "soup" else best.name,
        snapshots=members if best.name == "soup" else [],
        lowest_epochs=lowest_epochs(state),
        losses=rows if valid else [],  # JSON has no word for what isn't a number
        step=best.reached.step,
        step_tokens=best.reached.tokens,
        step_s=best.reached.train_s,
        step_skipped=best.reached.skipped,
    )


def _with_factors(
    run: RunContext,
    record: RunRecord,
    dev: Examples,
    state: TrainState,
    result: TrialResult,
    last_and_best: tuple[Candidate, Candidate],
    start: Mapping[str, torch.Tensor],
    trained_s: float,
    until: float,
) -> TrialResult:
    """Collective: return the result with the best factor on its delta, if there is time to score others.

    The main run, whose lowest point is submitted at its best factor, has that one's, too.
    """
    last, best = last_and_best
    if not (count := rows_for_factors(run, record, trained_s, until)):
        return result
    result = replace_fields(result, factor=factor_of(run, record, dev, state, start, last, count))
    # Where no other run follows, at the rate that the factor asks for.
    if not result.trial.main or result.weights != "best" or result.snapshots:
        return result
    if not (count := rows_for_factors(run, record, trained_s, until)):
        return result
    with run.patience(), best.weights_applied():
        factor = factor_of(run, record, dev, state, start, best, count)
    return replace_fields(result, lowest_factor=factor)


def rows_for_factors(run: RunContext, record: RunRecord, trained_s: float, until: float) -> int:
    """Collective: how many development rows to score with other factors until then; 0 without time for it."""
    rows, score_s = len(record.base_losses), record.costs.score_s
    count = rows_to_score(rows, score_s / rows, trained_s)
    in_time = run.clock.time() + PASSES * count * score_s / rows <= until
    return run.process_group.broadcast_object(count if in_time else 0)


def factor_of(
    run: RunContext,
    record: RunRecord,
    dev: Examples,
    state: TrainState,
    start: Mapping[str, torch.Tensor],
    as_it_is: Candidate,
    count: int,
) -> float | None:
    """Collective: the factor on what the model's weights have changed at which their loss is lowest.

    By `count` rows, on which the candidate was scored as it is. None if that is unknown, or time runs out.
    """
    score = scorer(run, record, dev.take(np.arange(count)), state)
    if as_it_is.score is None or len(as_it_is.score.per_example) < count:
        return None
    with run.patience(), moving(state.deltas, start) as move:

        def scored_at(factor: float) -> Losses | None:
            move(factor)
            losses = score().per_example
            return losses if len(losses) == count else None

        found = best_factor(as_it_is.score.per_example[:count], scored_at)
    return run.process_group.broadcast_object(found)


def scorer(run: RunContext, record: RunRecord, rows: Examples, state: TrainState) -> Callable[[], Evaluation]:
    """Return what measures the weights in the model, in the time that the closing leaves."""
    costs, group = record.costs, run.process_group
    until = run.job.ready_by - SAFETY * (costs.export_s + costs.load_s) - costs.verify_s - SLACK_S
    return lambda: measure(state.deltas.model, rows, run.clock, until, group, alive=run.reporter.alive)[0]


def lowest_epochs(state: TrainState) -> float | None:
    """Return where the development curve was lowest, in epochs, if it has turned."""
    best = state.curve.best
    if best is None or state.schedule.state.cooldown is None:
        return None
    return best.tokens / int(state.examples.lengths.sum())


def _has_time(run: RunContext, record: RunRecord) -> Callable[[], bool]:
    """Collective: what tells whether one more average may be scored; all processes must ask together."""
    costs, now = record.costs, run.clock.time()
    (closing_s,) = run.process_group.broadcast_floats(  # only rank 0 learns what a save costs
        costs.closing_s + costs.load_s + 2 * SLACK_S
    )
    until = now + SOUP_TIME_SHARE * (run.job.ready_by - closing_s - now)
    return lambda: run.clock.time() + costs.score_s <= until
