"""What the end of a search compares: scores on the same rows only."""

from __future__ import annotations

import numpy as np
import pytest

from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.search.choose import lower_on_its_rows


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
