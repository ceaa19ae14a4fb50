"""Texts to token ids in several calls of the tokenizer, none of which takes more memory than there may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer_node.engine import limits
from trainer_node.engine.data import token_ids as module
from trainer_node.engine.data.token_ids import CALL_SIZE, TEXT_SIZE, calls, token_ids
from trainer_node.engine.model.loading import load_tokenizer

MIB = 1 << 20


def test_no_text_is_no_call() -> None:
    assert list(calls([])) == []


def test_a_call_has_its_size_or_one_text() -> None:
    half = "a" * (CALL_SIZE // 2 - TEXT_SIZE)
    texts = [half, half, "b", "a" * CALL_SIZE, "c", "d"]
    found = list(calls(texts))
    assert [some for _, some in found] == [texts[:2], texts[2:3], texts[3:4], texts[4:]]
    sizes = [CALL_SIZE, TEXT_SIZE + 1, CALL_SIZE + TEXT_SIZE, 2 * (TEXT_SIZE + 1)]
    assert [size for size, _ in found] == sizes


def test_a_text_counts_by_its_bytes() -> None:
    assert [size for size, _ in calls(["\u4e00\ud800"])] == [TEXT_SIZE + 6]


def test_several_calls_say_what_one_says(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    texts = ["a text", "", "one of more words than fit"] * 5
    one = token_ids(tokenizer, texts, truncation=True, max_length=4)
    monkeypatch.setattr(module, "CALL_SIZE", 20)
    assert len(list(calls(texts))) > 5
    assert token_ids(tokenizer, texts, truncation=True, max_length=4) == one
    assert [len(ids) for ids in one] == [min(4, len(tokenizer(text)["input_ids"])) for text in texts]


def test_many_texts_need_the_memory_of_one_call(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    texts = ["ab " * 10_000] * 100
    with limits.memory_limit(200 * MIB):
        with pytest.raises(MemoryError):
            token_ids(tokenizer, texts)
        monkeypatch.setattr(module, "CALL_SIZE", 100_000)
        assert len(token_ids(tokenizer, texts, truncation=True, max_length=9)) == 100


def test_a_text_too_long_is_no_abort(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    with limits.memory_limit(200 * MIB), pytest.raises(MemoryError):
        token_ids(tokenizer, ["ab " * 10_000_000])
