"""Tiny random models of the real configuration classes, with biases that aren't 0 and norms that aren't 1."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bench.architectures.samples import DELTA_NET, PER_LAYER, RANDOM, SMALL, WINDOWED, Sample

ORACLE = Path(__file__).parents[2] / "tests" / "data" / "oracle" / "base"
# Wrappers around a text model: what differs from SMALL in the text model, and the other parts.
VISION = {"hidden_size": 32, "intermediate_size": 64}
TEXTS: dict[str, dict[str, Any]] = {
    "gemma3": WINDOWED,
    "gemma4": {**PER_LAYER, "global_head_dim": 16},
    "qwen3_5": DELTA_NET,
}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "vision_config": {
            **VISION,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 999,
        "boi_token_index": 998,
        "eoi_token_index": 997,
    },
    "gemma4": {
        "vision_config": {
            **VISION,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
        },
        "audio_config": None,
        "image_token_id": 999,
        "boi_token_id": 998,
        "eoi_token_id": 997,
        "audio_token_id": 996,
        "video_token_id": 995,
    },
    "qwen3_5": {
        "vision_config": {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4},
        "image_token_id": 999,
        "video_token_id": 998,
        "vision_start_token_id": 997,
        "vision_end_token_id": 996,
    },
}


def config_of(sample: Sample) -> Any:
    """The tiny configuration; a wrapper around a text model has one inside."""
    fields = {name: value for name, value in SMALL.items() if name not in sample.leave_out}
    kind = sample.model_type
    if kind in TEXTS:
        text = CONFIG_MAPPING[f"{kind}_text"](**fields, **RANDOM, **TEXTS[kind])
        return CONFIG_MAPPING[kind](text_config=text.to_dict(), **OTHERS[kind])
    return CONFIG_MAPPING[kind](**{**fields, **RANDOM, **sample.changes})


def build(sample: Sample) -> PreTrainedModel:
    """The tiny model with random weights; biases and scales of norms are moved away from 0 and 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(sample), dtype=torch.float32).eval()
        random = torch.Generator().manual_seed(1)
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and name.endswith(("bias", "norm.weight", "sinks")):
                weight.data.add_(torch.empty(weight.shape).normal_(0, 0.1, generator=random))
    return model


def write(sample: Sample, folder: Path) -> Path:
    """The tiny model as files, with the tokenizer of the scorer's oracle; returns `folder`."""
    build(sample).save_pretrained(folder)
    for path in ORACLE.glob("*token*.json"):
        shutil.copy(path, folder / path.name)
    return folder
