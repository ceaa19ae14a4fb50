"""Families from names, and from the configs of local copies."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.policy.model_family import (
    Families,
    LocalModel,
    config_family,
    family_of_copy,
    model_family,
    read_local_models,
)
from shared.planning.architectures import ModelFacts
from shared.settings_sources import load_settings


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


def test_a_config_names_the_architecture() -> None:
    assert config_family({"model_type": "qwen2"}) == "qwen"
    assert config_family({"model_type": "phi3"}) == "phi"
    assert config_family({"architectures": ["MistralForCausalLM"]}) == "mistral"
    assert config_family({"model_type": "new", "architectures": ["OPTForCausalLM"]}) == "opt"
    assert config_family({"model_type": "new"}) is None
    assert config_family({"model_type": 7, "architectures": [None, 3]}) is None
    assert config_family({"architectures": "LlamaForCausalLM"}) is None
    assert config_family({}) is None


@pytest.mark.parametrize(
    ("model", "model_type", "family"),
    [
        ("cognitivecomputations/dolphin-2.9", "llama", "llama"),  # the name says nothing
        ("someone/better-than-llama", "qwen2", "qwen"),  # the name is wrong
        ("HuggingFaceTB/SmolLM2-135M", "llama", "smollm"),  # a family of its own, built as a llama
        ("01-ai/Yi-6B", "llama", "yi"),
        ("EleutherAI/pythia-70m", "gpt_neox", "pythia"),
        ("google/gemma-2-2b", "a-new-word", "gemma"),
    ],
)
def test_the_config_is_right_except_where_the_name_is_finer(model: str, model_type: str, family: str) -> None:
    assert family_of_copy(model, {"model_type": model_type}) == family


def copy(folder: Path, config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


async def test_local_copies_are_looked_at_once(tmp_path: Path) -> None:
    models = tmp_path / "models"
    copy(models / "someone--dolphin", {"model_type": "qwen3"})
    copy(models / "Wolf", {"model_type": "gemma2"})
    copy(models / "broken-llama", "{")
    (models / "weights.gguf").write_text("x")
    named = copy(tmp_path / "elsewhere", {"model_type": "mistral"})
    settings = load_settings(
        {}, models_dir=str(models), models={"org/x": str(named), "org/qwen": str(models / "weights.gguf")}
    )
    families = Families(settings)
    assert families("someone/Dolphin") == "other"  # nothing was looked at yet
    await families.load()
    for folder in models.iterdir():  # from now on the disk is not asked
        folder.rename(tmp_path / folder.name)
    assert families("someone/Dolphin") == "qwen"
    assert families("anybody/wolf") == "gemma"
    assert families("org/x") == "mistral"
    assert families("org/broken-llama") == "llama"
    assert families("org/qwen") == "qwen"
    assert families("org/unheard-of") == "other"


async def test_a_local_copy_says_whether_it_can_be_trained(tmp_path: Path) -> None:
    models = tmp_path / "models"
    copy(models / "llama", {"model_type": "llama"})
    copy(models / "encoder", {"model_type": "bert"})
    copy(models / "small", {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}})
    (copy(models / "adapter", {}) / "config.json").rename(models / "adapter" / "adapter_config.json")
    families = Families(load_settings({}, models_dir=str(models)))
    assert families.facts("org/llama") is None  # nothing was looked at yet
    await families.load()
    refusals = {path.name: facts.refusal for path in models.iterdir() if (facts := families.facts(path.name))}
    assert refusals == {
        "llama": "",
        "encoder": "the engine is not known to train models of type 'bert'",
        "small": "its weights are quantised (gptq), which can't be trained",
        "adapter": "its folder holds an adapter without the model that it belongs to",
    }


async def test_a_folder_that_is_not_there_or_hangs_leaves_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings({}, models_dir=str(tmp_path / "nowhere"))
    assert read_local_models(settings) == {}
    monkeypatch.setattr("gateway.policy.model_family.READ_S", 0.05)
    released = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hang(_: Any) -> dict[str, LocalModel]:
        asyncio.run_coroutine_threadsafe(released.wait(), loop).result(30)
        return {"org/x": LocalModel("llama", ModelFacts())}

    monkeypatch.setattr("gateway.policy.model_family.read_local_models", hang)
    families = Families(settings)
    await families.load()
    released.set()
    assert families("org/x") == "other"
