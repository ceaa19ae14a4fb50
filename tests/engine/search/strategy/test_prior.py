"""A first trial's rate: by the steps of a run, their tokens, and the size of the model."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from shared.planning.memory_fit import split
from shared.planning.model_shape import shape_from_params
from shared.planning.plan import Plan
from shared.planning.profiles import resolve
from tests.engine.search.strategy.surfaces import START, plenty
from trainer_node.engine.search.strategy.prior import LORA_ONCE, is_tiny, with_prior
from trainer_node.engine.search.trial import Trial


def test_few_steps_begin_with_a_higher_rate_and_small_ones_with_a_lower_one() -> None:
    def rate(steps: float, batch: int, length: int, *, tiny: bool = False) -> float:
        examples = round(steps * batch / START[0].epochs)
        budget = plenty(examples=examples, epoch_tokens=length * examples, tiny=tiny)
        return with_prior(replace(START[0], batch=batch), budget).rate

    assert rate(150, 4, 320) == 1.0
    assert rate(150, 2, 640) == 1.0
    assert rate(150, 4, 80, tiny=True) == 1.0
    assert rate(150, 64, 320) == 2.0
    assert rate(300, 4, 320) == pytest.approx(0.5**0.3)
    assert rate(110, 4, 320) == pytest.approx((150 / 110) ** 0.8)
    assert rate(110, 4, 80, tiny=True) == pytest.approx((150 / 110) ** 0.8)
    assert rate(20, 2, 640) == pytest.approx(2.5**0.8)  # as with 60 steps
    assert rate(20, 2, 64_000) == 4.0
    assert rate(50_000, 4, 60) == 0.2


def test_rows_that_are_seen_once_allow_a_higher_rate() -> None:
    def rate(epochs: float, batch: int, *, tiny: bool = False) -> float:
        examples = round(150 * batch / epochs)
        budget = plenty(examples=examples, epoch_tokens=20 * examples, tiny=tiny)
        return with_prior(replace(START[0], batch=batch, epochs=epochs), budget).rate

    assert rate(1.0, 4) == pytest.approx(1.6 * rate(2.0, 4))
    assert rate(1.0, 4, tiny=True) == pytest.approx(rate(2.0, 4, tiny=True))
    assert rate(1.0, 64) == 1.3
    assert rate(1.0, 512) == pytest.approx(rate(2.0, 512))
    assert rate(1.0, 512) > 1.3


def test_a_tiny_model_s_lora_wants_more_in_short_runs() -> None:
    def rate(epochs: float, batch: int = 2, *, arm: str = "lora", tiny: bool = True) -> float:
        examples = round(150 * batch / epochs)  # 150 steps, of 320 tokens
        tokens = 320 * examples // batch
        budget = plenty(examples=examples, epoch_tokens=tokens, tiny=tiny, lora=frozenset({"lora"}))
        trial = Trial(arm=arm, batch=batch, epochs=epochs)
        return with_prior(trial, budget).rate

    assert rate(0.8) == LORA_ONCE
    assert rate(1.0) == LORA_ONCE
    assert rate(1.5) == LORA_ONCE / 1.5
    assert rate(1.5, 8) == pytest.approx(1.0, rel=0.01)  # not measured: the rule for all others
    assert rate(1.51) == pytest.approx(1.0, rel=0.01)
    assert rate(1.0, arm="dense") == pytest.approx(1.0, rel=0.01)
    assert rate(1.0, tiny=False) < LORA_ONCE


def test_pairs_begin_with_the_plans_rate() -> None:
    for examples in (50, 400, 1_600, 10_000, 100_000):
        for tiny in (False, True):
            trial = with_prior(START[0], plenty(examples=examples, tiny=tiny, pairs=True))
            assert trial.rate == (1.0 if trial.batch >= 4 else pytest.approx(0.5**0.5))


def test_only_what_is_far_smaller_than_real_models_is_tiny(make_plan: Callable[..., Plan]) -> None:
    tiny = make_plan("dense")
    shape = shape_from_params(135_000_000)
    real = replace(tiny, modules=split(shape, resolve("auto"), 2**31))
    assert is_tiny(tiny)
    assert not is_tiny(real)
    assert not is_tiny(replace(tiny, modules=split(shape, resolve("lora_r16"), 16)))
