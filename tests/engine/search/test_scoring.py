"""What a trial is worth whose weights were scored on all rows, or on fewer because time ran out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shared.planning.throughput import Costs
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.search import scoring
from trainer_node.engine.search.strategy.delta_factor import LEAST
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
        schedule=SimpleNamespace(state=SimpleNamespace(cooldown=None)),
    )
    saved, rows = frozenset({"weights", "average"}), cast("Examples", range(ROWS))
    return scoring.scored(run, record, rows, trial, state, saved, first=False, start=None, factors_until=0.0)


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


def factors_by(
    monkeypatch: pytest.MonkeyPatch,
    *,
    lowest_at: float,
    now: float = 0.0,
    scores: int = 99,
    trained_s: float = 90.0,
    best: float | None = None,
) -> tuple[float | None, float | None, float]:
    """Return the factors of a weight that came from 0 to 1, and the weight afterwards.

    The first one is of the last weights, the second of the run's lowest point, if it has a `best` one. Its
    loss is lowest at a place. After so many scores time has run out, and one row alone is scored.
    """
    weight, noise = {"weight": torch.ones(1)}, np.random.default_rng(0).normal(0.0, 0.1, ROWS)
    left = [scores]

    def losses_at(place: float, count: int = ROWS) -> NDArray[np.float64]:
        return 2.0 + noise[:count] + (place - lowest_at) ** 2

    def scorer(_run: Any, _record: Any, rows: Rows, _state: Any) -> Callable[[], Evaluation]:
        def score() -> Evaluation:
            left[0] -= 1
            losses = losses_at(weight["weight"].item(), len(rows) if left[0] >= 0 else 1)
            return Evaluation(float(losses.mean()), losses)

        return score

    def load_state(state: dict[str, torch.Tensor]) -> None:
        weight["weight"].copy_(state["weight"])

    monkeypatch.setattr(scoring, "scorer", scorer)
    clock = SimpleNamespace(time=lambda: now)
    run: Any = SimpleNamespace(process_group=SINGLE_PROCESS, clock=clock, patience=nullcontext)
    run.job = SimpleNamespace(ready_by=10.0)
    costs = SimpleNamespace(score_s=1.0, closing_s=0.0, load_s=0.0)
    record: Any = SimpleNamespace(costs=costs, base_loss=3.0, base_losses=[3.0] * ROWS)
    curve = DevCurve().extended(5, 500, losses_at(best).tolist(), 0.0) if best is not None else DevCurve()
    state: Any = SimpleNamespace(
        step=9,
        tokens=900,
        train_s=trained_s,
        average=None,
        health=Health(),
        curve=curve,
        best={} if best is None else {"weight": torch.full((1,), best)},
        snapshots={},
        schedule=SimpleNamespace(state=SimpleNamespace(cooldown=None)),
        deltas=SimpleNamespace(state=lambda: weight, load_state=load_state, parameters=weight),
    )
    start, dev = {"weight": torch.zeros(1)}, cast("Examples", Rows(ROWS))
    saved = frozenset({"weights", "best"})
    result = scoring.scored(run, record, dev, MAIN, state, saved, first=True, start=start, factors_until=10.0)
    return result.factor, result.lowest_factor, weight["weight"].item()


@pytest.mark.parametrize("lowest_at", [0.7, 0.9, 1.1])
def test_a_run_tells_at_which_factor_on_its_delta_its_loss_is_lowest(
    monkeypatch: pytest.MonkeyPatch, lowest_at: float
) -> None:
    factor, lowest, weight = factors_by(monkeypatch, lowest_at=lowest_at)
    assert factor == pytest.approx(lowest_at)
    assert lowest is None
    assert weight == 1.0  # as it was


def test_a_lowest_point_that_is_submitted_has_a_factor_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    factor, lowest, weight = factors_by(monkeypatch, lowest_at=0.4, best=0.5)
    assert factor == LEAST
    assert lowest == pytest.approx(0.8)
    assert weight == 1.0


def test_without_time_to_score_it_there_is_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert factors_by(monkeypatch, lowest_at=0.7, now=9.0)[0] is None  # it would take 2 s
    assert factors_by(monkeypatch, lowest_at=0.7, trained_s=1.0)[0] is None  # a tenth of it scores 5 rows
    for scores in (1, 2):  # the clock runs out with the first or the second factor
        assert factors_by(monkeypatch, lowest_at=0.7, scores=scores) == (None, None, 1.0)


def test_all_processes_have_time_for_another_average_or_none_has() -> None:
    """Saves took long, as only rank 0 knows: another process would score an average without it."""
    record = SimpleNamespace(costs=Costs(save_s=100.0, score_s=1.0))
    told = (record.costs.closing_s + 2.0,)
    group = SimpleNamespace(broadcast_floats=lambda *_: told)
    clock, job = SimpleNamespace(time=lambda: 0.0), SimpleNamespace(ready_by=60.0)
    for save_s in (100.0, 1.0):
        record.costs.save_s = save_s
        run: Any = SimpleNamespace(process_group=group, clock=clock, job=job)
        assert not scoring._has_time(run, cast(Any, record))()
