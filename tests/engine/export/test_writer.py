"""Exports are stock files that score like what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from shared.messages.runs import Metrics, WorkerJob
from shared.planning.model_shape import ModulePlan
from shared.planning.plan import Deviation, Plan
from tests.engine.worker_run import bare_job
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.evaluate.metric import score_sft
from trainer_node.engine.export import dense_as_lora, verify, writer
from trainer_node.engine.export.writer import stock_config
from trainer_node.engine.model.adapters import Deltas, add_deltas, load_adapter
from trainer_node.engine.model.loading import load_model

CPU = torch.device("cpu")
# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def job_on(model: Path) -> WorkerJob:
    """A job whose base model is named otherwise than its folder."""
    return bare_job(model="upstream/model-1B", model_path=str(model))


def _trained(model: Path, plan: Plan) -> Deltas:
    """Deltas that are not zero."""
    deltas = add_deltas(load_model(str(model), plan.dtype), plan, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in deltas.parameters.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return deltas


METRICS = Metrics(base_loss=3.0, final_loss=2.0, dropped_rows={"too long": 3})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("lora", "adapter"),
        ("dense", "model"),
        ("mixed", "model"),
        ("dense", "adapter"),
        ("mixed", "adapter"),
    ],
)
def test_the_export_scores_like_the_trained_model(
    method: str,
    kind: str,
    dtype: str,
    tiny_model: Path,
    tmp_path: Path,
    make_plan: Callable[..., Plan],
    make_examples: Callable[..., Examples],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        dense_as_lora, "WORTH", dict.fromkeys(dense_as_lora.WORTH, 0.0 if kind == "model" else 9.0)
    )
    plan = make_plan(method, dtype=dtype, deviations=[Deviation("rank", "8192", "64", "it is enough")])
    deltas, dev = _trained(tiny_model, plan), make_examples([9, 20, 33, 12])
    trained = score_sft(deltas.model, dev)
    metrics = writer.write(deltas, plan, job_on(tiny_model), METRICS, tmp_path / "export")
    computed = getattr(torch, dtype)
    assert writer.verify(tmp_path / "export", job_on(tiny_model), dev, trained, 60.0, CPU, computed) is None
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert metrics.kind == kind
    if kind == "adapter":
        assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        config = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "upstream/model-1B"
        assert config["inference_mode"] is True
    else:
        assert names == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert metrics.bytes > 0
    assert not any("tokenizer" in name for name in names)
    card = (tmp_path / "export" / "README.md").read_text()
    for word in ("upstream/model-1B", "2.0000", "too long", "it is enough"):
        assert word in card
    assert str(tiny_model) not in "".join(
        path.read_text() for path in (tmp_path / "export").iterdir() if path.suffix in (".json", ".md")
    )


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any dense delta is exported as a whole model."""
    monkeypatch.setattr(dense_as_lora, "WORTH", dict.fromkeys(dense_as_lora.WORTH, 0.0))


@pytest.mark.usefixtures("whole")
def test_a_wrong_export_is_noticed(
    tiny_model: Path, tmp_path: Path, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    plan, dev, job = make_plan("dense"), make_examples([9, 20, 33]), job_on(tiny_model)
    deltas = _trained(tiny_model, plan)
    writer.write(deltas, plan, job, METRICS, tmp_path / "export")
    with torch.no_grad():
        next(iter(deltas.parameters.values())).add_(1.0)
    other = score_sft(deltas.model, dev)
    wrong = writer.verify(tmp_path / "export", job, dev, other, 10.0, CPU)
    assert wrong is not None
    assert "instead of" in wrong.text
    (tmp_path / "export" / "model.safetensors").write_bytes(b"no")
    wrong = writer.verify(tmp_path / "export", job, dev, None, 10.0, CPU)
    assert wrong is not None
    assert "load" in wrong.text


@pytest.mark.parametrize(
    ("rows", "spread", "allowed"),
    [
        (14, 0.05, 0.0416),  # three standard errors: single rows differ either way
        (400, 0.05, 0.02),
        (14, 0.001, 0.02),
        (14, 2.0, 0.1),  # what is wrong by more is not chance
        (4, 1.0, 0.02),  # too few to tell
    ],
)
def test_few_rows_may_be_off_by_chance(
    rows: int, spread: float, allowed: float, make_examples: Callable[..., Examples]
) -> None:
    gaps = spread * np.tile([1.0, -1.0], rows // 2)
    assert verify.tolerance(make_examples([9] * rows), gaps) == pytest.approx(allowed, rel=0.01)


@pytest.mark.usefixtures("whole")
def test_large_models_are_sharded_as_transformers_does(
    tiny_model: Path, tmp_path: Path, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD", "100KB")
    deltas = _trained(tiny_model, make_plan("dense"))
    writer.write(deltas, make_plan("dense"), job_on(tiny_model), METRICS, tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors.index.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.bfloat16)
    found, wanted = model.state_dict(), dict(writer.full_state(deltas.network))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.usefixtures("whole")
def test_tied_weights_are_written_once(
    tiny_model: Path, tmp_path: Path, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan("dense")
    writer.write(_trained(tiny_model, plan), plan, job_on(tiny_model), METRICS, tmp_path / "export")
    assert "lm_head.weight" not in load_file(tmp_path / "export" / "model.safetensors")


def test_factors_hold_a_dense_delta_to_the_last_bit(make_plan: Callable[..., Plan]) -> None:
    for outputs, inputs in ((6, 4), (4, 6), (5, 5)):
        before = torch.randn(outputs, inputs, dtype=torch.bfloat16)
        delta = torch.randn(outputs, inputs, dtype=torch.bfloat16).float()
        a, b = dense_as_lora.factors(before.float() + delta, before)
        rank = min(outputs, inputs)
        assert (a.shape, b.shape) == ((rank, inputs), (outputs, rank))
        assert torch.equal(
            b.float() @ a.float(), (before.float() + delta - before.float()).bfloat16().float()
        )


@pytest.mark.parametrize(("ranks", "smaller"), [((16, 16, 8), True), ((16, 16, 16), False)])
def test_an_adapter_must_be_smaller(
    ranks: tuple[int, ...], smaller: bool, make_plan: Callable[..., Plan]
) -> None:
    """Three matrices of 16 x 16 in a model of 1,280 weights; the first is dense."""
    kinds = ["dense", "lora", "lora"]
    modules = [
        ModulePlan(name=name, in_features=16, out_features=16, count=1, method=kind, rank=rank, alpha=1.0)
        for name, kind, rank in zip("abc", kinds, ranks, strict=True)
    ]
    # Dense: 2 x 512 bytes; rank 16: 4 x 512, rank 8: 4 x 256. The model: 2,560 bytes less a tenth.
    plan = make_plan(modules=modules, dtype="bfloat16")
    assert dense_as_lora.fit_better(plan, torch.nn.Linear(64, 20, bias=False)) is False
    assert dense_as_lora.fit_better(plan, torch.nn.Linear(64, 36, bias=False)) is smaller


def test_what_was_trained_in_fp32_is_not_rounded_to_a_bf16_model(
    tiny_model: Path, tmp_path: Path, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    plan, dev, job = make_plan("dense", dtype="float32"), make_examples([9, 20, 33, 12]), job_on(tiny_model)
    deltas = add_deltas(load_model(str(tiny_model), torch.bfloat16).float(), plan, seed=0)
    with torch.no_grad():
        for weight in deltas.parameters.values():  # steps of less than bf16 can tell apart
            weight.mul_(1 + 2.0**-9 * torch.randn_like(weight))
    trained = score_sft(deltas.model, dev).loss
    assert writer.write(deltas, plan, job, METRICS, tmp_path / "export").kind == "adapter"
    base = load_model(str(tiny_model), torch.bfloat16).float()  # as the scorer has it
    found = score_sft(load_adapter(base, str(tmp_path / "export")), dev).loss
    assert found == pytest.approx(trained, abs=1e-5)
    with torch.no_grad():
        for weight in deltas.parameters.values():
            weight.copy_(weight.bfloat16())
    assert score_sft(deltas.model, dev).loss != pytest.approx(trained, abs=3e-5)


@pytest.mark.parametrize(
    ("rope", "old"),
    [
        ({"rope_theta": 1e6, "rope_type": "default"}, {"rope_theta": 1e6, "rope_scaling": None}),
        (
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 8.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        (
            {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": None},
        ),
    ],
)
def test_old_transformers_understands_the_configuration(rope: dict[str, Any], old: dict[str, Any]) -> None:
    config = {"model_type": "llama", "dtype": "float32", "rope_parameters": rope, "_name_or_path": "/local"}
    named = {"model_type": "llama", "torch_dtype": "bfloat16", "_name_or_path": "org/model"}
    assert stock_config(config, "org/model") == named | old
    assert stock_config(named | old, "org/model") == named | old
    found, wanted = LlamaConfig(**old), LlamaConfig(rope_parameters=rope)
    assert found.rope_parameters == wanted.rope_parameters


def test_too_little_memory_is_not_a_wrong_export(
    tiny_model: Path,
    tmp_path: Path,
    make_plan: Callable[..., Plan],
    make_examples: Callable[..., Examples],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, dev, job = make_plan("lora"), make_examples([9, 20, 33]), job_on(tiny_model)
    writer.write(_trained(tiny_model, plan), plan, job, METRICS, tmp_path / "export")
    monkeypatch.setattr(verify, "_free_main_memory", lambda: 1000.0)
    with pytest.raises(writer.UnverifiedError, match="GB of memory are free"):
        writer.verify(tmp_path / "export", job, dev, None, 10.0, CPU)
    monkeypatch.undo()

    def exhausted(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(verify, "_losses", exhausted)
    with pytest.raises(writer.UnverifiedError, match="memory ran out: CUDA out of memory"):
        writer.verify(tmp_path / "export", job, dev, None, 10.0, CPU)


def test_a_model_that_is_spread_over_places_scores_alike(
    tiny_model: Path, tmp_path: Path, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    plan, dev, job = make_plan("lora"), make_examples([9, 20]), job_on(tiny_model)
    writer.write(_trained(tiny_model, plan), plan, job, METRICS, tmp_path / "export")
    model = verify._reload(tmp_path / "export", job, torch.float32)
    wanted = verify._losses(model, dev, 60.0, CPU, torch.float32)
    places = verify.spread(model, {"cpu": 10**9})
    assert verify._losses(places, dev, 60.0, CPU, torch.float32) == wanted
