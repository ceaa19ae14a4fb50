"""Losses of the arena's test rows: the scorer's, with the base model where a kind of task needs it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.arena.kinds.losses import divergences, losses_of, with_base
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.evaluate import metric
from trainer_node.engine.model.loading import load_model

COEFFICIENT = 0.7
LENGTHS = [9, 12, 30, 7, 5, 8]


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> torch.nn.Module:
    return load_model(str(tiny_model), torch.float32)


@pytest.fixture(scope="module")
def tuned(base: torch.nn.Module) -> torch.nn.Module:
    """The base model with all weights moved, its output matrix too."""
    moved = copy.deepcopy(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in moved.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return moved


def test_a_model_that_did_not_move_has_no_divergence(
    base: torch.nn.Module, make_examples: Callable[..., Examples]
) -> None:
    rows = make_examples(LENGTHS)
    found = losses_of(base, base, rows, COEFFICIENT)
    np.testing.assert_allclose(found, metric.score(base, rows).per_example, rtol=0, atol=1e-6)


def test_the_mean_is_that_over_rows_plus_the_coefficient_times_that_over_places(
    base: torch.nn.Module, tuned: torch.nn.Module, make_examples: Callable[..., Examples]
) -> None:
    rows, places = make_examples(LENGTHS), []
    for start, end in pairwise(rows.offsets.tolist()):
        ids = torch.from_numpy(rows.ids[None, start:end]).long()
        with torch.no_grad():
            mine, others = (torch.log_softmax(one(input_ids=ids).logits[0], -1) for one in (tuned, base))
        labelled = torch.from_numpy(rows.labels[start:end] >= 0)  # not one before: the labels' own places
        places += (mine.exp() * (mine - others)).sum(-1)[labelled].tolist()
    wanted = metric.score(tuned, rows).loss + COEFFICIENT * float(np.mean(places))
    assert np.mean(places) > 0.1
    assert losses_of(tuned, base, rows, COEFFICIENT).mean() == pytest.approx(wanted, rel=1e-5)


def test_the_divergence_depends_on_the_direction(
    base: torch.nn.Module, tuned: torch.nn.Module, make_examples: Callable[..., Examples]
) -> None:
    rows = make_examples(LENGTHS)
    there, back = divergences(tuned, base, rows), divergences(base, tuned, rows)
    assert (there > 0).all()
    assert (np.abs(there - back) > 1e-4).all()


def test_preference_pairs_are_scored_by_what_was_gained_on_the_base_model(
    base: torch.nn.Module, tuned: torch.nn.Module, make_examples: Callable[..., Examples]
) -> None:
    pairs = with_base(base, make_examples(LENGTHS, group=2))
    before, after = (losses_of(one, base, pairs, 0.0) for one in (base, tuned))
    np.testing.assert_allclose(before, np.log(2), atol=1e-5)
    gains = metric.reference_logprobs(tuned, pairs) - metric.reference_logprobs(base, pairs)
    margins = 0.1 * (gains[::2] - gains[1::2])
    np.testing.assert_allclose(after, np.log1p(np.exp(-margins)), rtol=1e-4)


def test_single_answers_have_nothing_of_the_base_model(
    base: torch.nn.Module, make_examples: Callable[..., Examples]
) -> None:
    rows = make_examples(LENGTHS)
    assert with_base(base, rows) is rows
