"""Training on the tiny model, on the token clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shared.clock import TokenClock
from shared.planning.plan import Plan
from shared.planning.throughput import Costs
from tests.engine.worker_run import bare_job
from trainer_node.engine.assemble import assemble
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.state import TrainState

LENGTHS = [9, 20, 33, 12, 40, 25, 7, 50, 31, 18]
Build = Callable[..., tuple[TrainState, Reporter, Stop]]
JOB = bare_job(ready_by=30.0, checkpoint_interval_s=0.5, clock="token", token_clock_rate=100.0)


@pytest.fixture
def build(
    tiny_model: Path, tmp_path: Path, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> Build:
    """Training on the tiny model in a folder: fresh, or from the folder's newest checkpoint."""

    def _build(
        name: str,
        method: str = "lora",
        *,
        resume: bool = False,
        stop: Stop | None = None,
        dev: Examples | None = None,
        **changes: object,
    ) -> tuple[TrainState, Reporter, Stop]:
        plan = make_plan(method, dropout=0.1, packs_per_step=2, max_epochs=100.0, **changes)
        examples = make_examples(LENGTHS)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        found = checkpoint.newest(folder / "checkpoints", pytest.fail) if resume else None
        clock = TokenClock(JOB.start_at, JOB.token_clock_rate)
        if found:
            clock.tokens = found.manifest.position.clock_tokens
        record = RunRecord(
            fingerprint=examples.fingerprint(),
            base_losses=[1.0] * len(dev if dev else [0]),
            train_examples=len(examples),
            train_tokens=int(examples.lengths.sum()),
            dropped={},
            costs=Costs(),
        )
        stop = stop or Stop()
        run = RunContext(JOB, folder, clock, Reporter(folder / "progress.jsonl", "t", "a"), stop)
        data = JobData(examples, dev or examples, {}, 256)
        training = assemble(run, record, plan, load_model(str(tiny_model), plan.dtype), data, found)
        return training, run.reporter, stop

    return _build


class StopAfter(Stop):
    """Asked to stop at the n-th look."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        super().__init__()

    @property
    def asked(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    @asked.setter
    def asked(self, value: bool) -> None:
        pass
