"""The recipes of others: taken to the letter, and every deviation named."""

import pytest
from msgspec.structs import replace

from shared.messages.hardware import Hardware
from shared.messages.offers import TaskType
from shared.planning.hardware import parse_hardware
from shared.planning.model_shape import shape_from_params
from shared.planning.plan import DataStats, Plan
from shared.planning.planner import make_plan
from shared.planning.profiles import resolve
from shared.planning.throughput import FILL

CPU = parse_hardware("cpu-2x24GB")
HALF = parse_hardware("4xH100-80GB")
SMOL = shape_from_params(135_000_000, "llama")
ROWS = DataStats(examples=10_000, tokens=1_000_000, label_tokens=500_000, max_length=400)
MANY = replace(ROWS, examples=100_000, tokens=10_000_000)


def test_the_reference_miner_takes_ten_steps_of_eight_rows_whatever_the_time() -> None:
    for hours in (1, 12):
        plan = make_plan(resolve("reference_miner"), SMOL, ROWS, CPU, hours * 3600)
        assert plan.expected_steps == 10
        assert (plan.most_steps, plan.max_epochs) == (10, 1.0)
        assert (plan.decay, plan.rate_floor, plan.warmup) == ("cosine", 0.0, 1.0)
        assert plan.lr_lora == 2e-4
        assert {(module.rank, module.alpha) for module in plan.modules} == {(8, 16.0)}
        assert plan.max_length == 512
        named = {deviation.what: deviation.wanted for deviation in plan.deviations}
        assert named["optimiser"] == "AdamW with 8-bit moments"
        assert "steps" not in named


def test_the_reference_miner_sees_few_rows_once_at_most() -> None:
    few = DataStats(examples=40, tokens=4_000, label_tokens=2_000, max_length=400)
    plan = make_plan(resolve("reference_miner"), SMOL, few, CPU, 3600)
    assert plan.max_epochs == 1.0
    assert plan.warmup == 1.0


def test_a_recipe_that_trains_all_weights_trains_them_at_one_rate() -> None:
    plan = make_plan(resolve("trl_default"), SMOL, ROWS, CPU, 3600)
    assert {module.method for module in plan.modules} == {"dense"}
    assert plan.trained_parameters == SMOL.parameters
    assert plan.lr_norms == plan.lr_embeddings == plan.lr_dense
    assert not any(deviation.got == "frozen" for deviation in plan.deviations)
    assert not any("q_proj" in deviation.what for deviation in plan.deviations)


def test_a_model_too_large_to_train_whole_gets_factors_and_says_so() -> None:
    plan = make_plan(resolve("trl_default"), shape_from_params(70_000_000_000), ROWS, HALF, 8 * 3600)
    assert {module.method for module in plan.modules} == {"lora"}
    assert any("q_proj" in d.what and d.wanted == "trained whole" for d in plan.deviations)


def winner(parameters: int, hardware: Hardware = HALF, task_type: TaskType = TaskType.INSTRUCT) -> Plan:
    shape = shape_from_params(parameters)
    return make_plan(resolve("winner_2026_06"), shape, MANY, hardware, 4 * 3600, task_type=task_type)


@pytest.mark.parametrize(
    ("parameters", "rate", "packs"),
    [
        (600_000_000, 1e-4, 140),
        (1_500_000_000, 1e-4, 100),
        (3_000_000_000, 7.5e-5, 48),
        (7_000_000_000, 3.5e-5, 28),
        (8_500_000_000, 3.5e-5 * 2 / 3, 28),
        (14_000_000_000, 1e-4, 30),
    ],
)
def test_the_winner_goes_by_its_table_of_sizes(parameters: int, rate: float, packs: int) -> None:
    recipe = resolve("winner_2026_06").sized(parameters, 4, pairs=False)
    assert (recipe.rate, recipe.device_batch) == (rate, round(2.2 * packs))
    assert recipe.full == (parameters < 9e9)
    plan = winner(parameters)
    assert {module.method for module in plan.modules} == {"dense" if recipe.full else "lora"}
    if not recipe.full:
        assert plan.dropout == 0.1
        assert {module.alpha / module.rank for module in plan.modules} == {4.0}
    assert (plan.decay, plan.rate_floor) == ("cosine", 0.25)
    assert (plan.curve.rises, plan.curve.rise, plan.curve.snapshots) == (3, 0.05, 8)


def test_the_winner_accumulates_up_to_its_least_batch_on_few_devices() -> None:
    recipe = resolve("winner_2026_06")
    assert [recipe.sized(7_000_000_000, devices, pairs=False).accumulation for devices in (1, 4)] == [2, 1]
    assert recipe.sized(600_000_000, 1, pairs=False).accumulation == 1


def test_a_batch_that_had_to_be_halved_lowers_the_winners_rate_by_the_root() -> None:
    plan = make_plan(resolve("winner_2026_06"), SMOL, replace(ROWS, examples=400, tokens=40_000), CPU, 3600)
    (batch,) = [deviation for deviation in plan.deviations if deviation.what == "batch"]
    assert "308 examples" in batch.wanted
    assert any(deviation.what == "learning rate" for deviation in plan.deviations)
    examples = plan.packs_per_step * plan.capacity * FILL / 100
    assert plan.lr_dense == pytest.approx(1e-4 * (examples / 308) ** 0.5)
    assert winner(600_000_000).lr_dense == 1e-4


def test_the_winner_trains_pairs_by_factors_from_two_billion_parameters() -> None:
    large = winner(3_000_000_000, task_type=TaskType.DPO)
    assert {module.method for module in large.modules} == {"lora"}
    assert {module.alpha / module.rank for module in large.modules} == {2.0}
    assert large.lr_lora == 8.5e-6
    assert winner(600_000_000, task_type=TaskType.DPO).lr_dense == pytest.approx(1.35e-5)
