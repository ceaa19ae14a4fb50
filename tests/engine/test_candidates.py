"""The weights' tail average, and the choice."""

from __future__ import annotations

import numpy as np
import torch

from trainer_node.engine.candidates import TailAverage, rank
from trainer_node.engine.score import Score


def _score(*losses: float) -> Score:
    return Score(float(np.mean(losses)), np.array(losses))


def _average(*values: float) -> tuple[torch.nn.Parameter, TailAverage]:
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = TailAverage({"w": parameter})
    for value in values:
        parameter.data.fill_(value)
        average.update()
    return parameter, average


def test_average_is_the_mean_of_the_steps():
    parameter, average = _average(1.0, 2.0, 6.0)
    with average.applied():
        assert torch.allclose(parameter, torch.full((2,), 3.0))
    assert torch.equal(parameter, torch.full((2,), 6.0))
    assert torch.allclose(average.weights["w"], torch.full((2,), 3.0))


def test_best_comes_first():
    parameter, average = _average(1.0, 3.0)
    candidates = rank(average, lambda: _score(parameter.detach()[0].item()))
    assert [c.name for c in candidates] == ["average", "last"]
    assert [c.loss for c in candidates] == [2.0, 3.0]


def test_ties_go_to_the_last_weights():
    _, average = _average(1.0, 3.0)
    assert [c.name for c in rank(average, lambda: _score(1.0))] == ["last", "average"]


def test_a_shorter_measurement_is_compared_on_common_rows():
    _, average = _average(1.0, 3.0)
    scores = iter([_score(1.0, 1.0, 9.0), _score(2.0, 2.0)])
    assert rank(average, lambda: next(scores))[0].name == "last"


def test_without_time_only_the_last_weights_unmeasured():
    _, average = _average(1.0, 3.0)
    (only,) = rank(average, None)
    assert (only.name, only.score) == ("last", None)
    assert [c.name for c in rank(None, lambda: _score(1.0))] == ["last"]
