"""Model families by the words in a model's name: one table for learned rates and for learning rates."""

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
FAMILIES = {family: re.compile(words) for family, words in _WORDS.items()}


def find_family(text: str) -> str | None:
    """Return the first family whose words are in a text in lower case; None if there is none."""
    return next((family for family, words in FAMILIES.items() if words.search(text)), None)
