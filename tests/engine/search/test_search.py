"""Whole jobs of the profile auto: several training runs, the best one submitted, nothing lost in between."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from shared.messages.offers import TaskType
from shared.messages.runs import OutcomeStatus, Phase
from shared.planning.profiles import PROFILES
from tests.engine.search.search_run import record_of
from tests.engine.worker_run import (
    data_of,
    finish,
    progress_of,
    write_rows,
)
from trainer_node.engine.context import RunContext
from trainer_node.engine.search import scoring
from trainer_node.engine.search.kept_trials import kept_weights, trial_folder
from trainer_node.engine.search.strategy import probes as strategy_probes
from trainer_node.engine.search.strategy import short_trials
from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.strategy.delta_factor import rate_change
from trainer_node.engine.search.trial import LAST_PASS_RATE, Trial
from trainer_node.engine.train import oom_fallback
from trainer_node.engine.train.state import TrainState

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_a_search_ends_lower_than_its_first_trial_and_says_what_it_tried(
    make_job: Callable[..., Path],
) -> None:
    job = make_job(profile="auto", ready_by=140.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    found = record_of(job)
    best, first = best_of(found.done), found.done[0].loss
    assert len(found.done) > 2
    assert best is not None
    assert best.loss is not None
    assert first is not None
    assert best.loss < first
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.metrics.final_loss == pytest.approx(best.loss)
    refits = [result for result in found.done if result.trial.refit]
    assert refits
    card = (job.parent / "export" / "README.md").read_text()
    assert f"lowest held-out loss of {len(found.done) - len(refits)} trials" in card
    assert f"run again on all rows, {len(refits)} times" in card
    lines = progress_of(job)
    assert [phase for phase in Phase if any(line.phase is phase for line in lines)] == list(Phase)
    training = [line for line in lines if line.phase is Phase.TRAIN]
    for values in ([line.progress for line in training], [line.step for line in training]):
        assert values == sorted(values)  # several runs look like one to people
    assert not any("refused" in (line.message or "") for line in lines)


def test_a_small_batch_is_kept_where_packs_of_the_longest_row_would_hold_more(
    make_job: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"q": f"Define number {n}.", "a": f"It comes after {n - 1}."} for n in range(60)]
    rows.append({"q": "Count.", "a": " ".join(map(str, range(150)))})
    (tmp_path / "long.json").write_text(json.dumps(rows))
    job = make_job(profile="auto", ready_by=9.0, dataset=str(tmp_path / "long.json"))
    assert finish(job).status is OutcomeStatus.READY
    first = record_of(job).done[0]
    assert first.trial.batch == 2
    assert first.lowest_epochs is None  # it went to its end
    assert first.step >= 0.9 * first.trial.epochs * 49 / 2  # of 49 training rows: not 8 or more in a pack


def test_all_arms_have_the_momentum_of_the_profile(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rank 32 would be no less than the whole matrix on so small a model.
    monkeypatch.setitem(PROFILES, "auto", replace(PROFILES["auto"], arms=("lora_r16",)))
    job = make_job(profile="auto", ready_by=40.0)
    finish(job)
    plans = record_of(job).plans
    assert len(plans) == 2
    assert "LoRA r16" in plans
    assert {plan.betas for plan in plans.values()} == {(0.6, 0.99)}


def test_the_winners_search_compares_rates_by_probes_and_trains_once(make_job: Callable[..., Path]) -> None:
    job = make_job(profile="winner_2026_06", ready_by=120.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    *probes, main, last = record_of(job).done
    assert [probe.trial.stage for probe in probes] == ["check"] * 3
    assert all(probe.probe_loss is not None and probe.loss is None for probe in probes)
    assert main.trial.main
    assert main.loss is not None
    assert last.trial.last_pass
    assert last.trial.rate == pytest.approx(main.trial.rate / 4)
    assert last.loss is not None
    assert last.loss < main.loss  # on the rows that it was trained on
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.metrics.final_loss == pytest.approx(main.loss)  # the run's own, on held-out rows
    assert main.loss < outcome.metrics.base_loss
    card = (job.parent / "export" / "README.md").read_text()
    assert "the highest rate whose probe was hardly worse than the best of 3" in card
    assert "then one pass over the development rows" in card
    assert sorted(folder.name for folder in (job.parent / "trials").iterdir()) == ["003", "004"]


def test_the_winners_probes_of_pairs_are_judged_on_pairs_held_out(
    make_job: Callable[..., Path], tmp_path: Path
) -> None:
    job = make_job(profile="winner_2026_06", ready_by=250.0, **data_of(TaskType.DPO, tmp_path))
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    *probes, main = record_of(job).done
    assert main.trial.main
    assert main.loss is not None
    assert probes
    assert all(probe.trial.stage and probe.trial.rate <= 1.001 for probe in probes)
    lowest = min(probe.probe_loss for probe in probes if probe.probe_loss is not None)
    assert lowest < math.log(2)  # which is what the untrained model scores
    assert [probe.trial.rate for probe in probes if probe.probe_loss == lowest] == [main.trial.rate]


@pytest.mark.parametrize(("task_type", "ready_by"), [(TaskType.CHAT, 100.0), (TaskType.DPO, 50.0)])
def test_chat_and_preference_jobs_are_searched(
    task_type: TaskType, ready_by: float, make_job: Callable[..., Path], tmp_path: Path
) -> None:
    job = make_job(profile="auto", ready_by=ready_by, **data_of(task_type, tmp_path, count=120))
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.metrics.final_loss < outcome.metrics.base_loss - 0.02
    assert len(record_of(job).done) > 1


@pytest.mark.alone  # a search measures what its end will take; another load by then is no fault of its own
def test_a_search_in_real_time_ends_before_the_deadline(make_job: Callable[..., Path]) -> None:
    start = time.time()
    job = make_job(profile="auto", clock="wall", start_at=start, ready_by=start + 30.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.at < start + 30.0
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert len(record_of(job).done) > 1


def test_more_rows_than_there_is_time_for_get_one_long_run(
    make_job: Callable[..., Path], tmp_path: Path
) -> None:
    job = make_job(profile="auto", ready_by=40.0, dataset=str(write_rows(tmp_path, 20_000)))
    assert finish(job).status is OutcomeStatus.READY
    done = record_of(job).done
    assert done[-1].trial.main
    assert sum(result.tokens for result in done[:-1]) < 0.3 * done[-1].tokens


def test_a_trial_that_fails_does_not_fail_a_job_that_has_a_better_one(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = oom_fallback.descend, list[int]()

    def fails_later(run: RunContext, state: TrainState) -> None:
        calls.append(state.trial)
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        real(run, state)

    monkeypatch.setattr(oom_fallback, "descend", fails_later)
    job = make_job(profile="auto", ready_by=30.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    done = record_of(job).done
    assert [result.loss is None for result in done] == [False, True]
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert done[0].loss is not None
    # It is submitted at the best factor on its delta, which was found to be better.
    assert done[0].factor not in (None, 1.0)
    assert done[0].loss - 0.2 < outcome.metrics.final_loss < done[0].loss
    assert any("times its delta: held-out loss" in (line.message or "") for line in progress_of(job))


def test_a_long_run_that_fails_is_run_again_at_a_lower_rate(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Shorter runs that compare rates came before it: their weights would be a poor submission."""
    real, failed = oom_fallback.descend, list[int]()

    def fails_once(run: RunContext, state: TrainState) -> None:
        if record_of(job).trial == replace(record_of(job).trial or Trial(arm=""), main=True) and not failed:
            failed.append(state.trial)
            raise RuntimeError("the device is gone")
        real(run, state)

    monkeypatch.setattr(oom_fallback, "descend", fails_once)
    for module in (strategy_probes, short_trials):
        monkeypatch.setattr(module, "PROBE_STEPS", 5)
    job = make_job(profile="auto", ready_by=120.0, dataset=str(write_rows(tmp_path, 3_000)))
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    *probes, first, second, last = record_of(job).done
    assert len(probes) >= 2
    assert (first.trial.main, first.loss) == (True, None)
    assert second.trial.main
    assert second.trial.rate == pytest.approx(first.trial.rate / 3)
    assert last.trial.last_pass
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss == pytest.approx(second.loss)
    card = (job.parent / "export" / "README.md").read_text()
    assert "average of" not in card  # the pass went on from the run, and is no other one


def spoil(monkeypatch: pytest.MonkeyPatch, is_spoilt: Callable[[int], bool]) -> None:
    """Give trials of these numbers weights that are no numbers, too late for training to go back."""
    real = oom_fallback.descend

    def descend(run: RunContext, state: TrainState) -> None:
        real(run, state)
        if is_spoilt(state.trial):
            for weight in state.deltas.parameters.values():
                weight.data.fill_(math.nan)
            state.average, state.best = None, {}

    monkeypatch.setattr(oom_fallback, "descend", descend)


def test_a_trial_whose_weights_are_no_numbers_is_left_behind(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda trial: trial == 1)
    job = make_job(profile="auto", ready_by=60.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    done = record_of(job).done  # it can be read
    assert done[1].loss is None
    assert len(done) > 2
    assert not (job.parent / "trials" / "001").exists()


def test_without_a_number_from_any_trial_the_base_model_is_submitted(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda trial: True)
    job = make_job(profile="auto", ready_by=20.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss == outcome.metrics.base_loss
    assert any("the base model is submitted" in (line.message or "") for line in progress_of(job))


def test_the_last_pass_begins_at_the_best_factor_on_what_the_long_run_changed(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, begun = oom_fallback.descend, dict[int, dict[str, torch.Tensor]]()

    def descend(run: RunContext, state: TrainState) -> None:
        begun[state.trial] = {name: value.clone() for name, value in state.deltas.state().items()}
        real(run, state)

    monkeypatch.setattr(oom_fallback, "descend", descend)
    monkeypatch.setattr(scoring, "best_factor", lambda *_: 0.75)
    monkeypatch.setattr(strategy_probes, "PROBE_STEPS", 5)
    job = make_job(profile="auto", ready_by=120.0, dataset=str(write_rows(tmp_path, 3_000)))
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    done = record_of(job).done
    main, last = done[-2:]
    assert main.trial.main
    assert last.trial.last_pass
    assert last.trial.rate == pytest.approx(main.trial.rate * rate_change(0.75) * LAST_PASS_RATE)
    trained = kept_weights(trial_folder(job.parent, len(done) - 2), main)()
    for name, value in begun[len(done) - 1].items():
        assert torch.equal(value, torch.lerp(begun[0][name], trained[name].to(value), 0.75)), name
