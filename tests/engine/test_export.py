"""Exports are stock files that score like what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shared.messages import DatasetType, FileFormat, Hardware, Metrics, TaskType, WorkerJob
from shared.plan import Deviation, Plan
from trainer_node.engine import export
from trainer_node.engine.data import Examples
from trainer_node.engine.model import Deltas, add_deltas, load_model
from trainer_node.engine.score import score_sft

CPU = torch.device("cpu")
# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def _job(model: Path) -> WorkerJob:
    return WorkerJob(
        task_id="t",
        task="t",
        slot="a",
        task_type=TaskType.INSTRUCT,
        model="upstream/model-1B",
        model_path=str(model),
        dataset="rows.json",
        file_format=FileFormat.JSON,
        dataset_type=DatasetType(),
        start_at=0.0,
        ready_by=100.0,
        hardware=Hardware(device="cpu", count=1, memory_bytes=2**33),
    )


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
@pytest.mark.parametrize("method", ["lora", "dense", "mixed"])
def test_the_export_scores_like_the_trained_model(
    method: str,
    dtype: str,
    tiny_model: Path,
    tmp_path: Path,
    make_plan: Callable[..., Plan],
    make_examples: Callable[..., Examples],
):
    plan = make_plan(method, dtype=dtype, deviations=[Deviation("rank", "8192", "64", "it is enough")])
    deltas, dev = _trained(tiny_model, plan), make_examples([9, 20, 33, 12])
    trained = score_sft(deltas.model, dev)
    metrics = export.write(deltas, plan, _job(tiny_model), METRICS, tmp_path / "export")
    assert export.verify(tmp_path / "export", _job(tiny_model), dev, trained, 10.0, CPU) is None
    names = {path.name for path in (tmp_path / "export").iterdir()}
    if method == "lora":
        assert metrics.kind == "adapter"
        assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        config = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "upstream/model-1B"
        assert config["inference_mode"] is True
    else:
        assert metrics.kind == "model"
        assert names == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert metrics.bytes > 0
    assert not any("tokenizer" in name for name in names)
    card = (tmp_path / "export" / "README.md").read_text()
    for word in ("upstream/model-1B", "2.0000", "too long", "it is enough"):
        assert word in card
    assert str(tiny_model) not in "".join(
        path.read_text() for path in (tmp_path / "export").iterdir() if path.suffix in (".json", ".md")
    )


def test_a_wrong_export_is_noticed(
    tiny_model: Path, tmp_path: Path, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
):
    plan, dev, job = make_plan("dense"), make_examples([9, 20, 33]), _job(tiny_model)
    deltas = _trained(tiny_model, plan)
    export.write(deltas, plan, job, METRICS, tmp_path / "export")
    with torch.no_grad():
        next(iter(deltas.parameters.values())).add_(1.0)
    other = score_sft(deltas.model, dev)
    wrong = export.verify(tmp_path / "export", job, dev, other, 10.0, CPU)
    assert wrong is not None
    assert "instead of" in wrong
    (tmp_path / "export" / "model.safetensors").write_bytes(b"no")
    wrong = export.verify(tmp_path / "export", job, dev, None, 10.0, CPU)
    assert wrong is not None
    assert "load" in wrong


def test_large_models_are_sharded_as_transformers_does(
    tiny_model: Path, tmp_path: Path, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(export, "SHARD", "100KB")
    deltas = _trained(tiny_model, make_plan("dense"))
    export.write(deltas, make_plan("dense"), _job(tiny_model), METRICS, tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors.index.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.bfloat16)
    found, wanted = model.state_dict(), dict(export.full_state(deltas.network))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_tied_weights_are_written_once(tiny_model: Path, tmp_path: Path, make_plan: Callable[..., Plan]):
    plan = make_plan("dense")
    export.write(_trained(tiny_model, plan), plan, _job(tiny_model), METRICS, tmp_path / "export")
    assert "lm_head.weight" not in load_file(tmp_path / "export" / "model.safetensors")
