"""An export that loads the base model again takes longer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from shared.messages.runs import Metrics
from shared.planning.plan import Plan
from tests.engine.worker_run import bare_job
from trainer_node.engine.export import dense_as_lora, writer
from trainer_node.engine.export.reload_time import reload_s
from trainer_node.engine.model.adapters import add_deltas
from trainer_node.engine.model.loading import load_model

METRICS = Metrics(base_loss=3.0, final_loss=2.0)


@pytest.mark.parametrize("worth", [0.0, 9.0])
@pytest.mark.parametrize("method", ["lora", "dense", "mixed"])
def test_one_process_loads_it_for_the_changes_of_dense_matrices(
    method: str,
    worth: float,
    tiny_model: Path,
    tmp_path: Path,
    make_plan: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an adapter: a whole model needs no comparison."""
    monkeypatch.setattr(dense_as_lora, "WORTH", dict.fromkeys(dense_as_lora.WORTH, worth))
    loads = Mock(wraps=load_model)
    monkeypatch.setattr(writer, "load_model", loads)
    plan, base = make_plan(method), load_model(str(tiny_model), "float32")
    wanted = reload_s(plan, base, 2.0)
    writer.write(
        add_deltas(base, plan, 0), plan, bare_job(model_path=str(tiny_model)), METRICS, tmp_path / "export"
    )
    assert wanted == 2.0 * loads.call_count
    assert loads.call_count == (method != "lora" and worth > 0)
