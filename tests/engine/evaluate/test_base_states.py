"""States of the base model: as many as there is time and room for, kept on disk, asked again if lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from shared.clock import TokenClock, WallClock
from shared.messages.offers import TaskType
from shared.planning.plan import Plan
from tests.engine.evaluate.short_run import SlowClock, record_of, short_run
from trainer_node.engine.context import JobData, RunContext
from trainer_node.engine.data.examples import Examples, joined
from trainer_node.engine.data.packing import collate
from trainer_node.engine.evaluate import base_states, metric
from trainer_node.engine.evaluate.reference_logprobs import PIECE
from trainer_node.engine.model.loading import load_model

TRAIN, DEV = [9, 12, 30, 7, 5, 8, 6, 11] * 10, [10, 7, 21]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def model(request: pytest.FixtureRequest, tiny_model: Path) -> torch.nn.Module:
    return load_model(str(tiny_model), request.param)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunContext]:
    return partial(short_run, tmp_path, kl_coefficient=0.5)


@pytest.fixture
def data(make_examples: Callable[..., Examples]) -> JobData:
    return JobData(make_examples(TRAIN), make_examples(DEV, seed=1), {}, 256)


def assert_same(found: JobData | str, wanted: JobData) -> None:
    assert isinstance(found, JobData)
    for mine, other in ((found.train, wanted.train), (found.dev, wanted.dev)):
        assert mine.fingerprint() == other.fingerprint()
        assert mine.base is not None
        assert other.base is not None
        assert mine.base.weight == other.base.weight
        np.testing.assert_array_equal(mine.base.starts, other.base.starts)
        np.testing.assert_array_equal(mine.base.states, other.base.states)


def test_no_step_no_divergence_and_the_mean_over_rows_is_that_over_places(
    model: torch.nn.Module, data: JobData, make_run: Callable[..., RunContext], make_plan: Callable[..., Plan]
) -> None:
    ready = base_states.first(make_run(TokenClock(0.0, 100.0)), model, data, make_plan())
    for bare, full in ((data.train, ready.train), (data.dev, ready.dev)):
        assert len(bare) == len(full)
        assert full.base is not None
        assert full.base.weight * int(full.compared.sum()) / len(full) == pytest.approx(0.5)
    # A batch of other rows rounds otherwise: bf16 shows it, in the square of its errors.
    more = metric.score(model, ready.dev).loss - metric.score(model, data.dev).loss
    assert -1e-6 <= more < 1e-4


def test_all_rows_together_keep_their_states_and_the_coefficient(
    model: torch.nn.Module, data: JobData, make_run: Callable[..., RunContext], make_plan: Callable[..., Plan]
) -> None:
    ready = base_states.first(make_run(TokenClock(0.0, 100.0)), model, data, make_plan())
    both = joined([ready.train, ready.dev], 1)
    assert both.base is not None
    assert both.base.weight * int(both.compared.sum()) / len(both) == pytest.approx(0.5)
    mine, wanted = (collate(rows, [1], 64).compared for rows in (both.take([80, 81]), ready.dev))
    assert mine is not None
    assert wanted is not None
    assert mine.states_KH is not None
    assert wanted.states_KH is not None
    torch.testing.assert_close(mine.states_KH, wanted.states_KH, rtol=0, atol=0)


def test_resumed_run_reads_the_same_rows_and_states(
    model: torch.nn.Module, data: JobData, make_run: Callable[..., RunContext], make_plan: Callable[..., Plan]
) -> None:
    run = make_run(WallClock(), seconds=3600.0)
    few = base_states.first(run, model, data, make_plan(expected_steps=5))
    assert 20 < len(few.train) < 80
    assert_same(base_states.again(run, torch.nn.Module, data, record_of(few)), few)


@pytest.mark.parametrize("damage", ["lost", "cut", "of other rows", "never finished", "damaged"])
def test_a_file_that_can_not_be_used_is_made_again(
    damage: str,
    model: torch.nn.Module,
    data: JobData,
    make_run: Callable[..., RunContext],
    make_plan: Callable[..., Plan],
) -> None:
    run = make_run(TokenClock(0.0, 100.0))
    full = base_states.first(run, model, data, make_plan())
    path, about = run.folder / base_states.FILE, run.folder / base_states.ABOUT
    whole = path.read_bytes()
    if damage == "lost":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[:-100])
    elif damage == "never finished":
        about.unlink()
    elif damage == "damaged":
        about.write_bytes(b'{"dtype": "\xff"}')
    else:
        base_states.first(run, model, replace(data, train=data.train.take(range(40))), make_plan())
    again = base_states.again(run, lambda: model, data, record_of(full))
    assert_same(again, full)
    assert path.read_bytes() == whole


def test_a_slow_machine_uses_the_rows_that_it_could_read(
    model: torch.nn.Module, data: JobData, make_run: Callable[..., RunContext], make_plan: Callable[..., Plan]
) -> None:
    run = make_run(SlowClock(), seconds=40.0)
    some = base_states.first(run, model, data, make_plan(expected_steps=1000))
    assert len(some.train) == PIECE
    assert_same(base_states.again(run, torch.nn.Module, data, record_of(some)), some)


def test_a_small_disk_holds_fewer_rows(
    model: torch.nn.Module,
    data: JobData,
    make_run: Callable[..., RunContext],
    make_plan: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(TokenClock(0.0, 100.0))
    row = 64 * (2 if next(model.parameters()).dtype == torch.bfloat16 else 4)
    room = int(data.dev.compared.sum()) + 100
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2 * room * row))
    some = base_states.first(run, model, data, make_plan())
    assert 10 < len(some.train) < 80
    assert some.train.base is not None
    assert int(some.train.compared.sum()) <= 100
    assert (run.folder / base_states.FILE).stat().st_size == room * row
    assert metric.score(model, some.train).loss == pytest.approx(
        metric.score(model, data.train.take(_order(data)[: len(some.train)])).loss, abs=1e-4
    )


def _order(data: JobData) -> np.ndarray:
    return np.random.default_rng(0).permutation(len(data.train))


@pytest.mark.parametrize("full", ["at once", "when written"])
def test_a_full_disk_is_said_and_the_run_goes_on_without(
    full: str,
    model: torch.nn.Module,
    data: JobData,
    make_run: Callable[..., RunContext],
    make_plan: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = make_run(TokenClock(0.0, 100.0))
    if full == "at once":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    same = base_states.first(run, model, data, make_plan())
    assert same.train.base is None
    assert same.dev.base is None
    assert len(same.train) == len(data.train)
    assert "without the divergence" in (run.folder / "progress.jsonl").read_text()


@pytest.mark.parametrize(("short_of", "why"), [("time", "no time"), ("disk", "more room")])
def test_a_resumed_run_trains_on_no_fewer_rows_than_before(
    short_of: str,
    why: str,
    model: torch.nn.Module,
    data: JobData,
    make_run: Callable[..., RunContext],
    make_plan: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(TokenClock(0.0, 100.0))
    full = base_states.first(run, model, data, make_plan())
    (run.folder / base_states.FILE).unlink()
    if short_of == "time":
        run = make_run(SlowClock(), seconds=40.0)
    else:
        room = int(data.dev.compared.sum()) + 100
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2 * room * 4 * 64))
    again = base_states.again(run, lambda: model, data, record_of(full))
    assert isinstance(again, str)
    assert why in again


def test_a_run_that_began_without_the_divergence_goes_on_without_it(
    model: torch.nn.Module, data: JobData, make_run: Callable[..., RunContext]
) -> None:
    run, half = make_run(TokenClock(0.0, 100.0)), replace(data, train=data.train.take(range(40)))
    record = replace(record_of(half), without_divergence=True)
    again = base_states.again(run, lambda: model, data, record)
    assert not isinstance(again, str)
    assert again.train.base is None
    assert again.dev.base is None
    assert again.train.fingerprint() == data.train.take(_order(data)[:40]).fingerprint()
    assert not (run.folder / base_states.FILE).exists()


@pytest.mark.parametrize("changes", [{"kl_coefficient": 0.0}, {"task_type": TaskType.DPO}])
def test_other_jobs_stay_as_they_are(
    changes: dict[str, object],
    model: torch.nn.Module,
    data: JobData,
    make_run: Callable[..., RunContext],
    make_plan: Callable[..., Plan],
) -> None:
    run = make_run(WallClock(), **changes)
    assert base_states.first(run, model, data, make_plan()) is data
    assert base_states.again(run, lambda: model, data, record_of(data)) is data
    assert not (run.folder / base_states.FILE).exists()
