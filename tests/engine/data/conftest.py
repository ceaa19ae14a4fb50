"""A tokenizer, and what rows become with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer_node.engine.data.examples import Examples
from trainer_node.engine.model.loading import load_tokenizer

START, END = 0, 1  # of the tiny model's texts


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def document(examples: Examples, index: int = 0) -> tuple[list[int], list[int]]:
    span = slice(examples.offsets[index], examples.offsets[index + 1])
    return examples.ids[span].tolist(), examples.labels[span].tolist()


def turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}
