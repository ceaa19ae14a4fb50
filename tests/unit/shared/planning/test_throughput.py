import pytest
from msgspec.structs import replace

from shared.planning.hardware import parse_hardware
from shared.planning.memory_fit import Layout, split
from shared.planning.model_shape import ModelShape, ModulePlan, shape_from_params
from shared.planning.profiles import resolve
from shared.planning.throughput import (
    COMPILE_GAIN,
    COMPILE_S,
    Measured,
    Rows,
    development_rows,
    estimated_rate,
    expected_costs,
    export_bytes,
    flops_per_token,
    is_recorded,
    pace,
)

SHAPE = shape_from_params(8_030_000_000)
DENSE = split(SHAPE, resolve("maximum_accuracy"), 8192)
LORA = split(SHAPE, resolve("lora_r16"), 16)
ROWS = Rows(20_000, 300.0, 0.5)
COMPARED = replace(ROWS, divergence=True)
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


H100 = parse_hardware("1xH100-80GB")
HOUSE = resolve("maximum_accuracy")
SMOLLM2 = ModelShape(
    hidden=576, layers=30, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, tied=True
)
QWEN = ModelShape(
    hidden=896, layers=24, intermediate=4864, heads=14, kv_heads=2, head_dim=64, vocab=151936, tied=True
)


def speed(shape: ModelShape, capacity: int, *, recorded: bool) -> float:
    """Tokens/s of dense training on one H100, as estimated."""
    layout = Layout(
        capacity=capacity, parallel="single", devices=1, checkpointing=False, dtype="bfloat16", cpu=False
    )
    flops = flops_per_token(shape, split(shape, HOUSE, 8192), ROWS, checkpointing=False)
    return estimated_rate(shape, layout, flops, H100, recorded=recorded)


@pytest.mark.parametrize(
    ("shape", "capacity", "computed", "recorded"),
    [
        (SMOLLM2, 1_536, 7_070, 53_900),
        (SMOLLM2, 8_192, 57_800, 157_100),
        (QWEN, 4_096, 37_100, 73_700),
    ],
)
def test_small_models_train_as_fast_as_an_h100_was_seen_to(
    shape: ModelShape, capacity: int, computed: float, recorded: float
) -> None:
    """What was measured for steps of one pack (docs/gpu.md); without recording the CPU starts each kernel."""
    assert speed(shape, capacity, recorded=True) == pytest.approx(recorded, rel=0.15)
    assert 0.8 * computed < speed(shape, capacity, recorded=False) < 2.3 * computed


def test_a_plan_of_a_small_model_counts_on_recorded_passes_where_the_engine_has_them() -> None:
    layout = replace(LAYOUT, parallel="single", devices=1, capacity=8192)
    assert is_recorded(SMOLLM2, layout, dropout=0.0, plain=True)
    for other in (
        replace(layout, parallel="ddp"),
        replace(layout, checkpointing=True),
        replace(layout, dtype="float32"),
        replace(layout, cpu=True),
    ):
        assert not is_recorded(SMOLLM2, other, dropout=0.0, plain=True)
    assert not is_recorded(SMOLLM2, layout, dropout=0.05, plain=True)
    assert not is_recorded(SMOLLM2, layout, dropout=0.0, plain=False)
    assert not is_recorded(SHAPE, layout, dropout=0.0, plain=True)
    modules = split(SMOLLM2, HOUSE, 8192)
    plain = pace(SMOLLM2, modules, layout, ROWS, H100, 3600.0, compiles=False, dropout=0.05)
    fast = pace(SMOLLM2, modules, layout, ROWS, H100, 3600.0, compiles=False)
    assert fast.tokens_per_s > 1.8 * plain.tokens_per_s
    compared = pace(SMOLLM2, modules, layout, COMPARED, H100, 3600.0, compiles=False)
    assert compared.tokens_per_s == plain.tokens_per_s


def test_the_base_model_reads_the_rows_that_are_compared_with_it_before_training() -> None:
    plain, compared = (
        pace(SHAPE, DENSE, LAYOUT, rows, H100, 3600.0, compiles=False) for rows in (ROWS, COMPARED)
    )
    asked_s = ROWS.count * ROWS.mean_length / (2 * plain.tokens_per_s)
    assert compared.train_s == pytest.approx(max(plain.train_s / 1.5, plain.train_s - asked_s))


def test_a_large_model_is_as_fast_as_its_arithmetic() -> None:
    assert speed(SHAPE, 16384, recorded=False) == pytest.approx(
        0.97 * 0.35 * 989e12 / flops_per_token(SHAPE, DENSE, ROWS, checkpointing=False), rel=0.01
    )


def test_the_reserve_is_what_the_schedule_keeps() -> None:
    """8B, dense: 485 s were kept and 120 planned."""
    measured = Measured(load_s=33.0, score_s=40.0, save_bytes_per_s=300e6)
    clock = pace(SHAPE, DENSE, LAYOUT, ROWS, HALF, 14_400.0, compiles=False, closing=measured)
    costs = expected_costs(SHAPE, DENSE, measured, 14_400.0)
    assert clock.reserve_s == costs.reserve_s == costs.closing_s + 2.0
    assert costs.save_s == pytest.approx(0.5 + 12 * 6_979e6 / 300e6, rel=0.01)
    again = expected_costs(SHAPE, DENSE, replace(measured, reload_s=33.0), 14_400.0)
    assert again.export_s == costs.export_s + 33.0
    quick = replace(measured, save_bytes_per_s=680e6)
    assert pace(SHAPE, DENSE, LAYOUT, ROWS, HALF, 14_400.0, compiles=False, closing=quick).reserve_s < (
        0.6 * clock.reserve_s
    )


def test_a_measured_rate_is_of_layers_that_are_not_compiled() -> None:
    slow, fast = (
        pace(SHAPE, LORA, LAYOUT, ROWS, HALF, 14_400.0, compiles=compiles, measured=1000.0)
        for compiles in (False, True)
    )
    assert fast.compile
    assert (slow.tokens_per_s, fast.tokens_per_s) == (1000.0, 1000.0 * COMPILE_GAIN)
