import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import PlanError
from shared.planning.model_shape import (
    is_mixture,
    parameters_from_name,
    shape_from_config,
    shape_from_params,
)

ORACLE = Path(__file__).parents[3] / "data" / "oracle" / "base"
SMOL = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


def test_parameter_counts_are_those_of_the_published_models() -> None:
    assert shape_from_config(SMOL).parameters == 134_515_008
    llama = {**SMOL, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336}
    llama |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
    assert shape_from_config(llama | {"tie_word_embeddings": False}).parameters == 8_030_261_248


def test_the_parameter_count_equals_the_weights_in_a_real_file() -> None:
    """safetensors begins with the length of a JSON header that names every tensor's shape."""
    raw = (ORACLE / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    stored = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            rows = 1
            for size in tensor["shape"]:
                rows *= size
            stored += rows
    assert shape_from_config(json.loads((ORACLE / "config.json").read_text())).parameters == stored


def test_defaults_of_older_configs() -> None:
    config = {key: value for key, value in SMOL.items() if key not in ("head_dim", "num_key_value_heads")}
    shape = shape_from_config({**config, "tie_word_embeddings": None})
    assert (shape.kv_heads, shape.head_dim, shape.tied) == (9, 64, False)


@pytest.mark.parametrize("value", [None, 0, -1, "576", 2.5, True])
def test_a_config_that_can_not_be_used_names_its_field(value: object) -> None:
    with pytest.raises(PlanError, match="hidden_size"):
        shape_from_config({**SMOL, "hidden_size": value})


def test_mixtures_of_experts_are_refused() -> None:
    with pytest.raises(PlanError, match="mixture of experts"):
        shape_from_config({**SMOL, "num_local_experts": 8})


@given(st.floats(min_value=8.2, max_value=11.3))
def test_a_typical_shape_has_about_the_stated_size(exponent: float) -> None:
    parameters = round(10**exponent)
    assert shape_from_params(parameters).parameters == pytest.approx(parameters, rel=0.1)


def test_no_parameters_are_no_model() -> None:
    with pytest.raises(PlanError):
        shape_from_params(0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7e9),
        ("HuggingFaceTB/SmolLM2-135M", 135e6),
        ("unsloth/Llama-3.2-1B", 1e9),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1.1e9),
        ("mistralai/Mixtral-8x7B-v0.1", 56e9),
        ("Qwen/Qwen3-30B-A3B", 30e9),
        ("google/gemma_2b_it", 2e9),
        ("facebook/opt-125m", 125e6),
        ("org/model-4bit", None),
        ("org/phi-3-mini-4k-instruct", None),
        ("gpt2", None),
        ("org/model-0B", None),
        ("", None),
    ],
)
def test_sizes_in_names(name: str, parameters: float | None) -> None:
    assert parameters_from_name(name) == parameters


@pytest.mark.parametrize(
    ("name", "mixture"),
    [("Mixtral-8x7B", True), ("Qwen3-30B-A3B", True), ("Qwen2.5-7B", False), ("alpha-a100", False)],
)
def test_mixtures_by_name(name: str, mixture: bool) -> None:
    assert is_mixture(name) is mixture


@given(st.text(max_size=512))
def test_any_name_is_read_without_an_error(name: str) -> None:
    size = parameters_from_name(name)
    assert size is None or size >= 1
