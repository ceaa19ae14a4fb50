"""What a model's name says about its family and its size."""

from __future__ import annotations

import re

# Looked for in this order, in the name without the organisation first: the architecture decides how a model
# trains, so that DeepSeek-R1-Distill-Qwen-7B is a qwen, and meta-llama/CodeQwen would be one as well.
_WORDS = {
    "smollm": "smollm",
    "qwen": "qwen|qwq",
    "mistral": "mistral|mixtral|ministral|zephyr",
    "gemma": "gemma",
    "phi": r"(?<![a-z])phi(?![a-z])",
    "llama": "llama|vicuna",
    "falcon": "falcon",
    "pythia": "pythia",
    "bloom": "bloom",
    "olmo": "olmo",
    "granite": "granite",
    "stablelm": "stablelm",
    "gpt-neo": r"gpt[-_]?neo",
    "gpt2": r"gpt[-_]?2",
    "opt": r"(?<![a-z])opt(?![a-z])",
    "yi": r"(?<![a-z])yi(?![a-z])",
    "deepseek": "deepseek",
}
# One table for learned rates and for learning rates.
FAMILIES = {family: re.compile(words) for family, words in _WORDS.items()}

_SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d{1,3})x)?(\d{1,4}(?:\.\d{1,3})?)([bm])(?![a-z0-9])")
_EXPERTS = re.compile(
    r"(?<![a-z0-9.])(\d{1,3}x\d|a\d{1,3}(\.\d{1,3})?[bm](?![a-z0-9])|moe(?![a-z0-9])|olmoe|phimoe|jetmoe)"
)
# Published mixtures whose names don't state their experts.
_KNOWN_EXPERTS = re.compile(
    r"(?<![a-z0-9.])(deepseek-(coder-)?v[23]|dbrx|jamba|kimi-k2|glm-4\.[5-9](?!v)|minimax|dots\.llm1|solar-open"
    r"|mimo-v2|trinity|gpt-oss)"
)
# `stablelm-2-1_6b` means 1.6, `llama_2_7b` means 7: after a hyphen, an underscore is a decimal point.
_POINT = re.compile(r"(?<=-)(\d)_(\d)(?=[bm](?![a-z0-9]))")
# Published models whose names don't state their size; the first that is found counts.
_KNOWN = (
    ("gpt2-xl", 1.56e9),
    ("gpt2-large", 774e6),
    ("gpt2-medium", 355e6),
    ("distilgpt2", 82e6),
    ("gpt2", 124e6),
    ("phi-1", 1.42e9),  # and phi-1_5
    ("phi-2", 2.78e9),
    ("phi-3-mini", 3.82e9),
    ("phi-3.5-mini", 3.82e9),
    ("phi-3-small", 7.39e9),
    ("phi-3-medium", 14.0e9),
    ("phi-4-mini", 3.84e9),
    ("phi-4", 14.7e9),
    ("command-r-plus", 104e9),
    ("command-r", 35e9),
    ("mistral-nemo", 12.2e9),
    ("mistral-small", 23.6e9),
    ("mistral-large", 123e9),
    ("qwen1.5-moe", 14.3e9),
    ("deepseek-v2-lite", 15.7e9),
    ("deepseek-v2", 236e9),
    ("deepseek-v3", 671e9),
    ("starcoder", 15.5e9),
    ("bloom", 176e9),
    ("dbrx", 132e9),
)


def find_family(text: str) -> str | None:
    """Return the first family whose words are in a text in lower case; None if there is none."""
    return next((family for family, words in FAMILIES.items() if words.search(text)), None)


def parameters_from_name(model: str) -> int | None:
    """Return the parameter count that a model's name states or stands for, or None.

    `Qwen2.5-7B`, `SmolLM2-135M`, `Mixtral-8x7B`, `phi-2`. Of several sizes the largest counts:
    `Qwen3-30B-A3B` holds 30 billion, of which 3 are active.
    """
    name = _POINT.sub(r"\1.\2", model.lower()).replace("_", "-")
    sizes = [
        int(experts or 1) * float(size) * (1e9 if unit == "b" else 1e6)
        for experts, size, unit in _SIZE.findall(name)
    ]
    if sizes and max(sizes) >= 1:
        return round(max(sizes))
    last = name.rstrip("/").rpartition("/")[2]
    return next((round(size) for known, size in _KNOWN if last.startswith(known)), None)


def is_mixture(model: str) -> bool:
    """Return whether a model's name states experts, or stands for some.

    `Mixtral-8x7B`, `Qwen3-30B-A3B`, `OLMoE-1B-7B`, `DeepSeek-V2-Lite`.
    """
    name = model.lower().replace("_", "-")
    return _EXPERTS.search(name) is not None or _KNOWN_EXPERTS.search(name) is not None
