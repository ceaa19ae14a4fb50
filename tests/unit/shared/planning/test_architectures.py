"""What is refused by a model's config or by its name, with the reason."""

from __future__ import annotations

import pytest

from shared.planning.architectures import (
    Batching,
    ModelFacts,
    facts_from_config,
    facts_from_name,
    is_held_whole,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 1000,
}


@pytest.mark.parametrize(
    ("experts", "mixture"),
    [
        ({"num_local_experts": 8}, True),
        ({"n_routed_experts": 64}, True),
        ({"moe_num_experts": 64, "moe_k": 6}, True),
        ({"num_experts": [8, 16]}, True),
        ({"num_experts": 1}, False),
        ({"num_local_experts": 0}, False),
        ({"num_experts": None}, False),
    ],
)
def test_a_config_says_whether_there_are_experts(experts: dict[str, object], mixture: bool) -> None:
    for config in ({**LLAMA, **experts}, {"model_type": "gemma4", "text_config": {**LLAMA, **experts}}):
        facts = facts_from_config(config)
        assert (facts.experts, facts.whole, is_held_whole(config)) == (mixture, mixture, mixture)


def test_a_config_gives_size_and_batching() -> None:
    facts = facts_from_config(LLAMA)
    assert (facts.refusal, facts.batching) == ("", Batching.PACKED)
    assert facts.parameters == 2 * (4 * 64 * 64 + 3 * 64 * 128) + 2 * 64000 + 5 * 64
    assert facts_from_config({"model_type": "mamba"}) == ModelFacts("", Batching.PADDED, None)


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        ({**LLAMA, "model_type": "t5"}, "type 't5'"),
        ({}, "type ''"),
        ({**LLAMA, "model_type": "phimoe"}, "draws at random"),
        ({**LLAMA, "quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantised (awq)"),
        ({**LLAMA, "quantization_config": {"load_in_4bit": True}}, "quantised (by an unknown method)"),
    ],
)
def test_configs_that_are_refused(config: dict[str, object], refusal: str) -> None:
    assert refusal in facts_from_config(config).refusal


@pytest.mark.parametrize(
    "name",
    [
        "TheBloke/Llama-2-7B-GPTQ",
        "TheBloke/Mistral-7B-AWQ",
        "unsloth/Qwen2.5-7B-bnb-4bit",
        "org/model_4bit",
        "bartowski/gemma-2-9b-GGUF",
        "neuralmagic/Llama-3-8B-FP8",
        "google-bert/bert-base-uncased",
        "google/flan-t5-large",
        "openai/whisper-small",
        "Qwen/Qwen3-Embedding-0.6B",
        "FacebookAI/roberta-base",
        "openai/gpt-oss-20b",  # published in MXFP4 only, which its name doesn't say
        "deepseek-ai/DeepSeek-V3.1",
        "deepseek-ai/DeepSeek-R1-0528",
        "moonshotai/Kimi-K2-Instruct",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "meta-llama/Llama-3.2-11B-Vision-Instruct",
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "mistralai/Ministral-3-8B-Instruct-2512",
        "llava-hf/llava-1.5-7b-hf",
        "Qwen/Qwen2-Audio-7B",
        "HuggingFaceTB/SmolVLM-Instruct",
    ],
)
def test_names_that_are_refused(name: str) -> None:
    assert facts_from_name(name).refusal


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen2.5-7B-Instruct",
        "unsloth/Llama-3.2-1B",
        "bert-labs/llama-7b",  # who made it says nothing about what it is
        "org/robert-7b",
        "microsoft/phi-4",
        "EleutherAI/gpt-neox-20b",
        "tiiuae/Falcon3-7B-Base",
        "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF",
        "unsloth/gpt-oss-20b-BF16",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        "deepseek-ai/DeepSeek-V2-Lite",
        "mistralai/Ministral-8B-Instruct-2410",
        "mistralai/Mistral-Small-24B-Instruct-2501",
        "vision-lab/llama-7b",
        "",
    ],
)
def test_names_that_are_not(name: str) -> None:
    facts = facts_from_name(name)
    assert (facts.refusal, facts.batching) == ("", Batching.PACKED)


@pytest.mark.parametrize(
    "name",
    ["tiiuae/falcon-7b", "bigscience/bloom-560m", "EleutherAI/gpt-neo-1.3B", "state-spaces/mamba-130m-hf"],
)
def test_names_of_models_whose_documents_need_rows_of_their_own(name: str) -> None:
    assert facts_from_name(name).batching is Batching.PADDED
