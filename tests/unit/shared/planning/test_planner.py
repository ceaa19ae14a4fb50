import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shared.errors import PlanError
from shared.messages.hardware import Hardware
from shared.messages.offers import TaskType
from shared.planning.feasibility import ASSUMED_DATA
from shared.planning.hardware import parse_hardware, usable_memory
from shared.planning.memory_fit import round_up
from shared.planning.model_shape import ModelShape, shape_from_params
from shared.planning.plan import NUMBERS, DataStats, Plan, in_numbers, numbers_in
from shared.planning.planner import epoch_limit, make_plan
from shared.planning.profiles import PROFILES, pair_share, resolve

HALF = parse_hardware("4xH100-80GB")
CPU = parse_hardware("cpu-2x24GB")
SMOL = shape_from_params(135_000_000, "llama")
EIGHT = shape_from_params(8_030_000_000, "llama")
HOUSE = resolve("maximum_accuracy")
WORDNET = DataStats(examples=1_000, tokens=50_000, label_tokens=20_000, max_length=150)

shapes = st.floats(min_value=8.0, max_value=10.9).map(lambda e: shape_from_params(round(10**e)))
hardware = st.sampled_from(
    [parse_hardware(n) for n in ("4xH100-80GB", "1xA100-40GB", "8xH200-141GB", "cpu-2x24GB", "cpu-64x512GB")]
)
recipes = st.sampled_from(sorted(PROFILES.values(), key=lambda recipe: recipe.profile))


@st.composite
def data(draw: st.DrawFn) -> DataStats:
    examples = draw(st.integers(1, 200_000))
    mean = draw(st.integers(4, 3000))
    longest = draw(st.integers(mean, 9000))
    labels = draw(st.integers(1, examples * mean))
    return DataStats(examples=examples, tokens=examples * mean, label_tokens=labels, max_length=longest)


def plan_or_none(shape: ModelShape, stats: DataStats, half: Hardware, hours: float, name: str) -> Plan | None:
    try:
        return make_plan(resolve(name), shape, stats, half, hours * 3600)
    except PlanError:
        return None


def test_other_words_have_no_numbers_of_a_plan() -> None:
    assert numbers_in("plan: packs is 8 instead of 64: time") == {}
    assert numbers_in("the plan in numbers: devices=4 broken profile= dtype=bfloat16") == {
        "devices": 4.0,
        "dtype": "bfloat16",
    }


def test_a_search_has_less_momentum_than_the_house() -> None:
    for profile, betas in (("auto", (0.6, 0.99)), ("maximum_accuracy", (0.9, 0.999))):
        assert make_plan(resolve(profile), SMOL, WORDNET, HALF, 3600).betas == betas


@given(shapes, data(), hardware, st.floats(0.05, 96), recipes)
def test_what_every_plan_keeps(
    shape: ModelShape, stats: DataStats, half: Hardware, hours: float, recipe: object
) -> None:
    name = recipe.profile  # type: ignore[attr-defined]
    plan = plan_or_none(shape, stats, half, hours, name)
    assert plan == plan_or_none(shape, stats, half, hours, name)
    if plan is None:
        return
    assert plan.memory_bytes <= usable_memory(half)
    read = numbers_in(in_numbers(plan))  # what people and trackers get of it
    for number in NUMBERS:
        value = getattr(plan, number)
        if isinstance(value, str):
            assert read[number] == value
        else:
            assert read.get(number, 0.0) == pytest.approx(value, rel=1e-5)
    assert plan.capacity % 64 == 0
    assert plan.capacity >= min(stats.max_length, plan.max_length)
    assert plan.packs_per_step % plan.devices == 0
    assert plan.packs_per_step > 0
    assert plan.expected_steps > 0
    assert 0 < plan.reserve_s <= hours * 1800
    assert 0 < plan.dev_examples <= 1000
    assert plan.expected_tokens_per_s > 0
    assert math.isfinite(plan.lr_lora)
    for module in plan.modules:
        inner, outer = module.in_features, module.out_features
        if module.method == "lora":
            assert 0 < module.rank <= inner * outer / (inner + outer)
            assert module.parameters == module.count * module.rank * (inner + outer)
            asked = resolve(name)
            assert module.alpha / module.rank == pytest.approx(asked.alpha / asked.rank)
        else:
            assert (module.method, module.rank) == ("dense", 0)
            assert module.parameters == module.count * inner * outer
    for deviation in plan.deviations:
        assert deviation.what
        assert deviation.wanted != deviation.got
        assert deviation.reason


@given(shapes, data(), hardware, st.floats(0.05, 48), st.floats(1.0, 2.0))
def test_more_time_never_means_fewer_tokens_or_fewer_steps_than_wanted(
    shape: ModelShape, stats: DataStats, half: Hardware, hours: float, factor: float
) -> None:
    short = plan_or_none(shape, stats, half, hours, "maximum_accuracy")
    long = plan_or_none(shape, stats, half, hours * factor, "maximum_accuracy")
    if short is None:
        return
    assert long is not None
    assert min(long.expected_steps, 100) >= min(short.expected_steps, 100) - 1


@given(data(), st.floats(0.05, 4), st.floats(1.0, 4.0))
def test_steps_grow_with_time_at_the_smallest_batch(stats: DataStats, hours: float, factor: float) -> None:
    recipe = replace(HOUSE, device_batch=8)
    try:
        short = make_plan(recipe, SMOL, stats, CPU, hours * 3600)
    except PlanError:
        return
    long = make_plan(recipe, SMOL, stats, CPU, hours * factor * 3600)
    if long.capacity == short.capacity:
        assert long.expected_steps >= short.expected_steps


@given(shapes, data(), hardware, st.floats(0.2, 96))
def test_the_house_profile_never_goes_without_deviations(
    shape: ModelShape, stats: DataStats, half: Hardware, hours: float
) -> None:
    plan = plan_or_none(shape, stats, half, hours, "maximum_accuracy")
    if plan is None:
        return
    named = {deviation.what for deviation in plan.deviations}
    assert "longest row" in named
    for module in plan.modules:
        assert any(module.name in what for what in named)
    assert ("parallel" in named) == (plan.parallel != "ddp")
    assert ("torch.compile" in named) == (not plan.compile)
    assert ("activation checkpointing" in named) == (not plan.activation_checkpointing)
    assert ("steps" in named) == (plan.expected_steps < 100)


def test_eight_billion_on_four_h100() -> None:
    plan = make_plan(HOUSE, EIGHT, ASSUMED_DATA, HALF, 4 * 3600)
    assert {module.method for module in plan.modules} == {"dense"}
    assert (plan.parallel, plan.devices, plan.dtype) == ("fsdp2", 4, "bfloat16")
    assert plan.activation_checkpointing
    assert plan.expected_steps >= 100
    assert plan.max_length == 4096
    assert plan.lr_dense == pytest.approx(5e-5 * (2000 / 4096) ** 0.78)


def test_seventy_billion_steps_down_to_lora_and_says_so() -> None:
    plan = make_plan(HOUSE, shape_from_params(70_600_000_000, "llama"), ASSUMED_DATA, HALF, 8 * 3600)
    assert {module.method for module in plan.modules} == {"lora"}
    ranks = {module.rank for module in plan.modules}
    assert max(ranks) < 8192
    (got,) = {d.got for d in plan.deviations if "q_proj" in d.what}
    assert f"rank {max(ranks)}" in got
    rate = next(d for d in plan.deviations if d.what == "learning rate of LoRA factors")
    assert "sqrt(32/" in rate.reason


def test_lora_on_small_models_runs_on_every_gpu_by_ddp() -> None:
    plan = make_plan(resolve("lora_r16"), EIGHT, ASSUMED_DATA, HALF, 4 * 3600)
    assert plan.parallel == "ddp"
    assert {(module.method, module.rank, module.alpha) for module in plan.modules} == {("lora", 16, 32.0)}
    assert plan.lr_lora == pytest.approx(5e-4 * (2000 / 4096) ** 0.78)


def test_a_cpu_half_gets_one_process_and_small_packs() -> None:
    plan = make_plan(HOUSE, SMOL, WORDNET, CPU, 600)
    assert (plan.parallel, plan.devices, plan.compile) == ("single", 1, False)
    assert round_up(WORDNET.max_length) <= plan.capacity <= 1024
    reasons = {d.what: d.reason for d in plan.deviations}
    assert "GPU" in reasons["attention"]
    assert "one device" in reasons["parallel"]


def test_without_fast_bfloat16_it_trains_in_float32() -> None:
    plan = make_plan(HOUSE, SMOL, WORDNET, CPU, 600, bf16=False)
    assert plan.dtype == "float32"
    assert any(d.what == "precision" for d in plan.deviations)


def test_a_short_budget_halves_the_batch_down_to_eight_examples() -> None:
    hour, minutes = (make_plan(HOUSE, SMOL, WORDNET, CPU, s) for s in (7200, 300))
    assert minutes.packs_per_step * minutes.capacity < hour.packs_per_step * hour.capacity
    assert minutes.packs_per_step * minutes.capacity >= 8 * 50
    (batch,) = [d for d in minutes.deviations if d.what == "batch"]
    assert "128 examples" in batch.wanted
    assert "fewer than 100" in batch.reason


def test_a_measured_speed_replaces_the_estimate() -> None:
    slow, fast = (make_plan(HOUSE, SMOL, WORDNET, CPU, 600, tokens_per_s=rate) for rate in (20.0, 2000.0))
    assert (slow.expected_tokens_per_s, fast.expected_tokens_per_s) == (20.0, 2000.0)
    assert slow.expected_steps < fast.expected_steps


def test_the_family_may_be_given() -> None:
    qwen = make_plan(HOUSE, EIGHT, ASSUMED_DATA, HALF, 14400, family="Qwen/Qwen2.5-7B")
    assert qwen.lr_dense == pytest.approx(5e-5 * (2000 / 4096) ** 0.08)


def test_the_scored_length_caps_the_rows() -> None:
    plan = make_plan(HOUSE, SMOL, replace(WORDNET, max_length=5000), CPU, 3600, scored_length=1000)
    assert plan.max_length == 1000
    assert plan.capacity == 1024


def test_what_does_not_fit_is_refused_with_the_bytes() -> None:
    with pytest.raises(PlanError, match=r"need at least 1\d\.\d GiB"):
        make_plan(HOUSE, EIGHT, ASSUMED_DATA, CPU, 3600)


def test_no_time_is_refused() -> None:
    with pytest.raises(PlanError, match="not one step"):
        make_plan(HOUSE, SMOL, ASSUMED_DATA, CPU, 2)


def test_no_rows_are_refused() -> None:
    with pytest.raises(PlanError, match="no rows"):
        make_plan(HOUSE, SMOL, DataStats(examples=0, tokens=0, label_tokens=0, max_length=0), CPU, 3600)


def test_small_data_is_seen_more_often() -> None:
    assert [epoch_limit(n) for n in (9_999, 10_000, 100_000, 100_001)] == [4.0, 3.0, 3.0, 2.0]


def test_pairs_get_a_lower_rate_and_fewer_epochs_and_time_for_the_reference() -> None:
    recipe, shape = resolve("maximum_accuracy"), shape_from_params(8_000_000_000, "llama")
    text = make_plan(recipe, shape, ASSUMED_DATA, HALF, 7200)
    pairs = make_plan(recipe, shape, ASSUMED_DATA, HALF, 7200, task_type=TaskType.DPO)
    share = pair_share(pairs.expected_steps)
    assert 0.1 < share < 1
    assert pairs.lr_dense == pytest.approx(share * text.lr_dense)
    assert pairs.lr_lora == pytest.approx(share * text.lr_lora)
    assert any(f"{share:.2g} (preference pairs" in deviation.reason for deviation in pairs.deviations)
    assert [epoch_limit(n, pairs=True) for n in (9_999, 10_000)] == [2.0, 1.0]
    tokens = [plan.expected_steps * plan.packs_per_step * plan.capacity for plan in (pairs, text)]
    assert tokens[0] < 0.8 * tokens[1]
    assert pairs.memory_bytes <= text.memory_bytes  # no second model


def test_both_documents_of_a_pair_fit_one_pack() -> None:
    stats = DataStats(examples=500, tokens=300_000, label_tokens=100_000, max_length=1000)
    shape = shape_from_params(135_000_000, "llama")
    plan = make_plan(resolve("lora_r16"), shape, stats, HALF, 3600, scored_length=512, task_type=TaskType.DPO)
    assert plan.max_length == 512  # of one document
    assert plan.capacity >= 1000
