import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import PlanError
from shared.planning.model_shape import (
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


# Of published configs, the fields that sizes depend on, with the parameters that their model cards state.
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "gpt2": (
        {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "tie_word_embeddings": True},
        124e6,
    ),
    "bloom-560m": (
        {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880, "tie_word_embeddings": True},
        559e6,
    ),
    "mpt-7b": (
        {"d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432, "tie_word_embeddings": True},
        6.65e9,
    ),
    "Mixtral-8x7B": (
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
        },
        46.7e9,
    ),
    "gemma-3-4b": (
        {
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "num_hidden_layers": 34,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "intermediate_size": 10240,
                "vocab_size": 262208,
                "tie_word_embeddings": True,
            },
        },
        3.88e9,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_architectures_are_about_as_large_as_their_cards_say(name: str) -> None:
    config, parameters = PUBLISHED[name]
    assert shape_from_config(config).parameters == pytest.approx(parameters, rel=0.35)


def test_of_a_mixture_the_attention_is_trained_and_most_experts_are_idle() -> None:
    shape = shape_from_config(PUBLISHED["Mixtral-8x7B"][0])
    assert [linear.name for linear in shape.linears] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert shape.parameters == pytest.approx(46.7e9, rel=0.01)
    assert shape.parameters - shape.idle_parameters == pytest.approx(12.9e9, rel=0.01)


@given(st.floats(min_value=8.2, max_value=11.3))
def test_a_typical_shape_has_about_the_stated_size(exponent: float) -> None:
    parameters = round(10**exponent)
    assert shape_from_params(parameters).parameters == pytest.approx(parameters, rel=0.1)


def test_no_parameters_are_no_model() -> None:
    with pytest.raises(PlanError):
        shape_from_params(0)
