"""Families, sizes and experts in models' names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.planning.model_name import find_family, is_mixture, parameters_from_name


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
        ("org/phi-3-mini-4k-instruct", 3.82e9),
        ("gpt2", 124e6),
        ("openai-community/gpt2-xl", 1.56e9),
        ("stabilityai/stablelm-2-1_6b", 1.6e9),
        ("org/llama_2_7b", 7e9),
        ("microsoft/phi-1_5", 1.42e9),
        ("someone/my-gpt2", None),
        ("org/model-0B", None),
        ("", None),
    ],
)
def test_sizes_in_names(name: str, parameters: float | None) -> None:
    assert parameters_from_name(name) == parameters


@pytest.mark.parametrize(
    ("name", "mixture"),
    [
        ("Mixtral-8x7B", True),
        ("Qwen3-30B-A3B", True),
        ("OLMoE-1B-7B", True),
        ("Qwen1.5-MoE-A2.7B", True),
        ("granite-3.1-3b-a800m-instruct", True),
        ("DeepSeek-V2-Lite", True),
        ("DeepSeek-Coder-V2-Lite-Instruct", True),
        ("jetmoe-8b", True),
        ("GLM-4.5-Air", True),
        ("GLM-4-32B-0414", False),
        ("deepseek-coder-6.7b-base", False),
        ("DeepSeek-R1-Distill-Qwen-7B", False),
        ("Qwen2.5-7B", False),
        ("alpha-a100", False),
    ],
)
def test_mixtures_by_name(name: str, mixture: bool) -> None:
    assert is_mixture(name) is mixture


@given(st.text(max_size=512))
def test_any_name_is_read_without_an_error(name: str) -> None:
    size = parameters_from_name(name)
    assert size is None or size >= 1


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("llama-3.2-1b-instruct", "llama"),
        ("deepseek-r1-distill-qwen-7b", "qwen"),
        ("smollm2-135m", "smollm"),
        ("qwq-32b", "qwen"),
        ("gpt_neox", "gpt-neo"),
        ("yi-6b", "yi"),
        ("adoption", None),
        ("", None),
    ],
)
def test_the_first_family_in_the_text_is_found(text: str, family: str | None) -> None:
    assert find_family(text) == family
