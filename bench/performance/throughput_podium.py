"""Our side of bench.throughput, the matrix products, and the protocol between a side and the driver."""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness.dataset_types import SHAREGPT
from podium.demo.model import HOME
from shared.messages.offers import DatasetType, TaskType
from shared.planning.model_shape import ModulePlan
from shared.planning.plan import Plan
from trainer_node.engine.data.examples import IGNORED, Examples, tokenize
from trainer_node.engine.data.packing import Batch, collate, pack
from trainer_node.engine.distributed.sharding import decoder_layers
from trainer_node.engine.evaluate.metric import reference_logprobs
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.attention import attention_kwargs
from trainer_node.engine.model.fused_lora import unfuse_lora
from trainer_node.engine.model.label_model import LabelModel
from trainer_node.engine.model.loading import load_model, load_tokenizer
from trainer_node.engine.objectives import loss_for
from trainer_node.engine.train.cpu_threads import cpu_threads_for
from trainer_node.engine.train.optimizer import make_optimizer

SEED = 7
RANK, ALPHA = 16, 32.0
CAPACITY = 512  # tokens of our packs
LEARNING_RATE = 2e-4
DATA = Path(__file__).parents[2] / "examples" / "wordnet"
SQUARES = (512, 1024, 2048)  # sides of the matrix products that stand for the machine's best
TORCH_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
PAIRS = DatasetType(field_prompt="prompt", field_chosen="chosen", field_rejected="rejected")
PADDED_ROWS = 16  # of the ablation without packing: as many as a pack holds
WARM_STEPS = 2
now = time.process_time if os.environ.get("BENCH_CLOCK") == "cpu" else time.perf_counter

Step = Callable[[], int]  # one optimiser step; its real tokens


def say(**answer: float) -> None:
    """Send one answer to the driver."""
    print(json.dumps({"bench": answer}), flush=True)


def requests() -> Iterator[float]:
    """Yield the driver's requests, in seconds of work, until it stops; then report the peak memory."""
    say(ready=1)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        yield float(line)
    say(peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def serve(step: Step, extra_s_per_token: Callable[[], float] = lambda: 0.0) -> None:
    """Warm up, then work as asked; `extra_s_per_token` is the cost of a real token outside the step."""
    for _ in range(WARM_STEPS):
        step()
    for seconds in requests():
        extra = extra_s_per_token()
        tokens, began = 0, now()
        while (spent := now() - began) < seconds:
            tokens += step()
        say(rate=tokens / (spent + extra * tokens))


def gemm(dtype: str) -> None:
    """GFLOP/s of the best square matrix product."""
    kind = getattr(torch, TORCH_DTYPES[dtype])
    pairs = [(torch.randn(n, n, dtype=kind), torch.randn(n, n, dtype=kind)) for n in SQUARES]
    for a, b in pairs:
        a @ b
    for seconds in requests():
        rates = []
        for a, b in pairs:
            products, began = 0, now()
            # A mean over seconds, not one lucky product: what else the machine does hits every side alike.
            while (spent := now() - began) < seconds / len(pairs):
                a @ b
                products += 1
            rates.append(2 * len(a) ** 3 * products / spent / 1e9)
        say(rate=max(rates))


def examples_of(task: str) -> Examples:
    """Return the benchmark's examples, tokenised as the scorer does."""
    name, count, kind, columns = (
        ("chat_train.json", 2000, TaskType.CHAT, SHAREGPT)
        if task == "sft"
        else ("dpo_train.json", 96, TaskType.DPO, PAIRS)  # few: each side makes its reference pass
    )
    rows = json.loads((DATA / name).read_text())[:count]
    return tokenize(rows, kind, columns, load_tokenizer(str(HOME)), 4096)[0]


def our_plan(dtype: str, *, compiled: bool = False) -> Plan:
    """LoRA r 16 on all seven kinds of linear modules."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Plan(
        profile="bench",
        modules=[
            ModulePlan(
                name=name, in_features=0, out_features=0, count=30, method="lora", rank=RANK, alpha=ALPHA
            )
            for name in names
        ],
        dropout=0.0,
        lr_lora=LEARNING_RATE,
        lr_dense=0.0,
        max_length=4096,
        capacity=CAPACITY,
        packs_per_step=1,
        max_epochs=1.0,
        dtype=TORCH_DTYPES[dtype],
        parallel="single",
        devices=1,
        activation_checkpointing=False,
        compile=compiled,
        eval_batch=8,
        expected_tokens_per_s=0.0,
        expected_steps=0,
        reserve_s=0.0,
        memory_bytes=0,
    )


def ours(task: str, dtype: str, change: str = "") -> None:
    """Our step: collate, forward, backward, clip, AdamW; a DPO token also pays for its reference pass."""
    examples, plan = examples_of(task), our_plan(dtype, compiled=change == "compile")
    deltas = add_deltas(load_model(str(HOME), plan.dtype), plan, SEED)
    deltas.model.train()
    cpu_threads = cpu_threads_for(plan, deltas, torch.get_num_threads()) if change != "lanes" else None
    if change:
        apply(change, deltas)
    extra = lambda: 0.0  # noqa: E731
    if task == "dpo":
        examples = examples.with_reference(reference_logprobs(deltas.model, examples))
        sample = examples.take(range(32))

        def extra() -> float:
            began = now()
            reference_logprobs(deltas.model, sample)
            return (now() - began) / len(sample.ids)

    optimizer = make_optimizer(deltas, plan)
    loss_of = loss_for(TaskType.CHAT if task == "sft" else TaskType.DPO)
    every = [p for epoch in range(200) for p in pack(examples.lengths, CAPACITY, SEED, epoch)]
    packs: Iterator[Any] = iter(every)
    if change == "packing":
        packs = itertools.cycle(np.array_split(np.arange(len(examples)), len(examples) // PADDED_ROWS))

    def step() -> int:
        indices = next(packs)
        tokens = int(examples.lengths[indices].sum())
        rows, capacity = examples, CAPACITY
        if change == "packing":
            rows, indices = padded(examples, indices), list(range(len(indices)))
            capacity = len(rows.ids)
        shared = cpu_threads and cpu_threads.backward(deltas, loss_of, rows, indices, len(indices))
        if shared is None:
            (loss_of(deltas.model, collate(rows, indices, capacity)) / len(indices)).backward()
        torch.nn.utils.clip_grad_norm_(list(deltas.parameters.values()), plan.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return tokens

    serve(step, extra)


def padded(examples: Examples, indices: Any) -> Examples:
    """Return the rows as in a padded batch: each as long as the longest, the padding without labels."""
    rows = examples.take(indices)
    longest, count = int(rows.lengths.max()), len(rows)
    ids = np.zeros((count, longest), np.int32)
    labels = np.full((count, longest), IGNORED, np.int32)
    for row, (start, length) in enumerate(zip(rows.offsets, rows.lengths, strict=False)):
        ids[row, :length] = rows.ids[start : start + length]
        labels[row, :length] = rows.labels[start : start + length]
    return Examples(ids.ravel(), labels.ravel(), np.arange(count + 1, dtype=np.int64) * longest)


def apply(change: str, deltas: Deltas) -> None:
    """Change what of our step lies in the model; the other changes are made where they lie."""
    if change == "label_only":  # all T x V logits, as a stock model makes them

        def forward(self: LabelModel, batch: Batch, *, compared_states: bool = False) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                hidden = self.base.get_decoder()(
                    input_ids=batch.ids_T[None],
                    position_ids=batch.positions_T[None],
                    use_cache=False,
                    **attention_kwargs(batch),
                ).last_hidden_state[0]
                logits_TV = self.base.get_output_embeddings()(hidden).float()
            logp_TV = torch.log_softmax(logits_TV, 1)
            return logp_TV[batch.label_positions_N, batch.labels_N]

        LabelModel.forward = forward  # type: ignore[method-assign]
    elif change == "compile":
        for layer in decoder_layers(deltas.model):
            layer.compile()
    elif change == "fused_lora":
        unfuse_lora(deltas.network)
