"""What a run has reached so far, as a submission, while its worker may go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

from shared.clock import WallClock
from shared.messages.runs import OutcomeStatus, decode_outcome, decode_worker_job
from shared.planning.throughput import Costs
from tests.engine.positions import position
from tests.engine.worker_run import finish
from trainer_node.contest.validity import objections
from trainer_node.engine import early_export
from trainer_node.engine.context import RunContext, RunRecord, read_record
from trainer_node.engine.early_export import NOTHING_YET, measured_group
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.search.kept_trials import trial_folder
from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.trial import read_search
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.checkpoint import Position
from trainer_node.engine.train.dev_curve import DevCurve
from trainer_node.engine.train.saved_state import snapshot_name


def export(job: Path, target: Path, *below: str) -> int:
    return early_export.main([str(job.parent), str(target), *below])


def test_a_checkpoint_becomes_a_submission(killed_job: Path, tiny_model: Path, tmp_path: Path) -> None:
    before = {path.name for path in killed_job.parent.iterdir()}
    assert export(killed_job, tmp_path / "early") == 0
    assert {path.name for path in killed_job.parent.iterdir()} == before  # it is the worker's
    assert objections(tmp_path / "early", tiny_model) == []
    outcome = decode_outcome((tmp_path / "early.json").read_bytes())
    assert outcome.status is OutcomeStatus.READY
    assert outcome.metrics is not None
    assert outcome.metrics.base_loss > 0.0
    newest = checkpoint.newest(killed_job.parent / "checkpoints", print)
    assert newest is not None
    assert outcome.step == newest.manifest.position.step
    weights = load_file(tmp_path / "early" / "adapter_model.safetensors")
    assert any(bool(value.any()) for name, value in weights.items() if ".lora_B." in name)


def test_the_files_hold_the_checkpoints_weights(
    make_job: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    job = make_job(profile="lora_r16")
    finish(job)
    assert export(job, tmp_path / "early") == 0
    early = load_file(tmp_path / "early" / "adapter_model.safetensors")
    own = load_file(job.parent / "export" / "adapter_model.safetensors")
    assert early.keys() == own.keys()
    config = json.loads((tmp_path / "early" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "upstream/tiny"
    newest, known = checkpoint.newest(job.parent / "checkpoints", print), read_record(job.parent)
    assert newest is not None
    assert known is not None
    group, _ = measured_group(newest.manifest.position, checkpoint.groups(newest.folder), known[0])
    kept = newest.tensors(group)
    total = sum(float(value.double().abs().sum()) for value in early.values())
    assert total == pytest.approx(sum(float(value.double().abs().sum()) for value in kept.values()), rel=1e-5)


def test_before_the_first_checkpoint_there_is_nothing(make_job: Callable[..., Path], tmp_path: Path) -> None:
    assert export(make_job(), tmp_path / "early") == NOTHING_YET
    assert not (tmp_path / "early").exists()


def test_a_loss_to_beat_is_beaten_or_nothing_is_written(killed_job: Path, tmp_path: Path) -> None:
    assert export(killed_job, tmp_path / "early", "0.0001") == NOTHING_YET
    assert not (tmp_path / "early").exists()


def test_the_best_trial_of_a_search_is_exported(make_job: Callable[..., Path], tmp_path: Path) -> None:
    job = make_job(profile="auto")
    own = finish(job)
    assert own.metrics is not None
    assert export(job, tmp_path / "early") == 0
    outcome = decode_outcome((tmp_path / "early.json").read_bytes())
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.metrics.final_loss < outcome.metrics.base_loss
    assert export(job, tmp_path / "again", repr(outcome.metrics.final_loss)) == NOTHING_YET


def test_a_trial_that_was_best_as_an_average_is_exported_as_that(
    make_job: Callable[..., Path], tmp_path: Path
) -> None:
    job = make_job(profile="auto")
    finish(job)
    found = read_search(job.parent)
    assert found is not None
    best = best_of(found.done)
    assert best is not None
    number, run = found.done.index(best), context_of(job)
    kept = checkpoint.load(trial_folder(run.folder, number), best.weights)
    weights = kept.tensors(best.weights)
    groups = {
        "best": {name: torch.zeros_like(value) for name, value in weights.items()},
        snapshot_name(1): {name: value + 1.0 for name, value in weights.items()},
        snapshot_name(2): {name: value - 1.0 for name, value in weights.items()},
    }
    made = checkpoint.save(tmp_path / "made", kept.manifest.position, "", groups, {})
    checkpoint.link(made, trial_folder(run.folder, number), set(groups))
    averaged = replace(best, weights="best", snapshots=[1, 2])
    known = read_record(job.parent)
    assert known is not None
    choice = early_export.best_choice(run, *known, replace(found, done=[*found.done[:number], averaged]))
    assert choice is not None
    assert choice.loss == best.loss
    assert (choice.reached.step, choice.reached.tokens) == (best.step, best.step_tokens)
    exported = choice.weights()
    assert exported.keys() == weights.keys()
    assert all(torch.allclose(exported[name], weights[name].float(), atol=1e-5) for name in weights)


def context_of(job: Path) -> RunContext:
    given = decode_worker_job(job.read_bytes())
    reporter = Reporter(job.parent / "progress.jsonl", given.task, given.slot)
    return RunContext(given, job.parent, WallClock(), reporter, Stop())


def test_measured_weights_come_before_the_last_ones() -> None:
    place, record = measured(2.0, 1.0), recorded(2.5, 1.5)
    assert measured_group(place, frozenset({"weights", "best"}), record) == ("best", 1.5)
    assert measured_group(place, frozenset({"weights"}), record) == ("weights", None)


def measured(*losses: float) -> Position:
    """A position whose curve has one point."""
    return position(5, tokens=500, curve=DevCurve().extended(3, 300, list(losses), 0.1))


def recorded(*base_losses: float) -> RunRecord:
    return RunRecord(
        fingerprint="",
        base_losses=list(base_losses),
        train_examples=10,
        train_tokens=100,
        dropped={},
        costs=Costs(),
    )


def test_a_curve_on_some_rows_is_compared_by_what_was_gained_on_them() -> None:
    """The first two rows are easy: their mean loss is no loss of all four."""
    groups, record = frozenset({"weights", "best"}), recorded(1.0, 1.0, 5.0, 5.0)
    assert measured_group(measured(0.5, 0.5), groups, record) == ("best", 2.5)
