import pytest

from shared.planning.hardware import parse_hardware
from shared.planning.memory_fit import Layout, split
from shared.planning.model_shape import ModelShape, ModulePlan, shape_from_params
from shared.planning.profiles import resolve
from shared.planning.throughput import COMPILE_S, Rows, development_rows, export_bytes, flops_per_token, pace

SHAPE = shape_from_params(8_030_000_000)
DENSE = split(SHAPE, resolve("maximum_accuracy"), 8192)
LORA = split(SHAPE, resolve("lora_r16"), 16)
ROWS = Rows(20_000, 300.0, 0.5)
HALF = parse_hardware("4xH100-80GB")
LAYOUT = Layout(
    capacity=16384,
    parallel="ddp",
    devices=4,
    checkpointing=False,
    dtype="bfloat16",
    cpu=False,
)


def per_weight(shape: ModelShape, modules: list[ModulePlan], checkpointing: bool = False) -> float:
    short = Rows(1000, 1.0, 0.0)  # no attention to speak of, no output matrix
    return flops_per_token(shape, modules, short, checkpointing=checkpointing) / shape.linear_parameters


def test_four_flops_per_frozen_weight_six_per_trained_one_two_more_to_recompute() -> None:
    assert per_weight(SHAPE, LORA) == pytest.approx(4, rel=0.02)
    assert per_weight(SHAPE, DENSE) == pytest.approx(6, rel=0.01)
    assert per_weight(SHAPE, DENSE, checkpointing=True) == pytest.approx(8, rel=0.01)


def test_long_rows_and_scored_tokens_cost_more() -> None:
    base, long, scored = (
        flops_per_token(SHAPE, LORA, rows, checkpointing=False)
        for rows in (Rows(1, 300.0, 0.1), Rows(1, 4000.0, 0.1), Rows(1, 300.0, 1.0))
    )
    assert base < scored
    assert base < long < 1.3 * base


def test_the_budget_is_divided_without_rest() -> None:
    for budget in (60.0, 600.0, 14_400.0):
        clock = pace(SHAPE, LORA, LAYOUT, ROWS, HALF, budget, compiles=False)
        assert clock.reserve_s <= budget / 2
        assert 0 < clock.train_s < budget - clock.reserve_s
        assert not clock.compile


def test_compile_only_if_it_saves_more_than_twice_its_cost() -> None:
    short, long = (pace(SHAPE, LORA, LAYOUT, ROWS, HALF, s, compiles=True) for s in (500.0, 14_400.0))
    assert (short.compile, long.compile) == (False, True)
    plain = pace(SHAPE, LORA, LAYOUT, ROWS, HALF, 14_400.0, compiles=False)
    assert long.train_s == pytest.approx(plain.train_s - COMPILE_S)
    assert long.tokens_per_s > plain.tokens_per_s
    cpu = parse_hardware("cpu-64x512GB")
    assert not pace(SHAPE, LORA, LAYOUT, ROWS, cpu, 1e6, compiles=True).compile


def test_a_slow_half_scores_fewer_development_rows() -> None:
    small = shape_from_params(135_000_000)
    modules = split(small, resolve("lora_r16"), 16)
    cpu = parse_hardware("cpu-2x24GB")
    slow = pace(small, modules, LAYOUT, ROWS, cpu, 300.0, compiles=False)
    assert slow.dev_examples < pace(small, modules, LAYOUT, ROWS, cpu, 36_000.0, compiles=False).dev_examples
    assert slow.dev_examples * ROWS.mean_length / (2 * slow.tokens_per_s) <= 0.05 * 300.0


@pytest.mark.parametrize(
    ("rows", "held_out"), [(1, 1), (9, 1), (100, 20), (2_000, 400), (20_000, 606), (100_000, 1000)]
)
def test_development_rows(rows: int, held_out: int) -> None:
    assert development_rows(rows) == held_out


def test_dense_deltas_submit_the_whole_model() -> None:
    assert export_bytes(SHAPE, DENSE) == 2 * SHAPE.parameters
    assert export_bytes(SHAPE, LORA) == 4 * sum(module.parameters for module in LORA)
