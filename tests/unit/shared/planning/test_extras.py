"""Norms, embeddings and the output matrix: when a plan trains them, at what rate, and what that takes."""

from typing import Any

import pytest
from msgspec.structs import replace

from shared.messages.hardware import Hardware
from shared.messages.offers import TaskType
from shared.planning.hardware import parse_hardware, usable_memory
from shared.planning.memory_fit import Layout, estimate, split
from shared.planning.model_shape import ModelShape, extras_of, shape_from_config, shape_from_params
from shared.planning.plan import DataStats, Plan
from shared.planning.planner import make_plan
from shared.planning.profiles import EMBEDDING_EPOCHS, EMBEDDING_RATE, NORM_RATE, resolve
from shared.planning.throughput import Rows, flops_per_token

AUTO = resolve("auto")
ONE = parse_hardware("1xH100-80GB")
HALF = parse_hardware("4xH100-80GB")
EIGHT = shape_from_params(8_030_000_000)
SMALL = shape_from_params(135_000_000, "llama")
ROWS = DataStats(examples=10_000, tokens=1_000_000, label_tokens=500_000, max_length=400)


def plan_of(
    shape: ModelShape = SMALL, hardware: Hardware = ONE, seconds: float = 4 * 3600, **changes: Any
) -> Plan:
    return make_plan(AUTO, shape, ROWS, hardware, seconds, **changes)


def test_a_small_model_is_trained_with_all_its_weights() -> None:
    plan = plan_of()
    assert (plan.extras.norms, plan.extras.embeddings) == (True, True)
    assert plan.lr_norms == NORM_RATE * plan.lr_dense
    assert plan.lr_embeddings == EMBEDDING_RATE
    assert plan.trained_parameters == SMALL.parameters
    assert "frozen" not in {deviation.got for deviation in plan.deviations}


def test_embeddings_stay_frozen_where_they_do_not_fit() -> None:
    """A rung of the memory ladder is never left for them: what it has over is theirs or nobody's."""
    shape = shape_from_params(1_240_000_000)
    for gigabytes in range(24, 81):
        device = replace(ONE, memory_bytes=gigabytes * 2**30)
        plan = make_plan(AUTO, shape, ROWS, device, 4 * 3600)
        plain = make_plan(replace(AUTO, norm_rate=0.0, embedding_rate=0.0), shape, ROWS, device, 4 * 3600)
        assert (plan.modules, plan.capacity, plan.activation_checkpointing) == (
            plain.modules,
            plain.capacity,
            plain.activation_checkpointing,
        )
        assert plan.memory_bytes <= usable_memory(device)
        if plan.extras.norms and not plan.extras.embeddings:
            frozen = {deviation.what for deviation in plan.deviations if deviation.got == "frozen"}
            assert frozen == {"embeddings, output matrix"}
            return
    pytest.fail("there was always room")


def test_embeddings_stay_frozen_on_a_cpu_without_time_for_many_epochs() -> None:
    cpu = Hardware(device="cpu", count=1, memory_bytes=16 * 2**30)
    plans = [plan_of(hardware=cpu, seconds=3600.0 * hours) for hours in range(2, 80, 6)]
    trained = [plan.extras.embeddings for plan in plans]
    assert trained == sorted(trained)  # from some length on
    assert 0 < sum(trained) < len(trained)
    for plan in plans:
        assert plan.extras.norms
        epochs = plan.train_s * plan.expected_tokens_per_s / ROWS.tokens
        reasons = [one.reason for one in plan.deviations if one.what == "embeddings, output matrix"]
        if plan.extras.embeddings:
            assert not reasons
            assert epochs > 0.8 * EMBEDDING_EPOCHS
        else:
            assert epochs < EMBEDDING_EPOCHS
            assert "time for" in reasons[0]
    divergent = plan_of(hardware=cpu, seconds=3600.0, divergence=True)
    assert "distance from the base model" in next(
        one.reason for one in divergent.deviations if one.what == "embeddings, output matrix"
    )


def test_a_gpu_trains_embeddings_however_short_the_time() -> None:
    rows = replace(ROWS, examples=1_000_000, tokens=100_000_000, label_tokens=50_000_000)
    plan = make_plan(AUTO, SMALL, rows, ONE, 600.0)
    assert plan.train_s * plan.expected_tokens_per_s < EMBEDDING_EPOCHS * rows.tokens
    assert plan.extras.embeddings


def test_sharded_models_train_their_norms_only() -> None:
    plan = plan_of(EIGHT, hardware=HALF)
    assert plan.parallel == "fsdp2"
    assert (plan.extras.norms, plan.extras.embeddings) == (True, False)


def test_a_mixture_of_experts_stays_an_adapter() -> None:
    """Its attention is a small part of it: the whole model would be twenty times as large to upload."""
    config = {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "intermediate_size": 1024,
        "vocab_size": 50_304,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    }
    plan = plan_of(shape_from_config(config))
    assert {module.method for module in plan.modules} == {"dense"}
    assert plan.extras.parameters == 0


def test_an_adapter_has_none_of_them() -> None:
    plan = plan_of(shape_from_params(70_000_000_000), hardware=HALF)
    assert any(module.method == "lora" for module in plan.modules)
    assert plan.extras.parameters == 0
    assert plan.lr_norms == plan.lr_embeddings == 0.0


@pytest.mark.parametrize(
    ("changes", "norms", "embeddings", "why"),
    [
        ({"bf16": False}, False, False, "adapter"),  # it is more exact then
        ({"task_type": TaskType.DPO}, False, False, "preference pairs"),
        ({"divergence": True}, True, False, "distance from the base model"),
        ({"shape": EIGHT, "hardware": HALF}, True, False, "each device"),
    ],
)
def test_what_keeps_them_frozen(changes: dict[str, Any], norms: bool, embeddings: bool, why: str) -> None:
    plan = plan_of(**changes)
    assert (plan.extras.norms, plan.extras.embeddings) == (norms, embeddings)
    (deviation,) = (one for one in plan.deviations if one.got == "frozen")
    assert why in deviation.reason


def test_others_who_train_all_weights_have_one_rate_for_them() -> None:
    plan = make_plan(resolve("trl_default"), SMALL, ROWS, ONE, 4 * 3600)
    assert (plan.lr_dense, plan.lr_norms, plan.lr_embeddings) == (2e-5, 2e-5, 2e-5)
    assert plan.trained_parameters == SMALL.parameters


def test_they_are_counted() -> None:
    modules = split(SMALL, AUTO, AUTO.rank)
    layout = Layout(
        capacity=4096, parallel="single", devices=1, checkpointing=False, dtype="bfloat16", cpu=False
    )
    extras = extras_of(SMALL, norms=True, embeddings=True)
    without, with_them = (
        estimate(SMALL, modules, layout, 0.0, one)
        for one in (extras_of(SMALL, norms=False, embeddings=False), extras)
    )
    assert with_them.optimizer - without.optimizer == 8 * extras.parameters
    assert with_them.activations > without.activations
    rows = Rows(1000, 100.0, 0.5)
    cost = [
        flops_per_token(SMALL, modules, rows, checkpointing=False, extras=one)
        for one in (extras_of(SMALL, norms=True, embeddings=False), extras)
    ]
    assert cost[1] - cost[0] == 2 * 2 * SMALL.hidden * SMALL.vocab * rows.label_share
