"""The weights' tail average, and the choice."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from trainer_node.engine.evaluate.candidates import Candidate, TrainProgress, loss_over_base, ranked
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.train.weight_average import TailAverage


def _score(*losses: float) -> Evaluation:
    return Evaluation(float(np.mean(losses)), np.array(losses))


def _average(*values: float) -> tuple[torch.nn.Parameter, TailAverage]:
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = TailAverage({"w": parameter})
    for value in values:
        parameter.data.fill_(value)
        average.update()
    return parameter, average


def test_average_is_the_mean_of_the_steps() -> None:
    parameter, average = _average(1.0, 2.0, 6.0)
    with average.applied():
        assert torch.allclose(parameter, torch.full((2,), 3.0))
    assert torch.equal(parameter, torch.full((2,), 6.0))
    assert torch.allclose(average.weights["w"], torch.full((2,), 3.0))


def test_what_memory_was_too_short_for_was_not_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter, average = _average(1.0)
    parameter.data.fill_(9.0)
    with monkeypatch.context() as full:
        full.setattr(torch, "_foreach_lerp_", _no_memory)
        with pytest.raises(RuntimeError):
            average.update()
    parameter.data.fill_(3.0)
    average.update()
    assert torch.allclose(average.weights["w"], torch.full((2,), 2.0))


def _no_memory(*_: object) -> None:
    raise RuntimeError("CUDA error: out of memory")


def _candidate(name: str, *losses: float) -> Candidate:
    return Candidate(name, TrainProgress(1, 1, 1.0), _score(*losses) if losses else None)


def _names(*candidates: Candidate, base: float = 5.0) -> list[str]:
    return [candidate.name for candidate in ranked(candidates, [base] * 100)]


def test_best_comes_first_and_ties_go_to_the_first() -> None:
    assert _names(_candidate("last", 3.0), _candidate("average", 2.0)) == ["average", "last"]
    assert _names(_candidate("last", 2.0), _candidate("average", 2.0)) == ["last", "average"]


def test_what_gives_no_number_or_was_not_measured_comes_last() -> None:
    nan = _candidate("diverged", math.nan, 1.0)
    assert _names(nan, _candidate("unmeasured"), _candidate("bad", 9.0)) == ["bad", "diverged", "unmeasured"]
    assert loss_over_base(nan, [5.0, 5.0]) == math.inf


def test_a_shorter_measurement_is_compared_on_common_rows() -> None:
    last, average = [1.0] * 40 + [9.0] * 60, [1.5] * 40
    assert _names(_candidate("last", *last), _candidate("average", *average)) == ["last", "average"]


def test_measurements_of_few_rows_are_compared_by_what_they_gain() -> None:
    """Four easy rows must not beat a hundred."""
    base = [1.0] * 4 + [5.0] * 96
    found = ranked([_candidate("earlier", *[1.1] * 4), _candidate("last", *[b - 0.1 for b in base])], base)
    assert [candidate.name for candidate in found] == ["last", "earlier"]


def test_average_is_measured_while_the_model_has_it() -> None:
    parameter, average = _average(1.0, 3.0)
    candidate = replace(_candidate("average"), weights_applied=average.applied)
    measured = candidate.measured(lambda: _score(parameter.detach()[0].item()))
    assert measured.score is not None
    assert measured.score.loss == 2.0
    assert torch.equal(parameter, torch.full((2,), 3.0))
