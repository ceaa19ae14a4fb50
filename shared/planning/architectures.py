"""What the engine can train: one list of architectures, which the gateway asks before it accepts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from msgspec import Struct

from shared.errors import PlanError
from shared.planning.model_name import is_mixture
from shared.planning.model_shape import experts_of, shape_from_config


class Batching(StrEnum):
    """How documents are put together for one pass of a model."""

    PACKED = "packed"  # one after the other in a row, attention kept within each
    PADDED = "padded"  # one in each row, filled up to the longest: slower, and right for any causal model


_PACKED = """
afmoe apertus arcee biogpt bitnet cohere cohere2 ctrl cwm deepseek_v2 deepseek_v3 diffllama dots1 ernie4_5
ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text
glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax internlm3 iquestcoder jais2 jetmoe llama
mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mixtral nanochat olmo olmo2 olmo3 olmoe opt
persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2 vaultgemma
"""
_PADDED = """
bamba bloom codegen falcon falcon_h1 falcon_mamba gpt_neo gpt_neox_japanese gptj granitemoehybrid jamba lfm2
lfm2_moe mamba mamba2 minimax mpt nemotron nemotron_h olmo_hybrid openai-gpt qwen3_5 qwen3_5_moe_text
qwen3_5_text qwen3_next recurrent_gemma rwkv stablelm xglm
"""
# By `model_type`. Each passes whole jobs in `python -m bench models`, batched like this.
ARCHITECTURES: dict[str, Batching] = {
    **dict.fromkeys(_PACKED.split(), Batching.PACKED),
    **dict.fromkeys(_PADDED.split(), Batching.PADDED),
}

REFUSED = {"phimoe": "its router draws at random while it trains, and gives other numbers without"}

LARGEST_CONFIG = 1 << 20  # bytes of a config.json
MOST_PARTS = 4096  # layers, or experts of a layer; the largest known models have 200 and 2,048
_PARTS = re.compile(r"(?:layers?|experts)$")

# Parts of names, between anything but letters and digits.
_QUANTISED = """
gptq awq bnb 4bit 8bit int4 int8 nf4 fp8 nvfp4 mxfp4 w4a16 w8a8 exl2 exl3 mlx gguf hqq aqlm onnx openvino
"""
# Published only in weights that are quantised, which their names don't say.
_QUANTISED_ONLY = r"""
gpt-oss deepseek-v3(?:\.\d)? deepseek-r1(?!.*distill) kimi-k2(?:\.\d)? minimax-m2(?:\.\d)?
"""
_OTHER_KINDS = r"""
bert roberta deberta albert distilbert modernbert electra t5 mt5 bart mbart pegasus whisper clip siglip
wav2vec2 vit embed embedding embeddings reranker sdxl flux stable-diffusion vl vlm smolvlm internvl llava
pixtral paligemma idefics\d? moondream vision omni audio ocr tts mistral-small-(?:3\.[12]|4) ministral-3
"""
_PADDED_FAMILIES = """
bloom codegen falcon(?!-?3) gpt-?neo(?!-?x) gpt-?j jamba lfm2 mamba mpt ^nemotron ^minitron stablelm
recurrentgemma zamba
"""


def _words(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z0-9])(?:{'|'.join(words.split())})(?![a-z0-9])")


_QUANTISED_NAME, _OTHER_NAME = _words(_QUANTISED), _words(_OTHER_KINDS)
_QUANTISED_MODEL, _PLAIN_NAME = _words(_QUANTISED_ONLY), _words("bf16 fp16")
_PADDED_NAME = re.compile("|".join(_PADDED_FAMILIES.split()))


class ModelFacts(Struct, frozen=True):
    """What is known about a model without its weights."""

    refusal: str = ""  # why the engine can't train it; empty: it can
    batching: Batching = Batching.PACKED
    parameters: int | None = None
    experts: bool = False  # a layer has several, and a token meets some of them

    @property
    def whole(self) -> bool:
        """Return whether each device should hold all of it: a mixture of experts, or one in padded rows.

        The engine doesn't cut the latter over several devices.
        """
        return self.experts or self.batching is Batching.PADDED


def is_held_whole(config: Mapping[str, Any]) -> bool:
    """Return whether each device should hold all of a model, by its `config.json`; see `ModelFacts.whole`."""
    batching = ARCHITECTURES.get(str(config.get("model_type", "")), Batching.PACKED)
    return ModelFacts(batching=batching, experts=experts_of(config) > 1).whole


def facts_from_config(config: Mapping[str, Any]) -> ModelFacts:
    """Return what a model's `config.json` says."""
    model_type = str(config.get("model_type", ""))
    if refusal := why_not(config):
        return ModelFacts(refusal)
    if model_type not in ARCHITECTURES:
        return ModelFacts(f"the engine is not known to train models of type {model_type[:40]!r}")
    try:
        parameters = shape_from_config(config).parameters
    except PlanError:
        parameters = None  # the config uses names that only its own code reads
    return ModelFacts("", ARCHITECTURES[model_type], parameters, experts_of(config) > 1)


def facts_from_name(model: str) -> ModelFacts:
    """Return what a model's name says, where there is no more than that."""
    name = model.rpartition("/")[2].lower().replace("_", "-")
    if found := _QUANTISED_NAME.search(name):
        return ModelFacts(f"its name says {found[0]!r}, and quantised weights can't be trained")
    if (found := _QUANTISED_MODEL.search(name)) and not _PLAIN_NAME.search(name):
        return ModelFacts(f"{found[0]!r} is published in quantised weights only, which can't be trained")
    if found := _OTHER_NAME.search(name):
        return ModelFacts(f"its name says {found[0]!r}, which is no causal language model")
    batching = Batching.PADDED if _PADDED_NAME.search(name) else Batching.PACKED
    return ModelFacts("", batching, experts=is_mixture(name))


def why_not(config: Mapping[str, Any]) -> str | None:
    """Return why a model can't be trained, by its config alone; None if it can, or if it has to be tried."""
    return _quantised(config) or REFUSED.get(str(config.get("model_type", ""))) or _oversized(config)


def _oversized(config: Mapping[str, Any]) -> str | None:
    """Return why a config can't be a real model's: to build as many modules as it names would take hours."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            if refusal := _oversized(value):
                return refusal
        elif isinstance(value, int) and value > MOST_PARTS and _PARTS.search(str(name)):
            return f"its config says {name} is {value:.6g}, and more than {MOST_PARTS:,} can't be trained"
    return None


def _quantised(config: Mapping[str, Any]) -> str | None:
    """Return why a model with quantised weights can't be trained; None for any other."""
    how = config.get("quantization_config")
    if not how:
        return None
    method = how.get("quant_method") if isinstance(how, Mapping) else None
    return f"its weights are quantised ({method or 'by an unknown method'}), which can't be trained"
