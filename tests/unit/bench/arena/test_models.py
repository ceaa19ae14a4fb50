"""The arena's base models: text that repeats no test row, the tokenizer, sizes, and that training learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.arena import models
from bench.arena.pretraining_text import PASSAGE_BYTES, Guard, passages
from bench.arena.rows import Row

SENTENCE = "the small grey cat sat on the old red mat near the door"
TEXTS = [f"{SENTENCE}, and number {number} was not there." for number in range(200)]


def test_passages_keep_every_paragraph() -> None:
    text = "\n\n".join(f"paragraph {number} " + "word " * 50 for number in range(40))
    pieces = list(passages(text))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(len(piece) < 2 * PASSAGE_BYTES for piece in pieces)


def test_the_guard_refuses_pieces_of_test_rows() -> None:
    guard = Guard([Row("Say it", SENTENCE), Row("Translate", "eine kurze Antwort hier")])
    assert not guard.passes(f"So {SENTENCE.upper()}!")
    assert guard.passes("the small grey cat sat near the door")
    assert not guard.passes_row(Row("Translate", "x"))
    assert not guard.passes_row(Row("Other", "eine kurze Antwort hier"))
    assert guard.passes_row(Row("Other", "something else"))


def test_the_tokenizer_keeps_any_text_and_has_a_template() -> None:
    tokenizer = models.train_tokenizer(TEXTS, 400)
    for text in ("na\u00efve \u732b \U0001f642", "  two  spaces\n\ttab"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turn = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", models.MODELS)
def test_the_models_have_two_to_five_million_parameters(name: str) -> None:
    assert 2e6 <= sum(one.numel() for one in models.build(name).parameters()) <= 5e6


def test_the_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [models.rate(step, 500) for step in range(501)]
    assert max(rates) == pytest.approx(models.PEAK_RATE)
    assert rates[0] < rates[20] < rates[49]
    assert rates[500] == pytest.approx(models.PEAK_RATE / 10)


def test_a_made_model_loads_and_has_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "CONTEXT", 32)
    monkeypatch.setattr(models, "BATCH", 4)
    monkeypatch.setattr(models, "WARMUP_STEPS", 3)
    with pytest.raises(FileNotFoundError, match="arena_models"):
        models.base_model("llama", tmp_path)
    folder = models.make("llama", tmp_path, TEXTS, steps=12, minutes=1)
    assert folder == models.base_model("llama", tmp_path)
    facts = json.loads((folder / "pretraining.json").read_text())
    assert facts["steps"] == 12
    assert facts["loss"] < facts["initial_loss"] - 1
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(folder).chat_template == models.CHAT_TEMPLATE
