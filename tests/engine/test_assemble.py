"""What a run's parts say while they are put together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shared.clock import WallClock
from shared.planning.plan import Plan
from tests.engine.worker_run import bare_job
from trainer_node.engine import assemble
from trainer_node.engine.context import RunContext
from trainer_node.engine.model.attention import PER_DOCUMENT, Chosen, _dense
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.signals import Stop


def test_a_run_says_that_its_attention_is_slow(
    tiny_model: Path, tmp_path: Path, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [Chosen(PER_DOCUMENT, _dense(), "torch-varlen: no kernel image")]
    monkeypatch.setattr(assemble, "choose_kernels", lambda config, device: chosen)
    said: list[str] = []
    reporter = Reporter(tmp_path / "progress.jsonl", "t", "a")
    monkeypatch.setattr(reporter, "message", said.append)
    run = RunContext(bare_job(model_path=str(tiny_model)), tmp_path, WallClock(), reporter, Stop())
    assemble.load_base(run, make_plan("lora", dtype="float32"))
    (told,) = said
    assert told.startswith("training is slower: ")
    assert "torch-varlen: no kernel image" in told
