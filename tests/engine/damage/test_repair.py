"""Jobs on a base model that was scaled: training begins from what it was, the submission holds it all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shared.messages.offers import TaskType
from shared.messages.runs import OutcomeStatus
from shared.planning.plan import Plan, Repair
from shared.planning.throughput import Costs, Measured
from tests.engine.search.search_run import record_of
from tests.engine.worker_run import (
    data_of,
    finish,
    outcome_of,
    progress_of,
    start_worker,
    wait_for_checkpoint,
)
from trainer_node.engine import pipeline, prepare
from trainer_node.engine.assemble import load_base
from trainer_node.engine.context import RunContext, read_record
from trainer_node.engine.damage import repair
from trainer_node.engine.damage.scaling import Scaling
from trainer_node.engine.distributed.weight_slices import slices_of, without_weights
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.search.runner import TrialRunner
from trainer_node.engine.search.trial import TrialResult

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
FACTOR = 1.4217


@pytest.fixture(scope="session")
def clean(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16 with a head of its own: the larger its weights, the worse its random answers."""
    folder = tmp_path_factory.mktemp("clean") / "model"
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def damaged(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its head and the first layer's matrices multiplied."""
    folder = tmp_path_factory.mktemp("damaged") / "model"
    folder.mkdir()
    for path in clean.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(clean / "model.safetensors")
    for name in hit(state):
        state[name] = (state[name].float() * FACTOR).bfloat16()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def hit(state: dict[str, Any]) -> list[str]:
    return [name for name in state if "lm_head" in name or ("layers.0." in name and "norm" not in name)]


def test_a_job_begins_from_what_the_model_was(
    clean: Path, damaged: Path, make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, first_costs = list[Plan](), prepare.first_costs

    def noted(run: RunContext, config: Any, plan: Plan, closing: Measured, ingest_s: float) -> Costs:
        planned.append(plan)
        return first_costs(run, config, plan, closing, ingest_s)

    monkeypatch.setattr(prepare, "first_costs", noted)
    job = make_job(profile="auto", model_path=str(damaged), ready_by=60.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    state = load_file(clean / "model.safetensors")
    for plan in record_of(job).plans.values():
        assert plan.repair is not None
        assert plan.repair.factor == pytest.approx(FACTOR, rel=1e-3)
        assert sorted(plan.repair.weights) == sorted(hit(state))
    assert planned[0].repair is not None  # what is submitted depends on it
    assert any("were multiplied by 1.42" in (line.message or "") for line in progress_of(job))
    # Training moves the head a little where it is trained; no adapter holds what was done to it.
    assert outcome.metrics is not None
    assert outcome.metrics.kind == "model"
    head = load_file(job.parent / "export" / "model.safetensors")["lm_head.weight"].float()
    known = state["lm_head.weight"].float()
    assert (head - known).norm() < 0.2 * (FACTOR - 1) * known.norm()
    # The base model's loss is that of the model as it was given.
    untouched = finish(make_job("untouched", profile="auto", model_path=str(clean), ready_by=60.0))
    assert untouched.metrics is not None
    assert outcome.metrics.base_loss > untouched.metrics.base_loss
    assert outcome.metrics.final_loss == pytest.approx(untouched.metrics.final_loss, abs=0.03)


def test_a_killed_job_goes_on_from_the_same_weights(damaged: Path, make_job: Callable[..., Path]) -> None:
    calm = make_job("calm", profile="auto", model_path=str(damaged))
    rough = make_job("rough", profile="auto", model_path=str(damaged))
    finish(calm)
    worker = start_worker(rough)
    wait_for_checkpoint(rough, worker)
    worker.kill()
    worker.wait()
    finish(rough)
    assert record_of(rough).plans == record_of(calm).plans
    exports = [load_file(job.parent / "export" / "model.safetensors") for job in (calm, rough)]
    assert all(torch.equal(exports[0][name], one) for name, one in exports[1].items())
    assert outcome_of(rough).metrics is not None


@pytest.mark.parametrize(
    ("profile", "changes"),
    [("lora_r16", {}), ("auto", {"task_type": TaskType.DPO}), ("auto", {"kl_coefficient": 0.5})],
    ids=["another profile", "preference pairs", "a divergence from the model as it is"],
)
def test_other_jobs_take_the_model_as_it_is(
    profile: str, changes: dict[str, Any], damaged: Path, make_job: Callable[..., Path], tmp_path: Path
) -> None:
    if "task_type" in changes:
        changes = data_of(TaskType.DPO, tmp_path)
    job = make_job(profile=profile, model_path=str(damaged), **changes)
    assert finish(job).status is OutcomeStatus.READY
    known = read_record(job.parent)
    assert known is not None
    assert known[1].repair is None


def test_a_job_that_had_no_room_for_the_divergence_is_still_scored_with_it(
    damaged: Path, make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    job = make_job(profile="auto", model_path=str(damaged), kl_coefficient=0.5)
    assert finish(job).status is OutcomeStatus.READY
    assert any("without the divergence" in (line.message or "") for line in progress_of(job))
    known = read_record(job.parent)
    assert known is not None
    assert known[0].without_divergence
    assert known[1].repair is None


def test_what_would_raise_the_loss_is_not_undone(
    clean: Path, make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = list[nn.Module]()

    def counted(*arguments: Any) -> nn.Module:
        loaded.append(load_base(*arguments))
        return loaded[-1]

    monkeypatch.setattr(pipeline, "load_base", counted)
    # Divided by .7, the head's answers are surer, and worse.
    monkeypatch.setattr(repair, "find_scaling", lambda weights: Scaling(1.4, ["lm_head.weight"]))
    monkeypatch.setattr(repair, "candidates", lambda factor: [0.7])
    job = make_job(profile="auto", model_path=str(clean))
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert {plan.repair for plan in record_of(job).plans.values()} == {None}
    assert any("they stay so" in (line.message or "") for line in progress_of(job))
    assert len(loaded) == 1  # a second model next to the first one has no room
    given = load_file(clean / "model.safetensors")["lm_head.weight"]
    assert torch.equal(loaded[0].get_parameter("lm_head.weight"), given.float())
    # Trained and verified with the head as it is.
    whole = job.parent / "export" / "model.safetensors"
    if whole.exists():
        head = load_file(whole)["lm_head.weight"].float()
        assert (head - given.float()).norm() < 0.1 * given.float().norm()  # trained a little, where it is


def test_without_a_usable_trial_the_restored_model_is_submitted(
    damaged: Path, make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: TrialRunner, result: TrialResult, *others: object) -> TrialResult:
        return replace(result, loss=None, losses=[])

    monkeypatch.setattr(TrialRunner, "keep", lost)
    outcome = finish(make_job(profile="auto", model_path=str(damaged)))
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.metrics.final_loss < outcome.metrics.base_loss - 0.1


def test_both_factors_that_leave_the_same_gaps_are_tried() -> None:
    assert repair.candidates(1.2) == [1.2, 0.6]
    assert repair.candidates(1.8) == [0.9]


def test_an_adapter_misses_what_it_does_not_train() -> None:
    found = Repair(1.2, ["lm_head.weight", "layers.0.q_proj.weight"])
    assert repair.restores_frozen(found, {"layers.0.q_proj.weight"})
    assert not repair.restores_frozen(found, {"lm_head.weight", "layers.0.q_proj.weight"})
    assert not repair.restores_frozen(None, set())


def test_weights_that_are_read_by_rows_are_restored_alike(tiny_model: Path) -> None:
    """A sharded model has no weights to change before each process has read its rows."""
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    undo = Repair(0.8125, names)
    whole = load_model(str(tiny_model), "bfloat16")
    repair.undo_scaling(whole, undo)
    empty = without_weights(load_model(str(tiny_model), "bfloat16"), str(tiny_model), 0, 1)
    given = slices_of(empty)
    slices = repair.unscaled(given, undo, torch.bfloat16)
    assert given is not None
    assert slices is not None
    for name, weight in whole.named_parameters():
        assert torch.equal(slices[name](1, 5).to(torch.bfloat16), weight[1:5]), name
        changed = not torch.equal(given[name](1, 5).to(torch.bfloat16), weight[1:5])
        assert changed == (name in names)
    assert repair.unscaled(given, None, torch.bfloat16) is given
