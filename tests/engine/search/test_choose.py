"""What a search submits: averages, single runs, rounded matrices; scores are compared on the same rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

from shared.messages.runs import OutcomeStatus
from shared.planning.profiles import PROFILES
from tests.engine.search.search_run import record_of
from tests.engine.worker_run import finish, progress_of
from trainer_node.engine import prepare
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.export import rounding
from trainer_node.engine.model.adapters import stable_name
from trainer_node.engine.search import choose
from trainer_node.engine.search.choose import lower_on_its_rows
from trainer_node.engine.search.kept_trials import kept_weights, trial_folder
from trainer_node.engine.search.strategy import first_trial, refits
from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.trial import Trial, TrialResult
from trainer_node.engine.time_budget import Part
from trainer_node.engine.train.health import Health

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


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


def test_the_trial_that_runs_on_all_rows_repeat_is_chosen_while_its_weights_or_theirs_are_there(
    tmp_path: Path,
) -> None:
    lora = TrialResult(trial=Trial(arm="lora"), loss=2.0, tokens=1, train_s=1.0)
    dense = TrialResult(trial=Trial(arm="dense"), loss=1.99, tokens=1, train_s=1.0)
    refit = TrialResult(trial=Trial(arm="lora", refit=True, of=0), loss=1.5, tokens=1, train_s=1.0)
    done = [lora, dense, refit]
    for number, (kept, expected) in enumerate(
        (({0}, lora), ({2}, lora), ({1, 2}, lora), ({1}, dense), (set[int](), dense))
    ):
        folder = tmp_path / str(number)
        for one in kept:
            trial_folder(folder, one).mkdir(parents=True)
        run = SimpleNamespace(folder=folder, process_group=SINGLE_PROCESS)
        runner: Any = SimpleNamespace(known=SimpleNamespace(done=done), unsaved={}, run=run)
        assert choose.chosen(runner) is expected
        runner.known.done = done[:2]
        assert choose.chosen(runner) is dense


def _said_of_rounding(job: Path) -> list[str]:
    messages = [line.message or "" for line in progress_of(job)]
    return [message for message in messages if "rounded by their inputs" in message]


def test_what_is_submitted_is_rounded_by_inputs(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "computes_bf16", lambda hardware: True)
    job = make_job(profile="auto", ready_by=60.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    (said,) = _said_of_rounding(job)
    rounded, nearest = (float(text) for text in re.findall(r"\d+\.\d+", said))
    assert rounded == pytest.approx(nearest, abs=0.02)
    other = make_job("other", profile="winner_2026_06", ready_by=60.0)
    assert finish(other).status is OutcomeStatus.READY
    assert not _said_of_rounding(other)


def test_a_rounding_that_is_worse_is_dropped(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "computes_bf16", lambda hardware: True)
    monkeypatch.setattr(rounding, "round_matrix", lambda weight, products: torch.zeros_like(weight))
    job = make_job(profile="auto", ready_by=60.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    (said,) = _said_of_rounding(job)
    rounded, nearest = (float(text) for text in re.findall(r"\d+\.\d+", said))
    assert rounded > nearest
    files = load_file(job.parent / "export" / "model.safetensors")
    assert all(value.any() for value in files.values())


def test_a_rounding_that_memory_or_time_does_not_allow_loses_nothing(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "computes_bf16", lambda hardware: True)

    def too_large(weight: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    def too_late(
        model: object, names: list[str], rows: object, has_time: Callable[[], bool]
    ) -> dict[str, torch.Tensor]:
        assert has_time()
        return {}

    for name, part, function, words in (
        ("large", "round_matrix", too_large, "memory ran out"),
        ("late", "rounded", too_late, "14 of 14 matrices"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(rounding, part, function)
            job = make_job(name, profile="auto", ready_by=30.0)
            assert finish(job).status is OutcomeStatus.READY
        assert not _said_of_rounding(job)
        assert any(words in (line.message or "") for line in progress_of(job))


@pytest.mark.parametrize(("apart", "joins"), [(1e9, True), (0.5, False)])  # below 1 all are apart
def test_of_runs_of_lora_the_mean_of_their_factors_is_submitted(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, apart: float, joins: bool
) -> None:
    monkeypatch.setattr(refits, "MOST_APART", apart)
    lora = replace(PROFILES["auto"], full=False, rank=16, arms=("lora_r16",))
    monkeypatch.setitem(PROFILES, "auto", lora)
    job = make_job(profile="auto", ready_by=60.0)
    assert finish(job).status is OutcomeStatus.READY
    done = record_of(job).done
    again = [number for number, result in enumerate(done) if result.trial.refit]
    assert {done[number].trial.arm for number in again} == {"LoRA r16"}
    assert len(again) > 1
    assert {done[number].trial.with_best for number in again} == {joins}
    best = best_of(done)
    assert best
    members = again + [done.index(best)] * joins
    submitted = load_file(job.parent / "export" / "adapter_model.safetensors")
    kept = [
        load_file(job.parent / "trials" / f"{number:03d}" / f"{done[number].weights}.safetensors")
        for number in members
    ]
    for name, value in submitted.items():
        mean = sum(one[stable_name(name)] for one in kept) / len(kept)
        torch.testing.assert_close(value, mean)


def test_a_trial_of_lora_and_the_only_run_on_all_rows_are_averaged(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = replace(PROFILES["auto"], full=False, rank=16, arms=("lora_r16",))
    monkeypatch.setitem(PROFILES, "auto", lora)
    monkeypatch.setattr(first_trial, "LORA_STEPS", 1)
    monkeypatch.setattr(refits, "MOST_REFITS", 1)
    monkeypatch.setattr(refits, "MOST_APART", 1e9)
    job = make_job(profile="auto", ready_by=60.0)
    assert finish(job).status is OutcomeStatus.READY
    known = record_of(job)
    best = best_of(known.done)
    again = [result for result in known.done if result.trial.refit]
    assert best
    assert [(one.trial.with_best, one.trial.averaged) for one in again] == [(True, False)]
    numbers = [known.done.index(one) for one in (*again, best)]
    first, second = (
        kept_weights(trial_folder(job.parent, number), known.done[number])() for number in numbers
    )
    for name, value in load_file(job.parent / "export" / "adapter_model.safetensors").items():
        key = stable_name(name)
        torch.testing.assert_close(value, (first[key] + second[key]) / 2)
    run: Any = SimpleNamespace(folder=job.parent)
    in_a_hurry = choose.submittable(run, known, None)
    assert in_a_hurry.name == f"trial {numbers[0] + 1}"


def test_a_run_at_a_raised_rate_is_not_submitted_alone(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = replace(PROFILES["auto"], full=False, rank=16, arms=("lora_r16",))
    monkeypatch.setitem(PROFILES, "auto", lora)
    monkeypatch.setattr(refits, "is_undecided", lambda result: False)
    monkeypatch.setattr(refits, "MOST_APART", 0.5)  # below 1 all are apart: the trial doesn't join
    monkeypatch.setattr(choose, "affordable", lambda left_s, costs: frozenset(Part) - {Part.AVERAGE})
    job = make_job(profile="auto", ready_by=60.0)
    assert finish(job).status is OutcomeStatus.READY
    known = record_of(job)
    assert {result.trial.averaged for result in known.done if result.trial.refit} == {True}
    best = best_of(known.done)
    assert best
    number = known.done.index(best)
    submitted = load_file(job.parent / "export" / "adapter_model.safetensors")
    kept = load_file(job.parent / "trials" / f"{number:03d}" / f"{best.weights}.safetensors")
    for name, value in submitted.items():
        torch.testing.assert_close(value, kept[stable_name(name)])
    run: Any = SimpleNamespace(folder=job.parent)
    assert choose.submittable(run, known, None).name == f"trial {number + 1}"


def test_the_submitted_trials_skipped_steps_are_reported(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    after = Health.after

    def without_a_first_gradient(health: Health, loss: float, norm: float) -> Health:
        return after(health, loss, norm if health.seen or health.skipped else math.inf)

    monkeypatch.setattr(Health, "after", without_a_first_gradient)
    job = make_job(profile="auto", ready_by=60.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert {result.step_skipped for result in record_of(job).done} == {1}
    assert outcome.metrics is not None
    assert outcome.metrics.skipped_steps == 1
