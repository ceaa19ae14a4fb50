"""What is kept of a job's time for rounding what is submitted, and for which plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from shared.clock import TokenClock, WallClock
from shared.messages.hardware import Hardware
from shared.messages.offers import TaskType
from shared.planning.plan import Plan
from shared.planning.throughput import SLACK_S, Costs
from tests.engine.search.search_run import run_record
from tests.engine.worker_run import bare_job
from trainer_node.engine.context import RunContext
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.search import time_left
from trainer_node.engine.search.strategy.budget import Budget, is_ample
from trainer_node.engine.search.strategy.delta_factor import MOST_ROWS, PASSES
from trainer_node.engine.search.time_left import (
    FACTORS_SHARE,
    ROUND_SHARE,
    are_factors_scored,
    averaged_arms,
    besides_s,
    budget_of,
    factors_s,
    is_rounded,
    lora_arms,
    rounding_s,
    scored_s,
)
from trainer_node.engine.search.trial import SearchRecord, Trial, TrialResult, without_loss
from trainer_node.engine.signals import Stop

GB = 10**9


@pytest.fixture
def dense(make_plan: Callable[..., Plan]) -> Plan:
    """A plan that trains half a billion weights: two copies in fp32 take 4 GB."""
    plan = make_plan("dense", dtype="bfloat16")
    first = plan.modules[0]
    return replace(plan, modules=[replace(first, parameters=GB // 2)])


def _run(
    folder: Path,
    *,
    profile: str = "auto",
    memory: int = 16 * GB,
    simulated: bool = False,
    task_type: TaskType = TaskType.INSTRUCT,
    kl_coefficient: float = 0.0,
) -> RunContext:
    hardware = Hardware(device="cpu", count=1, memory_bytes=memory)
    job = bare_job(profile=profile, task_type=task_type, hardware=hardware, start_at=100.0, ready_by=3700.0)
    job = replace(job, kl_coefficient=kl_coefficient)
    reporter = Reporter(folder / "progress.jsonl", "t", "a")
    return RunContext(job, folder, TokenClock(0.0, 1.0) if simulated else WallClock(), reporter, Stop())


def test_matrices_that_are_trained_whole_in_bf16_are_rounded_if_memory_holds_two_copies(
    dense: Plan, tmp_path: Path
) -> None:
    lora = [replace(module, method="lora") for module in dense.modules]
    assert is_rounded(_run(tmp_path), dense)
    assert not is_rounded(_run(tmp_path, memory=15 * GB), dense)
    assert not is_rounded(_run(tmp_path, profile="winner_2026_06"), dense)
    assert not is_rounded(_run(tmp_path), replace(dense, dtype="float32"))
    assert not is_rounded(_run(tmp_path), replace(dense, modules=[*dense.modules, *lora]))
    largest = replace(dense, modules=[replace(dense.modules[0], parameters=2 * GB)])
    assert is_rounded(_run(tmp_path, memory=64 * GB), largest)
    larger = replace(dense, modules=[replace(dense.modules[0], parameters=2 * GB + 1)])
    assert not is_rounded(_run(tmp_path, memory=1000 * GB), larger)


def test_scores_take_longer_on_fewer_devices() -> None:
    """Four devices scored the rows in 5 of a trial's 8 s besides its steps; two take 10 for that."""
    four = run_record(Costs(score_s=5.0, save_s=3.0), devices=4)
    two = four.resumed(2)
    assert (two.costs, two.devices, two.resumes) == (Costs(score_s=10.0, save_s=3.0), 2, 1)
    trial = TrialResult(trial=Trial(arm="dense"), loss=1.0, tokens=1, train_s=1.0, other_s=8.0, devices=4)
    assert [besides_s(trial, one.devices, one.costs) for one in (four, two)] == [8.0, 13.0]
    assert besides_s(replace(trial, devices=0), 2, two.costs) == 8.0  # of an older version: not known
    assert replace(four, devices=0).resumed(2).costs == four.costs


def test_time_is_kept_only_where_something_may_be_rounded(dense: Plan, tmp_path: Path) -> None:
    other = replace(dense, dtype="float32")
    assert rounding_s(_run(tmp_path), [other, dense]) == pytest.approx(ROUND_SHARE * 3600.0)
    assert rounding_s(_run(tmp_path), [other]) == 0.0
    assert rounding_s(_run(tmp_path, simulated=True), [dense]) == 0.0  # it takes no tokens


def test_time_is_kept_for_the_factors_of_the_last_run(tmp_path: Path) -> None:
    record: Any = SimpleNamespace(base_losses=[3.0] * 400, costs=SimpleNamespace(score_s=2.0))
    scored = 1.0 + 2 * PASSES * MOST_ROWS / 400
    assert factors_s(_run(tmp_path), record) == pytest.approx(scored * 2.0)
    record.costs.score_s = 100.0
    assert factors_s(_run(tmp_path), record) == pytest.approx(FACTORS_SHARE * 3600.0)
    for other in (
        _run(tmp_path, simulated=True),
        _run(tmp_path, profile="winner_2026_06"),
        _run(tmp_path, task_type=TaskType.DPO),
    ):
        assert factors_s(other, record) == 0.0


def test_a_run_on_all_rows_has_no_factor(tmp_path: Path) -> None:
    """The rows that would tell it were trained on."""
    assert are_factors_scored(_run(tmp_path), Trial(arm="dense"))
    assert not are_factors_scored(_run(tmp_path), Trial(arm="dense", refit=True))


def test_lora_counts_as_what_averages_well_but_for_pairs(
    make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = {"dense": make_plan("dense"), "LoRA r4": make_plan("lora")}
    plans |= {"both": make_plan("mixed"), "LoRA r33": make_plan("lora", rank=33)}
    known: Any = SimpleNamespace(plans=plans)
    assert lora_arms(_run(tmp_path), known) == {"LoRA r4"}
    assert lora_arms(_run(tmp_path, task_type=TaskType.DPO), known) == frozenset()
    assert averaged_arms(_run(tmp_path), known) == frozenset()  # a tiny model
    monkeypatch.setattr(time_left, "is_tiny", lambda plan: False)
    assert averaged_arms(_run(tmp_path), known) == {"LoRA r4"}


def test_lora_stands_for_dense_deltas_if_it_has_a_weight_for_each_label(
    make_plan: Callable[..., Plan],
) -> None:
    lora, dense = make_plan("lora"), make_plan("dense")
    assert is_ample(lora, dense, lora.trained_parameters)
    assert not is_ample(lora, dense, lora.trained_parameters + 1)
    assert not is_ample(lora, make_plan("lora", rank=33), 1)


def test_only_the_loss_on_labels_alone_is_plain(dense: Plan, tmp_path: Path) -> None:
    costs, lengths = Costs(score_s=1.0), np.array([100] * 10)
    record: Any = SimpleNamespace(train_tokens=1000, train_examples=10, costs=costs, base_losses=[1.0] * 10)
    known = SearchRecord(plans={"dense": dense}, began_at=0.0, all_s=100.0)
    for group, run, plain in (
        (1, _run(tmp_path), True),
        (2, _run(tmp_path, task_type=TaskType.DPO), False),
        (1, _run(tmp_path, kl_coefficient=0.3), False),
    ):
        train = SimpleNamespace(lengths=lengths, base=None, label_tokens=1000, group=group)
        rows: Any = SimpleNamespace(train=train, dev=SimpleNamespace(lengths=lengths))
        assert budget_of(run, record, known, rows).plain is plain


def test_a_trial_is_expected_to_cost_two_passes_over_the_rows_that_tell_its_factor(
    dense: Plan, tmp_path: Path
) -> None:
    """Of 400 development rows a factor is judged by 200."""
    costs = Costs(score_s=8.0, save_s=2.0)
    record: Any = SimpleNamespace(train_tokens=1000, train_examples=10, costs=costs, base_losses=[1.0] * 400)
    lengths = np.array([100] * 10)
    rows: Any = SimpleNamespace(
        train=SimpleNamespace(lengths=lengths, base=None, label_tokens=1000, group=1),
        dev=SimpleNamespace(lengths=lengths),
    )

    def budget(plan: Plan, *done: TrialResult) -> Budget:
        known = SearchRecord(plans={"dense": plan}, began_at=0.0, all_s=100.0, done=list(done))
        return budget_of(_run(tmp_path), record, known, rows)

    ran = TrialResult(trial=Trial(arm="dense"), loss=2.0, tokens=1000, train_s=1.0, other_s=6.0)
    assert (
        budget(dense, ran, without_loss(Trial(arm="dense"))).trial_s == 6.0
    )  # one that failed tells nothing

    assert scored_s(record) == 4.0
    assert budget(dense).trial_s == pytest.approx(8.0 + 1.0 + SLACK_S + 2 * 4.0)
    assert budget(dense).refit_s == pytest.approx(8.0 + 1.0 + SLACK_S)
    assert budget(dense, ran).refit_s == 6.0  # no factors were tried
    scored = replace(ran, factor=1.1, other_s=20.0)
    assert budget(dense, scored).refit_s == 20.0 - 2 * 4.0
    again = TrialResult(trial=Trial(arm="dense", refit=True), loss=2.0, tokens=1000, train_s=1.0, other_s=3.0)
    assert (budget(dense, ran, again).trial_s, budget(dense, ran, again).refit_s) == (6.0, 3.0)
