"""What the end of a search compares: scores on the same rows only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from msgspec.structs import replace

from shared.planning.plan import Plan
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.search.choose import explained, lower_on_its_rows
from trainer_node.engine.search.trial import Trial, TrialResult, last_pass_of


def evaluation(*losses: float) -> Evaluation:
    return Evaluation(float(np.mean(losses)), np.array(losses))


@pytest.mark.parametrize(
    ("score", "lower"),
    [
        (evaluation(1.0, 2.0, 6.0), True),
        (evaluation(1.0, 3.0, 6.0), False),  # equal
        (evaluation(2.0), False),  # cut short on rows that are easy: its mean is lower, its row is not
        (evaluation(0.5), True),
    ],
)
def test_a_score_that_was_cut_short_is_compared_on_its_own_rows(score: Evaluation, lower: bool) -> None:
    assert lower_on_its_rows(score, evaluation(1.0, 3.0, 6.0)) is lower


def test_the_model_card_says_the_rate_of_the_runs_on_all_rows(make_plan: Callable[..., Plan]) -> None:
    trial = Trial(arm="dense")
    best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=0.7)
    again = TrialResult(trial=replace(trial, rate=0.343, refit=True), loss=1.9, tokens=1, train_s=1.0)
    why = explained(make_plan("dense"), [best, again], best).deviations[-1].reason
    assert "run again on all rows, once, at rate x 0.34: its loss is lowest at 0.70 of the way" in why
    same = replace(again, trial=replace(trial, refit=True))
    assert "at rate" not in explained(make_plan("dense"), [best, same], best).deviations[-1].reason
    without = replace(best, factor=None)  # a search by probes
    last = replace(again, trial=last_pass_of(trial))
    why = explained(make_plan("dense"), [without, last], without).deviations[-1].reason
    assert why.endswith("then one pass over the development rows")
