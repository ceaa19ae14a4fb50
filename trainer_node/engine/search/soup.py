"""The mean of several sets of weights, and the greedy one of a run's snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

from trainer_node.engine.distributed.sharding import as_held
from trainer_node.engine.evaluate.candidates import Candidate, TrainProgress, loaded
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.train.state import TrainState

Weights = Mapping[str, torch.Tensor]


def mean_of(several: Iterable[Weights]) -> dict[str, torch.Tensor]:
    """Return the mean of several sets of weights, fp32; one at a time is in memory besides it."""
    mean: dict[str, torch.Tensor] = {}
    for count, weights in enumerate(several, 1):
        for name, value in weights.items():
            if count == 1:
                mean[name] = value.float().clone()
            else:
                mean[name].lerp_(value.float(), 1.0 / count)
    return mean


def greedy_soup(
    state: TrainState, score: Callable[[], Evaluation], has_time: Callable[[], bool]
) -> tuple[Candidate, list[int]] | None:
    """Average the snapshots from the lowest one on, each only if the held-out loss falls.

    Return the average and the steps of its snapshots; None if no two are better than the lowest one.
    """
    points = [point for point in state.curve.lowest(len(state.curve.points)) if point.step in state.snapshots]
    best: Candidate | None = None
    members: list[int] = []
    for point in points:
        if not has_time():
            break
        steps = [*members, point.step]
        reached = best.reached if best else progress_at(state, point.step, point.tokens)
        mean = Candidate("soup", reached, weights_applied=partial(loaded, state.deltas, _mean(state, steps)))
        mean = mean.measured(score)
        if best is None or _is_lower(mean, best):
            best, members = mean, steps
    return (best, members) if best and len(members) > 1 else None


def progress_at(state: TrainState, step: int, tokens: int) -> TrainProgress:
    """Return how far training had come at a point of its curve."""
    return TrainProgress(step, tokens, state.train_s * tokens / state.tokens, state.health.skipped)


def _mean(state: TrainState, steps: list[int]) -> Callable[[], dict[str, torch.Tensor]]:
    snapshots, like = state.snapshots, state.deltas.parameters
    return lambda: as_held(mean_of(snapshots[step] for step in steps), like)


def _is_lower(one: Candidate, other: Candidate) -> bool:
    """Return whether both were measured on the same rows, and the first has the lower loss."""
    if one.score is None or other.score is None:
        return False
    same = len(one.score.per_example) == len(other.score.per_example)
    return same and one.score.loss < other.score.loss
