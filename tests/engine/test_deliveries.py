"""The bench of deliveries: what it simulates is a search, and a run that decides otherwise is noticed."""

from __future__ import annotations

import math
import random
from itertools import count
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from bench.deadline import decisions, runs
from bench.deadline.landscape import LOWEST_LOSS, Landscape
from bench.deadline.simulated_machine import Faults, Seconds
from bench.harness import tiny_jobs
from bench.reliability import deliveries
from shared.messages.runs import Phase
from trainer_node.engine.search.strategy import first_trial
from trainer_node.engine.search.trial import Trial, read_search

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
SECONDS = Seconds(start=3.0, load=1.0, ingest=1.0, row=0.02, save=1.0, export=1.0, tokens_per_s=20.0)
READY_BY, DEADLINE, ROWS = 3600.0, 3630.0, 120  # time for several trials and a run on all rows


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("aim", deliveries.AIMS)
def test_a_run_that_is_killed_where_it_was_aimed_at_still_delivers(aim: Phase, tmp_path: Path) -> None:
    data = tiny_jobs.write_rows(tmp_path / "rows.json", ROWS)
    world = deliveries.AimedWorld(SECONDS, Faults(), random.Random(0), READY_BY, DEADLINE)
    world.aim = aim
    places: list[str] = []
    ended = runs.live(
        world,
        tmp_path / "run",
        data,
        computes=False,
        profile="auto",
        answers=Landscape(random.Random(1)),
        killed=lambda: places.append(deliveries.place_of(tmp_path / "run", world)),
    )
    assert ended.at < DEADLINE, ended.why
    assert len(places) == world.kills == 1
    # There may be nothing to average: then the export comes at once.
    assert places[0] in {Phase.CHOOSE: ("averaging", "export")}.get(aim, (aim.value,))
    kinds = deliveries.kinds_of(tmp_path / "run")
    assert kinds["whole"] > 1
    assert kinds["refits"] >= 1
    assert ended.measured  # by the search, if no time was left to do it again


def test_simulated_trials_find_the_valley(tmp_path: Path) -> None:
    data = tiny_jobs.write_rows(tmp_path / "rows.json", ROWS)
    landscape = Landscape(random.Random(3))
    landscape.best_rate, landscape.best_epochs = 3.0, 1.2
    world = deliveries.AimedWorld(SECONDS, Faults(), random.Random(0), READY_BY, DEADLINE)
    assert math.isfinite(
        runs.live(world, tmp_path / "run", data, computes=False, profile="auto", answers=landscape).at
    )
    found = read_search(tmp_path / "run")
    assert found is not None
    losses = [one.loss for one in found.done if one.loss is not None and not one.trial.refit]
    assert min(losses) < losses[0] - 0.01
    assert min(losses) > LOWEST_LOSS - 0.05
    assert any(one.lowest_epochs for one in found.done)


def test_resumed_runs_decide_alike_and_one_that_does_not_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_jobs.write_rows(tmp_path / "rows.json", ROWS)
    figures = decisions.compare(2, 0, tmp_path, data)
    assert figures["kills"] >= figures["resumed"] == 2
    assert figures["trials"] > 0
    assert figures["differ"] == 0
    asked = count()

    def moody(trial: Trial, *_: object) -> Trial:
        return replace(trial, epochs=trial.epochs + next(asked))

    monkeypatch.setattr(first_trial, "with_prior", moody)
    assert decisions.compare(1, 0, tmp_path, data)["differ"] == 1
