"""Whether an offer can be won on half of a box, and why not."""

import math
import time
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from shared.messages.hardware import Hardware
from shared.messages.offers import TaskType
from shared.planning.architectures import ARCHITECTURES, Batching, ModelFacts, facts_from_config
from shared.planning.feasibility import check_offer
from shared.planning.hardware import parse_hardware
from shared.planning.model_shape import experts_of
from shared.planning.plan import Plan
from shared.planning.profiles import DEFAULT_PROFILE

HALF = parse_hardware("4xH100-80GB")
CPU = parse_hardware("cpu-2x24GB")

hardware = st.sampled_from(
    [parse_hardware(n) for n in ("4xH100-80GB", "1xA100-40GB", "8xH200-141GB", "cpu-2x24GB", "cpu-64x512GB")]
)


@pytest.mark.parametrize("task", [TaskType.CHAT, TaskType.DPO])
def test_every_supported_kind_of_task_is_planned(task: TaskType) -> None:
    answer = check_offer("Qwen/Qwen2.5-7B", 7_600_000_000, task, 4, HALF)
    assert answer.ok, answer.cause


def test_an_offer_that_can_be_won() -> None:
    answer = check_offer("Qwen/Qwen2.5-7B", 7_600_000_000, TaskType.INSTRUCT, 4, HALF)
    assert answer.ok
    assert answer.plan is not None
    assert answer.plan.profile == DEFAULT_PROFILE
    assert "4xH100-80GB" in answer.cause


@pytest.mark.parametrize("task", [TaskType.GRPO, TaskType.IMAGE])
def test_an_unsupported_task_type(task: TaskType) -> None:
    answer = check_offer("Qwen/Qwen2.5-7B", None, task, 4, HALF)
    assert (answer.ok, answer.plan) == (False, None)
    assert answer.cause == f"task type {task.value} is not supported by the engine"


@pytest.mark.parametrize(
    ("model", "parameters", "hours", "half", "profile", "cause"),
    [
        ("m", 70_000_000_000, 4, CPU, "maximum_accuracy", "need at least"),
        ("m-70B", None, 4, CPU, "maximum_accuracy", "by its name"),
        (
            "Mixtral-8x7B",
            None,
            4,
            HALF,
            "maximum_accuracy",
            "mixture of experts, which each device must hold",
        ),
        (
            "falcon-40b",
            None,
            4,
            HALF,
            "maximum_accuracy",
            "can't share a row, so that each device must hold it",
        ),
        ("org/Llama-3-8B-GPTQ", None, 4, HALF, "maximum_accuracy", "quantised weights can't be trained"),
        ("google/flan-t5-base", None, 4, HALF, "maximum_accuracy", "no causal language model"),
        ("m-7B", None, 4, HALF, "fastest", "unknown profile"),
        ("m-1B", None, 0.05, CPU, "maximum_accuracy", "step"),
        ("m-8B", None, 0.008, HALF, "maximum_accuracy", "reading the model and writing the result take"),
        ("m", 10**400, 4, HALF, "maximum_accuracy", "no model has"),
        ("m", -5, 4, HALF, "maximum_accuracy", "no model has"),
        ("m", None, math.nan, HALF, "maximum_accuracy", "no time"),
        ("m", None, -1, HALF, "maximum_accuracy", "no time"),
    ],
)
def test_offers_that_can_not_be_won(
    model: str, parameters: int | None, hours: float, half: Hardware, profile: str, cause: str
) -> None:
    answer = check_offer(model, parameters, TaskType.INSTRUCT, hours, half, profile)
    assert not answer.ok
    assert cause in answer.cause


def test_a_mixture_that_fits_one_device_is_trained_in_its_attention() -> None:
    answer = check_offer("allenai/OLMoE-1B-7B-0924", None, TaskType.INSTRUCT, 4, HALF)
    assert answer.ok
    assert answer.plan is not None
    assert [module.name for module in answer.plan.modules] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_a_config_says_what_is_a_mixture_not_the_name() -> None:
    """DeepSeek-V2-Lite's name doesn't state its experts; cut over four devices its matrices would fit."""
    config = {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "vocab_size": 102400,
    }
    for model in ("deepseek-ai/DeepSeek-V2-Lite", "org/mine"):
        answer = check_offer(model, None, TaskType.INSTRUCT, 4, HALF, known=facts_from_config(config))
        assert answer.plan is not None
        assert answer.plan.parallel == "ddp"
        assert [module.name for module in answer.plan.modules] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    dense = ModelFacts("", Batching.PACKED, 8_000_000_000)
    answer = check_offer("org/better-than-moe", None, TaskType.INSTRUCT, 4, HALF, known=dense)
    assert answer.plan is not None
    assert len(answer.plan.modules) == 7


@pytest.mark.parametrize("model", ["falcon-7b", "Qwen3-30B-A3B", "DeepSeek-V2-Lite"])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_what_one_device_trains_several_train_too(model: str, devices: int) -> None:
    """Sharded by FSDP2 all matrices would fit, but the engine holds such a model whole on each device."""
    answer = check_offer(model, None, TaskType.INSTRUCT, 4, parse_hardware(f"{devices}xH100-80GB"))
    assert answer.ok, answer.cause
    assert answer.plan is not None
    assert answer.plan.parallel == ("ddp" if devices > 1 else "single")
    assert {module.method for module in answer.plan.modules} == {"lora"}


SIZES = (0.1, 0.5, 1.5, 5.0, 8.0, 11.5, 15.0, 20.8, 24.0, 29.9, 34.0, 41.0, 56.0, 72.0)  # 1e9 parameters
KINDS = {
    ModelFacts("", batching, experts=experts_of({**config, "model_type": kind}) > 1)
    for kind, batching in ARCHITECTURES.items()
    for config in ({}, {"num_experts": 8})
}


@pytest.mark.parametrize("profile", ["auto", "maximum_accuracy", "lora_r128", "winner_2026_06"])
@pytest.mark.parametrize("task", [TaskType.INSTRUCT, TaskType.DPO])
def test_what_one_device_accepts_several_accept_with_no_less_trained(profile: str, task: TaskType) -> None:
    """Also where there is hardly time to write what is trained."""
    for facts, size, hours in product(KINDS, SIZES, (0.01, 0.02, 0.03, 0.05, 0.5, 4.0)):
        known = replace(facts, parameters=round(size * 1e9))
        answers = [
            check_offer("m", None, task, hours, parse_hardware(f"{devices}xH100-80GB"), profile, known)
            for devices in (1, 2, 4, 8)
        ]
        one, *several = answers
        for answer in several if one.ok else []:
            assert answer.ok, f"{one.cause}, but {answer.cause}"
            assert one.plan is not None
            assert answer.plan is not None
            assert trained(answer.plan) >= trained(one.plan)


def trained(plan: Plan) -> tuple[int, int]:
    """How many weights are trained whole, and the rank of the others."""
    whole = sum(module.parameters for module in plan.modules if module.method == "dense")
    return whole, min((module.rank for module in plan.modules if module.method == "lora"), default=10**6)


def test_what_a_models_config_says_is_more_than_its_name() -> None:
    refused = ModelFacts("it is an encoder")
    answer = check_offer("m-7B", None, TaskType.INSTRUCT, 4, HALF, known=refused)
    assert answer.cause == "m-7B can't be trained: it is an encoder"
    known = ModelFacts("", Batching.PADDED, 41_000_000_000)
    answer = check_offer("m-7B", None, TaskType.INSTRUCT, 4, HALF, known=known)
    assert "which no device here has room for (41 billion parameters by its config)" in answer.cause
    assert check_offer("better-than-bert", None, TaskType.INSTRUCT, 4, HALF, known=ModelFacts()).ok


def test_a_model_of_unknown_size_is_taken_as_seven_billion_and_said_so() -> None:
    answer = check_offer("org/mystery", None, TaskType.INSTRUCT, 4, HALF)
    assert answer.ok
    assert "7 billion parameters assumed" in answer.cause


@given(st.text(max_size=60), st.integers() | st.none(), st.floats(), hardware, st.text(max_size=20))
@example("org/tiny-0.001B", None, 1e308, HALF, "maximum_accuracy")
def test_no_offer_makes_the_check_raise(
    model: str, parameters: int | None, hours: float, half: Hardware, profile: str
) -> None:
    assert check_offer(model, parameters, TaskType.INSTRUCT, hours, half, profile).cause


def test_the_check_takes_about_a_millisecond() -> None:
    start = time.process_time()
    for size in range(1, 101):
        check_offer("m", size * 700_000_001, TaskType.INSTRUCT, 4, HALF)
    assert (time.process_time() - start) / 100 < 0.01  # CPU seconds; 0.3 ms measured


def test_the_demo_job_is_accepted_on_two_cores() -> None:
    assert check_offer("HuggingFaceTB/SmolLM2-135M-Instruct", None, TaskType.INSTRUCT, 0.1, CPU).ok
