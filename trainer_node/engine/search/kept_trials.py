"""The weights of finished trials on disk: where they are, which ones stay, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from pathlib import Path

import torch

from trainer_node.engine.evaluate.candidates import Weights, whole
from trainer_node.engine.search.soup import mean_of
from trainer_node.engine.search.strategy.best_trial import most_promising
from trainer_node.engine.search.strategy.budget import KEPT_BYTES
from trainer_node.engine.search.trial import TrialResult
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.saved_state import snapshot_name

KEPT = 3  # trials whose weights stay on disk, of at most 4 GB each: the best ones, to be averaged


def staying(done: Sequence[TrialResult], size: int, averaged: Container[str] = ()) -> list[TrialResult]:
    """Return the trials whose weights, of `size` bytes each, stay on disk: the best ones, and the refits.

    So does the one that refits repeat, or should. Of the `averaged` arms, which are small, it may not be
    the lowest.
    """
    measured = (one for one in done if one.loss is not None and not one.trial.refit)
    best = sorted(measured, key=lambda one: one.loss or 0.0)
    promising = most_promising(done, lambda trial: trial.arm in averaged)
    refits = [one for one in done if one.trial.refit and one.loss is not None]
    few = KEPT if 2 * size <= KEPT_BYTES else 1
    kept = best[:few] + [one for one in best[few:] if one is promising]
    return kept + refits[: 1 if size > KEPT_BYTES else None]


def trial_folder(run_folder: Path, number: int) -> Path:
    """Return where a trial's weights are kept."""
    return run_folder / "trials" / f"{number:03d}"


def kept_weights(folder: Path, result: TrialResult) -> Callable[[], dict[str, torch.Tensor]]:
    """Return what reads the best weights of a trial. Raises OSError or ValueError if they are damaged."""
    read = kept_blocks(folder, result)
    return lambda: whole(read())


def kept_blocks(folder: Path, result: TrialResult) -> Callable[[], Weights]:
    """Return what maps the best weights of a trial, in blocks of rows as processes wrote them.

    Raises OSError or ValueError if they are damaged.
    """
    found = {name: checkpoint.load(folder, name) for name in groups_of(result)}
    if result.snapshots:
        return lambda: mean_of(one.tensors(name) for name, one in found.items())
    return partial(found[result.weights].pieces, result.weights)


def groups_of(result: TrialResult) -> list[str]:
    """Return the groups of tensors that a trial's best weights are made of."""
    return list(map(snapshot_name, result.snapshots)) or [result.weights]
