"""A search that runs a trial in each of two processes: what a round leaves on record."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from msgspec.structs import replace

from shared.clock import TokenClock
from shared.errors import EngineError
from shared.messages.hardware import Hardware
from shared.messages.runs import ErrorCode, decode_worker_job
from shared.planning.plan import Deviation, Plan
from shared.planning.throughput import Costs
from tests.engine.search.search_run import record_of, run_record
from tests.engine.worker_run import (
    ENVIRONMENT,
    progress_of,
)
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.data.examples import BaseStates, Examples
from trainer_node.engine.distributed.process_group import ProcessGroup
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.search import rounds
from trainer_node.engine.search.rounds import (
    TrialReport,
    _alone,
    begin_round,
    choose_round,
    end_round,
    on_own_rows,
    take_up,
)
from trainer_node.engine.search.runner import TrialRunner
from trainer_node.engine.search.strategy.population import on_one_device
from trainer_node.engine.search.trial import SearchRecord, Trial, TrialResult, without_loss
from trainer_node.engine.signals import Stop

WAIT_S = 300.0  # a worker is three Python processes here, on two busy cores
TRIALS = [Trial(arm="dense", rate=rate) for rate in (1.0, 3.0)]


@pytest.fixture
def run(make_job: Callable[..., Path]) -> RunContext:
    """Rank 0 of a job whose clock counts tokens."""
    path = make_job()
    reporter = Reporter(path.parent / "progress.jsonl", "t", "a")
    job = decode_worker_job(path.read_bytes())
    return RunContext(job, path.parent, TokenClock(0.0, 100.0), reporter, Stop())


@pytest.fixture
def record() -> RunRecord:
    """A run whose first save took two seconds."""
    return run_record(Costs(save_s=2.0, score_s=5.0))


@pytest.fixture
def runner(run: RunContext, record: RunRecord, make_plan: Callable[..., Plan]) -> TrialRunner:
    """A search whose first round is under way, begun at 100 tokens."""
    known = SearchRecord(began_at=0.0, all_s=100.0, plans={"dense": make_plan("dense")}, width=2)
    known = known.started(TRIALS[0], 100, TRIALS[1:])
    unused = cast(Any, None)
    return TrialRunner(run, on_own_rows(record, 2), unused, unused, known, unused, [])


def report_of(trial: Trial, loss: float | None, **changes: Any) -> TrialReport:
    """What a process says of a trial that it trained for 10 steps of 10 tokens."""
    result = TrialResult(trial=trial, loss=loss, tokens=100, train_s=1.0)
    return TrialReport(**{"result": result, "steps": 10, "clock_tokens": 300, **changes})


def messages(run: RunContext) -> list[str]:
    return [line.message for line in progress_of(run.folder / "job.json") if line.message]


def test_a_round_lasts_as_long_as_its_slowest_trial_and_all_its_steps_count(
    run: RunContext, runner: TrialRunner, record: RunRecord
) -> None:
    reports = [report_of(TRIALS[0], 2.0), report_of(TRIALS[1], 1.5, clock_tokens=500, save_s=4.0)]
    end_round(run, runner, record, reports)
    known = record_of(run.folder / "job.json")
    assert known == runner.known
    assert [(one.trial, one.loss) for one in known.done] == list(zip(TRIALS, (2.0, 1.5), strict=True))
    assert (known.clock_tokens, known.steps_before, known.tokens_before) == (500, 20, 200)
    assert known.running == []
    assert cast(TokenClock, run.own_clock).tokens == 500
    assert record.costs.save_s == runner.record.costs.save_s == 4.0
    assert "trial 2: held-out loss 1.5000" in messages(run)


def test_a_failed_trial_has_no_loss_and_the_search_goes_on(
    run: RunContext, runner: TrialRunner, record: RunRecord
) -> None:
    failed = TrialReport(result=without_loss(TRIALS[1]), error=(ErrorCode.OUT_OF_MEMORY, "memory ran out"))
    end_round(run, runner, record, [report_of(TRIALS[0], 2.0), failed])
    assert [one.loss for one in runner.known.done] == [2.0, None]
    assert "trial 2 failed: memory ran out" in messages(run)


def test_the_job_fails_with_its_trials_cause_if_none_has_a_loss(
    run: RunContext, runner: TrialRunner, record: RunRecord
) -> None:
    failed = TrialReport(result=without_loss(TRIALS[1]), error=(ErrorCode.OUT_OF_MEMORY, "memory ran out"))
    with pytest.raises(EngineError, match="memory ran out") as error:
        end_round(run, runner, record, [report_of(TRIALS[0], None), failed])
    assert error.value.code is ErrorCode.OUT_OF_MEMORY


def test_later_trials_need_as_little_memory_as_one_came_to_need(
    run: RunContext, runner: TrialRunner, record: RunRecord
) -> None:
    plan = runner.known.plans["dense"]
    why = Deviation("activation checkpointing", "off", "on", "memory ran out")
    smaller = replace(plan, activation_checkpointing=True, deviations=[*plan.deviations, why])
    end_round(
        run, runner, record, [report_of(TRIALS[0], 2.0, plan=plan), report_of(TRIALS[1], 2.1, plan=smaller)]
    )
    assert runner.known.plans["dense"].activation_checkpointing
    assert "activation checkpointing is on instead of off: memory ran out" in messages(run)


def test_a_process_without_a_trial_says_nothing(
    run: RunContext, runner: TrialRunner, record: RunRecord
) -> None:
    runner.known = replace(runner.known, others=[])
    end_round(run, runner, record, [report_of(TRIALS[0], 2.0), TrialReport()])
    assert len(runner.known.done) == 1


def test_one_device_scores_all_development_rows_alone(record: RunRecord) -> None:
    assert on_own_rows(record, 4).costs.score_s == 20.0
    assert record.costs.score_s == 5.0


def test_rows_with_a_divergence_are_not_planned_with_recorded_passes(
    run: RunContext, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    hardware = Hardware(device="H100", count=2, memory_bytes=80 * 2**30)
    run = dataclasses.replace(run, job=replace(run.job, hardware=hardware))
    plan = make_plan("dense", dtype="bfloat16")
    plan = replace(plan, parallel="ddp", devices=2, expected_tokens_per_s=2000.0)
    rows = make_examples([9] * 10)
    compared = rows.with_base(BaseStates(None, np.zeros(10, np.int64)))
    speeds = [_alone(run, plan, JobData(one, one, {}, 64)).expected_tokens_per_s for one in (rows, compared)]
    assert speeds[0] > 1500.0
    assert speeds[1] == 1000.0


def test_a_round_begins_without_the_checkpoints_of_trials_that_failed(
    run: RunContext, runner: TrialRunner
) -> None:
    folder = run.folder / "checkpoints"
    for step in (20, 21):
        (folder / f"step-{step:08d}").mkdir(parents=True)
    begin_round(run, runner, TRIALS)  # it was under way before a restart: they are its own
    assert len(list(folder.iterdir())) == 2
    runner.known = replace(runner.known, trial=None, others=[], steps_before=20)
    begin_round(run, runner, TRIALS)
    assert [one.name for one in folder.iterdir()] == ["step-00000020"]


def test_on_fewer_devices_the_round_is_chosen_again(run: RunContext, runner: TrialRunner) -> None:
    (run.folder / "checkpoints" / "rank-1" / "step-00000001").mkdir(parents=True)
    plans = {"dense": on_one_device(replace(runner.known.plans["dense"], parallel="ddp", devices=2))}
    known = take_up(run, replace(runner.known, plans=plans))
    assert (known.width, known.running, known.plans["dense"].parallel) == (1, [], "single")
    assert not (run.folder / "checkpoints").exists()  # a later trial has the same number


def test_a_process_alone_has_its_own_clock_and_checkpoints_and_stops_when_rank_0_asks(
    run: RunContext,
) -> None:
    groups = [ProcessGroup(rank, 2) for rank in range(2)]
    alone = [replace_group(run, group).alone() for group in groups]
    assert [one.checkpoints.relative_to(run.folder).as_posix() for one in alone] == [
        "checkpoints",
        "checkpoints/rank-1",
    ]
    assert all(one.process_group.is_single and one.process_group.sharers == 2 for one in alone)
    alone[1].own_clock.advance(100)
    assert alone[1].own_clock.time() == 2.0  # one of two devices, at half the speed of both
    assert run.own_clock.time() == 0.0
    assert not alone[1].stop.asked
    run.stop_file.touch()
    assert alone[1].stop.asked
    assert not alone[0].stop.asked  # it is the one that asks


def test_no_process_takes_an_earlier_stop_for_one_of_its_own_while_steps_are_timed(
    run: RunContext, runner: TrialRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.known = replace(runner.known, trial=None, others=[])
    asked: list[bool] = []
    others = replace_group(run, ProcessGroup(1, 2)).alone()
    monkeypatch.setattr(rounds, "budget_of", lambda *_: None)
    monkeypatch.setattr(rounds, "next_round", lambda *_: TRIALS)
    monkeypatch.setattr(rounds, "is_wanted", lambda *_: True)
    monkeypatch.setattr(rounds, "measure_speed", lambda *_: asked.append(others.stop.asked))
    run.stop_file.touch()  # the job was stopped while its model was loaded
    assert choose_round(run, runner) == TRIALS
    assert asked == [False]


def replace_group(run: RunContext, group: ProcessGroup) -> RunContext:
    """The same run, as another process has it."""
    return RunContext(run.job, run.folder, run.own_clock, run.reporter, run.stop, group)


@pytest.mark.slow
@pytest.mark.timeout(4 * WAIT_S)
def test_a_stop_reaches_the_others_while_rank_0_waits_for_them(tmp_path: Path) -> None:
    """Rank 0 waits inside a call of C, where Python handles no signal."""
    side = str(Path(__file__).with_name("waiting_side.py"))
    worker = subprocess.Popen([sys.executable, side, str(tmp_path)], env=ENVIRONMENT)
    until = time.monotonic() + WAIT_S
    while len(list(tmp_path.glob("trains-*"))) < 2 and worker.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)
    worker.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert worker.wait(WAIT_S) == 0
    assert time.monotonic() - began < 15.0  # rank 1's trial takes 30 s
    assert (tmp_path / "checkpoint").exists()
    assert (tmp_path / "outcome").exists()
