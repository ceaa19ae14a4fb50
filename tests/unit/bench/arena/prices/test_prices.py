"""Prices of steps, by what a plan trains."""

import pytest

from bench.arena.prices.prices import PRICES, Prices, StepPrice, method_of
from shared.planning.hardware import parse_hardware
from shared.planning.model_shape import shape_from_config
from shared.planning.plan import DataStats, Plan
from shared.planning.planner import make_plan
from shared.planning.profiles import resolve

LLAMA = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 4096,
}
ROWS = DataStats(examples=150, tokens=6000, label_tokens=3000, max_length=200)


def plan_of(profile: str) -> Plan:
    """Return a profile's plan with time for two epochs of few rows: `auto` leaves embeddings frozen then."""
    return make_plan(
        resolve(profile),
        shape_from_config(LLAMA),
        ROWS,
        parse_hardware("cpu-2x8GB"),
        600.0,
        tokens_per_s=20.0,
    )


@pytest.mark.parametrize(
    ("profile", "method"), [("lora_r16", "lora"), ("winner_2026_06", "everything"), ("auto", "dense")]
)
def test_a_step_costs_what_its_method_does(profile: str, method: str) -> None:
    plan = plan_of(profile)
    assert method_of(plan) == method


def test_a_step_costs_its_tokens_and_more() -> None:
    prices = Prices(StepPrice(20.0, 2.0), StepPrice(10.0, 1.0), StepPrice(5.0, 0.5), 0.25)
    plan = plan_of("lora_r16")
    assert prices.of_step(plan) == 5.0 + 0.5 * plan.packs_per_step * plan.capacity
    assert prices.of_epoch(tokens=1600, examples=32) == 1620.0


def test_scoring_is_cheaper_than_training() -> None:
    assert all(0.0 < one.scored < one.lora.token for one in PRICES.values())
