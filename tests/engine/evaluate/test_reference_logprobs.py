"""References of preference pairs: as many as there is time for, kept on disk, asked again if lost."""

from __future__ import annotations

import math
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
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.evaluate import metric, reference_logprobs
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.prepare import baseline

TRAIN, DEV = [9, 12, 30, 7, 5, 8, 6, 11] * 20, [10, 7, 21, 9, 8, 8]  # 80 and 3 pairs


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> torch.nn.Module:
    return load_model(str(tiny_model), torch.float32)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunContext]:
    return partial(short_run, tmp_path, task_type=TaskType.DPO)


@pytest.fixture
def data(make_examples: Callable[..., Examples]) -> JobData:
    return JobData(make_examples(TRAIN, group=2), make_examples(DEV, seed=1, group=2), {}, 256)


def test_base_model_scores_ln_2_and_is_asked_once(
    model: torch.nn.Module, data: JobData, make_run: Callable[..., RunContext], make_plan: Callable[..., Plan]
) -> None:
    run = make_run(TokenClock(0.0, 100.0))
    ready, base, row_s = baseline(run, model, data, make_plan())
    assert base.per_example.tolist() == [math.log(2)] * 3
    assert row_s >= 0
    assert metric.score_dpo(model, ready.dev).loss == pytest.approx(math.log(2), abs=1e-6)
    full = reference_logprobs.first(run, model, ready, make_plan())
    assert len(full.train) == 80
    assert metric.score_dpo(model, full.train).loss == pytest.approx(math.log(2), abs=1e-6)


def test_resumed_run_reads_the_same_pairs_and_references(
    model: torch.nn.Module, data: JobData, make_run: Callable[..., RunContext], make_plan: Callable[..., Plan]
) -> None:
    run = make_run(WallClock(), seconds=3600.0)
    ready, *_ = baseline(run, model, data, make_plan())
    few = reference_logprobs.first(run, model, ready, make_plan(expected_steps=5))
    assert 15 < len(few.train) < 80  # 5 packs of 64 tokens hold some 20 pairs of 19 tokens
    record = record_of(few)
    broken = torch.nn.Module()  # a call of it fails
    found = reference_logprobs.again(run, lambda: broken, data, record)
    for mine, wanted in ((found.train, few.train), (found.dev, few.dev)):
        assert mine.fingerprint() == wanted.fingerprint()
        np.testing.assert_array_equal(mine.reference, wanted.reference)


@pytest.mark.parametrize("damage", ["lost", "cut", "of other rows"])
def test_a_file_that_can_not_be_used_is_made_again(
    damage: str,
    model: torch.nn.Module,
    data: JobData,
    make_run: Callable[..., RunContext],
    make_plan: Callable[..., Plan],
) -> None:
    run = make_run(TokenClock(0.0, 100.0))
    ready, *_ = baseline(run, model, data, make_plan())
    full = reference_logprobs.first(run, model, ready, make_plan())
    path = run.folder / reference_logprobs.FILE
    whole = path.read_bytes()
    if damage == "lost":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[:-100])
    else:
        other = replace(ready, train=ready.train.take(range(40)))
        reference_logprobs.first(run, model, other, make_plan())
    again = reference_logprobs.again(run, lambda: model, data, record_of(full))
    assert path.read_bytes() == whole
    np.testing.assert_array_equal(again.train.reference, full.train.reference)


def test_a_slow_machine_uses_the_pairs_that_it_could_ask_for(
    model: torch.nn.Module, data: JobData, make_run: Callable[..., RunContext], make_plan: Callable[..., Plan]
) -> None:
    run = make_run(SlowClock(), seconds=40.0)
    dev = data.dev.with_reference(metric.reference_logprobs(model, data.dev))
    some = reference_logprobs.first(run, model, replace(data, dev=dev), make_plan(expected_steps=1000))
    assert len(some.train) == reference_logprobs.PIECE
    assert some.train.reference is not None
    assert len(some.train.reference) == 2 * reference_logprobs.PIECE


def test_rows_without_pairs_stay_as_they_are(
    model: torch.nn.Module,
    make_examples: Callable[..., Examples],
    make_run: Callable[..., RunContext],
    make_plan: Callable[..., Plan],
) -> None:
    run, text = make_run(WallClock()), JobData(make_examples([9, 8]), make_examples([7]), {}, 256)
    assert reference_logprobs.first(run, model, text, make_plan()) is text
    assert reference_logprobs.again(run, lambda: model, text, record_of(text)) is text
    assert not (run.folder / reference_logprobs.FILE).exists()
