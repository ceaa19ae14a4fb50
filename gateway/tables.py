"""The three learned rates of the house policy, at house values until there is evidence."""

from __future__ import annotations

import re

from msgspec import Struct, field

# Looked for in this order, in the name without the organisation first: the architecture decides how a model
# trains, so that DeepSeek-R1-Distill-Qwen-7B is a qwen, and meta-llama/CodeQwen would be one as well.
_FAMILIES = (
    ("smollm", "smollm"),
    ("qwen|qwq", "qwen"),
    ("mistral|mixtral|ministral|zephyr", "mistral"),
    ("gemma", "gemma"),
    (r"(?<![a-z])phi(?![a-z])", "phi"),
    ("llama|vicuna", "llama"),
    ("falcon", "falcon"),
    ("pythia", "pythia"),
    ("bloom", "bloom"),
    ("olmo", "olmo"),
    ("granite", "granite"),
    ("stablelm", "stablelm"),
    (r"gpt[-_]?neo", "gpt-neo"),
    (r"gpt[-_]?2", "gpt2"),
    (r"(?<![a-z])opt(?![a-z])", "opt"),
    (r"(?<![a-z])yi(?![a-z])", "yi"),
    ("deepseek", "deepseek"),
)
_PATTERNS = tuple((re.compile(pattern), family) for pattern, family in _FAMILIES)


def model_family(model: str) -> str:
    """A model's family from its upstream id or path, such as `llama`; `other` if none is recognised."""
    name = model.lower().rstrip("/").rpartition("/")[2]
    for text in (name, model.lower()):
        for pattern, family in _PATTERNS:
            if pattern.search(text):
                return family
    return "other"


class Rate(Struct, frozen=True):
    """One rate in 0..1 and where it comes from."""

    value: float
    cause: str


class Table(Struct, frozen=True):
    """Rates by key; a key without evidence has the house value."""

    house: float
    learned: dict[str, Rate] = {}

    def rate(self, key: str) -> Rate:
        """The rate of `key`."""
        return self.learned.get(key) or Rate(self.house, f"house value for {key}")


class Tables(Struct, frozen=True, kw_only=True):
    """Everything the house policy learns."""

    task_weight: Table = field(default_factory=lambda: Table(0.25))  # by task type
    model_performance: Table = field(default_factory=lambda: Table(0.75))  # by model family
    task_success: Table = field(default_factory=lambda: Table(0.90))  # by task type
