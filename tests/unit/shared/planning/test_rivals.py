"""The recipes of others: taken to the letter, and every deviation named."""

from shared.planning.hardware import parse_hardware
from shared.planning.model_shape import shape_from_params
from shared.planning.plan import DataStats
from shared.planning.planner import make_plan
from shared.planning.profiles import resolve

CPU = parse_hardware("cpu-2x24GB")
HALF = parse_hardware("4xH100-80GB")
SMOL = shape_from_params(135_000_000, "llama")
ROWS = DataStats(examples=10_000, tokens=1_000_000, label_tokens=500_000, max_length=400)


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


def test_a_recipe_that_trains_all_weights_names_those_that_stay_frozen() -> None:
    plan = make_plan(resolve("trl_default"), SMOL, ROWS, CPU, 3600)
    assert {module.method for module in plan.modules} == {"dense"}
    frozen = {d.what for d in plan.deviations if d.got == "frozen"}
    assert frozen == {"embeddings, norms and output matrix"}
    assert not any("q_proj" in deviation.what for deviation in plan.deviations)


def test_a_model_too_large_to_train_whole_gets_factors_and_says_so() -> None:
    plan = make_plan(resolve("trl_default"), shape_from_params(70_000_000_000), ROWS, HALF, 8 * 3600)
    assert {module.method for module in plan.modules} == {"lora"}
    assert any("q_proj" in d.what and d.wanted == "trained whole" for d in plan.deviations)
