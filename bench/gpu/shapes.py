"""Models of the GPU suite: the sizes of well-known ones, with random weights; and rows of random tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from trainer_node.engine.data.examples import IGNORED, Examples

POSITIONS = 32768
MEAN_LENGTH = 300  # tokens of a row
LONGEST = 1024
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
SIZES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "smollm2-135m": (
        LlamaConfig,
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "vocab_size": 49152,
        },
    ),
    "qwen2.5-0.5b": (
        Qwen2Config,
        {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
    ),
    "qwen3-0.6b": (
        Qwen3Config,
        {
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    ),
    "llama-1b": (
        LlamaConfig,
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
        },
    ),
    "gemma3-1b": (
        Gemma3TextConfig,
        {
            "hidden_size": 1152,
            "num_hidden_layers": 26,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262144,
            "sliding_window": 512,
        },
    ),
    "llama-8b": (
        LlamaConfig,
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-14b": (
        Qwen3Config,
        {
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "intermediate_size": 17408,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": False,
        },
    ),
}


def config_of(name: str, *, dry: bool, layers: int | None = None) -> PretrainedConfig:
    """Return a model's configuration; a tiny one of the same kind if dry, with fewer layers if asked."""
    kind, sizes = SIZES[name]
    wanted = {"max_position_embeddings": POSITIONS, "tie_word_embeddings": True, **sizes}
    if layers is not None:
        wanted["num_hidden_layers"] = layers
    if dry:
        wanted |= TINY
    return kind(**wanted)


def random_rows(tokens: int, vocabulary: int, *, dry: bool, seed: int = 0) -> Examples:
    """Return rows of about `tokens` tokens in all, of log-normal lengths; their second half is scored."""
    random = np.random.default_rng(seed)
    mean, longest = (MEAN_LENGTH, LONGEST) if not dry else (24, 60)
    count = 2 + 2 * tokens // mean
    lengths = np.clip(mean * random.lognormal(-0.18, 0.6, count), 4, longest).astype(np.int64)
    lengths = lengths[: max(2, int(np.searchsorted(np.cumsum(lengths), tokens)))]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(3, vocabulary, int(offsets[-1])).astype(np.int32)
    labels = ids.copy()
    for start, length in zip(offsets, lengths, strict=False):
        labels[start : start + max(1, length // 2)] = IGNORED
    return Examples(ids, labels, offsets)
