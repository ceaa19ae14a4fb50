"""Norms, embeddings and the output matrix are trained, and what is exported scores as what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from shared.messages.runs import Metrics
from shared.planning.model_shape import Extras, ModulePlan, extras_of
from shared.planning.plan import Plan
from tests.engine.worker_run import bare_job
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import collate
from trainer_node.engine.evaluate.metric import score_sft
from trainer_node.engine.export import writer
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.linears import trainable_linears
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.model.shape import model_shape

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama, tied": LlamaConfig(**SIZES, **GROUPED, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**SIZES, **GROUPED, tie_word_embeddings=False),
    "qwen3, head norms": Qwen3Config(**SIZES, **GROUPED, tie_word_embeddings=True),
    # Its embeddings are multiplied by a root that is rounded to their dtype, its norms by 1 + weight.
    "gemma2": Gemma2Config(**SIZES, **GROUPED, query_pre_attn_scalar=16, sliding_window=32),
    "gpt_neox, biases": GPTNeoXConfig(**SIZES),
}


@pytest.fixture(params=CONFIGS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():  # norms of ones would hide which is which
            weight.add_(0.1 * torch.randn_like(weight)) if weight.dim() == 1 else None
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def everything(base: Path, make_plan: Callable[..., Plan], *, embeddings: bool = True) -> Plan:
    """Return a plan that trains all of a model."""
    config = AutoConfig.from_pretrained(base)
    found = trainable_linears(load_model(str(base), "bfloat16"))
    modules = [
        ModulePlan(
            name=one.name,
            in_features=one.in_features,
            out_features=one.out_features,
            count=one.count,
            method="dense",
            parameters=one.in_features * one.out_features * one.count,
        )
        for one in found
    ]
    extras = extras_of(model_shape(config), norms=True, embeddings=embeddings)
    return replace(
        make_plan("dense", dtype="bfloat16"),
        modules=modules,
        extras=extras,
        lr_norms=1e-2,
        lr_embeddings=2e-3,
        profile="auto",
    )


def steps(deltas: Deltas, plan: Plan, rows: Examples, count: int = 3) -> None:
    """Train a few steps."""
    optimizer = torch.optim.AdamW(deltas.param_groups(plan))
    batch = collate(rows, list(range(len(rows))), int(rows.lengths.sum()), "cpu")
    for _ in range(count):
        (-deltas.model(batch).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_trained_and_exported_model_scores_the_same(
    base: Path, tmp_path: Path, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    plan, rows = everything(base, make_plan), make_examples([9, 20, 33, 12])
    deltas = add_deltas(load_model(str(base), "bfloat16"), plan, seed=0)
    before = score_sft(deltas.model, rows).loss
    assert before == pytest.approx(score_sft(load_model(str(base), "bfloat16"), rows).loss, abs=1e-6)
    steps(deltas, plan, rows)
    trained = score_sft(deltas.model, rows)
    assert trained.loss < before - 0.1
    metrics = writer.write(
        deltas, plan, bare_job(model_path=str(base)), Metrics(base_loss=before), tmp_path / "export"
    )
    assert metrics.kind == "model"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.bfloat16).eval()
    assert score_sft(stock, rows).loss == pytest.approx(trained.loss, abs=1e-6)
    given = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).named_parameters())
    fixed = {name for name, weight in stock.named_parameters() if torch.equal(weight, given[name])}
    linears = (name for name, module in stock.named_modules() if isinstance(module, torch.nn.Linear))
    assert fixed <= {f"{name}.bias" for name in linears}


def test_their_weights_are_counted(base: Path, make_plan: Callable[..., Plan]) -> None:
    plan = everything(base, make_plan)
    deltas = add_deltas(load_model(str(base), "bfloat16"), plan, seed=0)
    assert sum(weight.numel() for weight in deltas.parameters.values()) == plan.trained_parameters
    names = set(dict(load_model(str(base), "bfloat16").named_parameters()))
    assert deltas.parameters.keys() <= names
    groups = {group["name"]: group for group in deltas.param_groups(plan)}
    assert groups["norms"]["lr"] == plan.lr_norms
    assert groups["dense"]["lr"] == plan.lr_dense
    assert groups["embeddings"]["lr"] == plan.lr_embeddings
    tied = AutoConfig.from_pretrained(base).tie_word_embeddings
    assert len(groups["embeddings"]["params"]) == (1 if tied else 2)
    assert all(weight.dim() == 1 for weight in groups["norms"]["params"])
    assert {name for name in deltas.parameters if "norm" in name.lower()} == deltas.norms


def test_norms_alone_leave_the_embeddings(base: Path, make_plan: Callable[..., Plan]) -> None:
    plan = everything(base, make_plan, embeddings=False)
    deltas = add_deltas(load_model(str(base), "bfloat16"), plan, seed=0)
    assert not any("embed" in name or "head" in name for name in deltas.parameters)
    assert any("norm" in name for name in deltas.parameters)


def test_no_extras_change_nothing(tiny_model: Path, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan("dense", dtype="bfloat16")
    assert plan.extras == Extras()
    deltas = add_deltas(load_model(str(tiny_model), "bfloat16"), plan, seed=0)
    assert all(weight.dim() == 2 and "embed" not in name for name, weight in deltas.parameters.items())
