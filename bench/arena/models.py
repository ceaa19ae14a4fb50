"""The arena's base models: small decoders pre-trained from random weights on this machine's CPU.

python -m bench arena_models [--steps N] [--minutes M] [--models llama qwen3] [--force]

Each becomes an ordinary Hugging Face folder below the arena's cache, `models/NAME`: bfloat16 weights, a
byte-level BPE tokenizer with a chat template, and `pretraining.json`. The text is in pretraining_text.py.
The last line is one JSON object: `{"models": {name: {"folder", "parameters", "steps", "loss", ...}}}`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bench.arena.packages import cache_folder
from bench.arena.pretraining_text import pretraining_text
from shared.planning.hardware import computes_bf16, parse_hardware

VOCABULARY = 4096
END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTEXT = 256
BATCH = 8
PEAK_RATE = 2e-3
WARMUP_STEPS = 50
HELD_OUT = 0.01
MOST_POSITIONS = 2048

SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": MOST_POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def build(name: str) -> torch.nn.Module:
    """Return a model with random weights from seed 1."""
    torch.manual_seed(1)
    if name == "llama":
        config = LlamaConfig(
            **SHARED,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config)
    config = Qwen3Config(
        **SHARED,
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config)


MODELS = ("llama", "qwen3")


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on the texts."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, START_TURN, END_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=MOST_POSITIONS,
        additional_special_tokens=[START_TURN, END_TURN],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Return the tokens of all texts, each ended by the end token."""
    end = tokenizer.eos_token_id
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.array([token for text in encoded for token in (*text, end)], dtype=np.int64)


def batches(stream: np.ndarray, steps: int) -> Iterator[torch.Tensor]:
    """Yield batches of windows from random places; the same for the same stream."""
    dice = np.random.default_rng(2)
    for _ in range(steps):
        starts = dice.integers(0, len(stream) - CONTEXT, BATCH)
        yield torch.from_numpy(np.stack([stream[start : start + CONTEXT] for start in starts]))


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine to a tenth."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_RATE * (0.55 + 0.45 * math.cos(math.pi * done))


def loss_on(model: torch.nn.Module, stream: np.ndarray) -> float:
    """Return the mean token loss on up to 32 windows of a stream."""
    windows = [stream[at : at + CONTEXT] for at in range(0, len(stream) - CONTEXT + 1, CONTEXT)][:32]
    model.eval()
    with torch.no_grad():
        losses = [
            float(model(input_ids=ids, labels=ids).loss)
            for ids in (torch.from_numpy(window)[None] for window in windows)
        ]
    model.train()
    return sum(losses) / len(losses)


def pretrain(model: torch.nn.Module, stream: np.ndarray, steps: int, minutes: float) -> dict[str, Any]:
    """Train for `steps` steps; fewer if the first 20 show that they would take longer than `minutes`."""
    matrices = [one for one in model.parameters() if one.dim() > 1]
    vectors = [one for one in model.parameters() if one.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    started, planned, step = time.monotonic(), steps, 0
    fast = computes_bf16(parse_hardware("cpu"))
    for ids in batches(stream, steps):
        if step == 20:
            affordable = int(minutes * 60 / ((time.monotonic() - started) / step))
            planned = max(step, min(steps, affordable))
        if step >= planned:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(step, planned)
        # bfloat16 takes two thirds of the time on a CPU that has it, and 60 times as long on one that hasn't.
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0 or step == planned:
            spent = time.monotonic() - started
            print(f"  step {step}/{planned}  loss {float(loss.detach()):.3f}  {spent:.0f} s", flush=True)
    return {"steps": step, "tokens": step * BATCH * CONTEXT, "seconds": round(time.monotonic() - started, 1)}


def make(name: str, cache: Path, texts: list[str], steps: int, minutes: float) -> Path:
    """Pre-train one model and save it with its tokenizer; return the folder."""
    folder = cache / "models" / name
    held_out = max(1, int(len(texts) * HELD_OUT))
    tokenizer = train_tokenizer(texts)
    stream = token_stream(tokenizer, texts[held_out:])
    unseen = token_stream(tokenizer, texts[:held_out])
    model = build(name)
    facts: dict[str, Any] = {"parameters": sum(one.numel() for one in model.parameters())}
    print(
        f"{name}: {facts['parameters'] / 1e6:.2f} M parameters, {len(stream) / 1e6:.1f} M tokens", flush=True
    )
    facts |= {"initial_loss": round(loss_on(model, unseen), 4)} | pretrain(model, stream, steps, minutes)
    facts["loss"] = round(loss_on(model, unseen), 4)
    partial = cache / "models" / f".{name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def base_model(name: str, cache: Path) -> Path:
    """Return the folder of a pre-trained model; FileNotFoundError if it was not made yet."""
    folder = cache / "models" / name
    if not (folder / "pretraining.json").exists():
        raise FileNotFoundError(f"No base model {name} in {folder}: run `python -m bench arena_models`.")
    return folder


def main() -> None:
    """Make the models that the cache lacks and print what they are."""
    parser = argparse.ArgumentParser(prog="python -m bench arena_models", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=3000, help="steps of 2,048 tokens for each model")
    parser.add_argument("--minutes", type=float, default=10, help="most minutes for each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="make a model again that the cache has")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cache = cache_folder()
    texts: list[str] = []
    made: dict[str, Any] = {}
    for name in options.models:
        folder = cache / "models" / name
        if options.force or not (folder / "pretraining.json").exists():
            texts = texts or pretraining_text(cache)
            folder = make(name, cache, texts, options.steps, options.minutes)
        facts = json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))
        made[name] = {"folder": str(folder), **facts}
        print(
            f"{name}: loss {facts['initial_loss']} -> {facts['loss']} after {facts['steps']} steps",
            flush=True,
        )
    print(json.dumps({"models": made}))


if __name__ == "__main__":
    main()
