"""Families from names, and rates with and without evidence."""

from __future__ import annotations

import pytest

from gateway.tables import Rate, Table, Tables, model_family


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "llama"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama"),
        ("lmsys/vicuna-7b-v1.5", "llama"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "qwen"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama"),
        ("deepseek-ai/deepseek-llm-7b-base", "deepseek"),
        ("mistralai/Mixtral-8x7B-v0.1", "mistral"),
        ("NousResearch/Hermes-2-Pro-Mistral-7B", "mistral"),
        ("HuggingFaceH4/zephyr-7b-beta", "mistral"),
        ("google/gemma-2-2b-it", "gemma"),
        ("microsoft/phi-2", "phi"),
        ("microsoft/Phi-3.5-mini-instruct", "phi"),
        ("cognitivecomputations/dolphin-2.9", "other"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm"),
        ("EleutherAI/gpt-neo-1.3B", "gpt-neo"),
        ("openai-community/gpt2", "gpt2"),
        ("facebook/opt-125m", "opt"),
        ("01-ai/Yi-6B", "yi"),
        ("meta-llama/finetune-7", "llama"),
        ("/models/qwen-local/", "qwen"),
        ("someone/adoption", "other"),
        ("", "other"),
    ],
)
def test_a_family_is_recognised_from_the_name(model: str, family: str) -> None:
    assert model_family(model) == family


def test_without_evidence_the_house_values_hold() -> None:
    tables = Tables()
    assert tables.task_weight.rate("DpoTask") == Rate(0.25, "house value for DpoTask")
    assert tables.model_performance.rate("llama").value == 0.75
    assert tables.task_success.rate("anything").value == 0.90


def test_what_was_learned_replaces_the_house_value_of_its_key_only() -> None:
    table = Table(0.75, {"llama": Rate(0.6, "12 results")})
    assert table.rate("llama") == Rate(0.6, "12 results")
    assert table.rate("qwen").value == 0.75
