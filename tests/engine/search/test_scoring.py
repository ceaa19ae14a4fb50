"""What a trial is worth whose weights were scored on all rows, or on fewer because time ran out."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

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
