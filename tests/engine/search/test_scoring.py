"""What a trial is worth whose weights were scored on all rows, or on fewer because time ran out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trainer_node.engine.distributed.process_group import SINGLE_PROCESS
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.search import scoring
from trainer_node.engine.search.trial import Trial, TrialResult
from trainer_node.engine.train.dev_curve import DevCurve
from trainer_node.engine.train.health import Health

ROWS = 100
PROBE, MAIN = Trial(arm="dense", epochs=0.03), Trial(arm="dense", epochs=1.0, main=True)


def result_of(monkeypatch: pytest.MonkeyPatch, trial: Trial, *losses: list[float]) -> TrialResult:
    """Score a trial whose last weights, and their average if there is one, have these losses."""
    scores = iter(Evaluation(float(np.mean(one)), np.array(one)) for one in losses)
    monkeypatch.setattr(scoring, "scorer", lambda *_: lambda: next(scores))
    run: Any = SimpleNamespace(process_group=SINGLE_PROCESS)
    costs = SimpleNamespace(score_s=1.0)
    record: Any = SimpleNamespace(costs=costs, base_loss=3.0, base_losses=[3.0] * ROWS)
    average = SimpleNamespace(count=2 * (len(losses) - 1), applied=nullcontext)
    state: Any = SimpleNamespace(
        step=9,
        tokens=900,
        train_s=90.0,
        average=average,
        health=Health(),
        curve=DevCurve(),
        snapshots={},
        schedule=SimpleNamespace(pulse=SimpleNamespace(cooldown=None)),
    )
    saved = frozenset({"weights", "average"})
    return scoring.scored(run, record, range(ROWS), trial, state, saved, first=False)  # type: ignore[arg-type]


def test_of_two_sets_of_weights_the_better_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = result_of(monkeypatch, PROBE, [2.0] * ROWS, [1.9] * ROWS)
    assert (found.weights, found.loss) == ("average", pytest.approx(1.9))


@pytest.mark.parametrize("trial", [PROBE, MAIN])
def test_a_set_that_was_scored_on_fewer_rows_does_not_cost_the_run(
    monkeypatch: pytest.MonkeyPatch, trial: Trial
) -> None:
    found = result_of(monkeypatch, trial, [2.0] * ROWS, [1.0] * 40)
    assert (found.weights, found.loss) == ("weights", pytest.approx(2.0))
    assert len(found.losses) == ROWS


def test_the_run_that_the_time_was_for_counts_with_the_rows_that_were_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert result_of(monkeypatch, MAIN, [2.0] * 40).loss == pytest.approx(2.0)
    assert result_of(monkeypatch, PROBE, [2.0] * 40).loss is None


class Rows:
    """As many rows, whose losses depend on how far the one weight has come."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def take(self, indices: NDArray[np.int64]) -> Rows:
        return Rows(len(indices))


def factor_by(
    monkeypatch: pytest.MonkeyPatch,
    *,
    lowest_at: float,
    now: float = 0.0,
    scores: int = 99,
    trained_s: float = 90.0,
) -> tuple[float | None, float]:
    """Return the factor of a weight that came from 0 to 1, and the weight afterwards.

    Its loss is lowest at a place; after so many scores time has run out, and one row alone is scored.
    """
    weight, noise = {"weight": torch.ones(1)}, np.random.default_rng(0).normal(0.0, 0.1, ROWS)
    left = [scores]

    def scorer(_run: Any, _record: Any, rows: Rows, _state: Any) -> Callable[[], Evaluation]:
        def score() -> Evaluation:
            left[0] -= 1
            count = len(rows) if left[0] >= 0 else 1
            losses = 2.0 + noise[:count] + (weight["weight"].item() - lowest_at) ** 2
            return Evaluation(float(losses.mean()), losses)

        return score

    def load_state(state: dict[str, torch.Tensor]) -> None:
        weight["weight"].copy_(state["weight"])

    monkeypatch.setattr(scoring, "scorer", scorer)
    clock = SimpleNamespace(time=lambda: now)
    run: Any = SimpleNamespace(process_group=SINGLE_PROCESS, clock=clock, patience=nullcontext)
    costs = SimpleNamespace(score_s=1.0)
    record: Any = SimpleNamespace(costs=costs, base_loss=3.0, base_losses=[3.0] * ROWS)
    state: Any = SimpleNamespace(
        step=9,
        tokens=900,
        train_s=trained_s,
        average=None,
        health=Health(),
        curve=DevCurve(),
        snapshots={},
        schedule=SimpleNamespace(pulse=SimpleNamespace(cooldown=None)),
        deltas=SimpleNamespace(state=lambda: weight, load_state=load_state),
    )
    start, dev = {"weight": torch.zeros(1)}, Rows(ROWS)
    saved, until = frozenset({"weights"}), 10.0
    result = scoring.scored(run, record, dev, MAIN, state, saved, start, until, first=True)  # type: ignore[arg-type]
    return result.factor, weight["weight"].item()


@pytest.mark.parametrize("lowest_at", [0.7, 0.9, 1.1])
def test_a_run_tells_at_which_factor_on_its_delta_its_loss_is_lowest(
    monkeypatch: pytest.MonkeyPatch, lowest_at: float
) -> None:
    factor, weight = factor_by(monkeypatch, lowest_at=lowest_at)
    assert factor == pytest.approx(lowest_at)
    assert weight == 1.0  # as it was


def test_without_time_to_score_it_there_is_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert factor_by(monkeypatch, lowest_at=0.7, now=9.0)[0] is None  # it would take 2 s
    assert factor_by(monkeypatch, lowest_at=0.7, trained_s=1.0)[0] is None  # a tenth of it scores 5 rows
    for scores in (1, 2):  # the clock runs out with the first or the second factor
        assert factor_by(monkeypatch, lowest_at=0.7, scores=scores) == (None, 1.0)
