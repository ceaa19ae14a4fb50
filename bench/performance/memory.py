"""Compare the planner's memory estimate with the peak of real training steps.

    python -m bench memory              # of a GPU, traced with fake tensors (`traced_memory`)
    python -m bench memory --measured   # of this machine's CPU, each case in a process: several minutes

The last line is one JSON object: `{"cases", "outside", "worst_error", "worst_case"}`; an error is
estimate / peak - 1, and those outside of -3% to +15% end with status 1.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

from msgspec.structs import replace

from shared.planning.hardware import parse_hardware
from shared.planning.memory_fit import estimate, layout_of, split
from shared.planning.model_shape import ModelShape
from shared.planning.plan import DataStats, Plan
from shared.planning.planner import make_plan
from shared.planning.profiles import resolve

SHAPES = {
    "smollm2-135m": ModelShape(
        hidden=576, layers=30, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, tied=True
    ),
    "wide-190m": ModelShape(
        hidden=1024, layers=8, intermediate=4096, heads=16, kv_heads=8, head_dim=64, vocab=32768, tied=False
    ),
    "qwen2.5-0.5b": ModelShape(
        hidden=896, layers=24, intermediate=4864, heads=14, kv_heads=2, head_dim=64, vocab=151936, tied=True
    ),
}
FIRST = next(iter(SHAPES))
LEAST, MOST = -0.03, 0.15  # of the peak: how far the estimate may be off
# profile, rank, capacity, checkpointing
CASES = {
    "dense": ("maximum_accuracy", 8192, 1024, False),
    "dense, checkpointing": ("maximum_accuracy", 8192, 1024, True),
    "LoRA 16": ("lora_r16", 16, 1024, False),
    "LoRA 128, dropout": ("maximum_accuracy", 128, 1024, False),
}


def plan_of(model: str, case: str) -> Plan:
    """Return the plan of one case, set to the case's rank, capacity and checkpointing."""
    profile, rank, capacity, checkpointing = CASES[case]
    shape, recipe = SHAPES[model], resolve(profile)
    rows = DataStats(examples=1000, tokens=100_000, label_tokens=50_000, max_length=capacity)
    plan = make_plan(recipe, shape, rows, parse_hardware("cpu-2x512GB"), 36_000)
    plan = replace(
        plan,
        modules=split(shape, recipe, rank),
        capacity=capacity,
        activation_checkpointing=checkpointing,
    )
    memory = estimate(shape, plan.modules, layout_of(plan, cpu=True), recipe.dropout)
    return replace(plan, memory_bytes=memory.total)


def peak(model: str, case: str) -> int:
    """Bytes this process held at most after training three packs."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from trainer_node.engine.data.examples import Examples
    from trainer_node.engine.data.packing import collate
    from trainer_node.engine.model.adapters import add_deltas
    from trainer_node.engine.model.attention import install
    from trainer_node.engine.objectives import sft

    plan, shape = plan_of(model, case), SHAPES[model]
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
    )
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    install(network)
    deltas = add_deltas(network, plan, 0)
    deltas.model.train()
    optimizer = torch.optim.AdamW(deltas.param_groups(plan), fused=True)
    length, count = plan.capacity // 8, 8
    ids = np.random.default_rng(0).integers(0, shape.vocab, count * length).astype(np.int32)
    labels = np.where(np.arange(count * length) % length < length // 2, -100, ids).astype(np.int32)
    examples = Examples(ids, labels, np.arange(0, count * length + 1, length))
    for _ in range(3):
        batch = collate(examples, range(count), plan.capacity, "cpu")
        sft.loss(deltas.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(list(deltas.parameters.values()), plan.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def traced() -> dict[str, float]:
    """Trace every case; return the errors."""
    from bench.performance.traced_memory import CASES as TRACED
    from bench.performance.traced_memory import estimated, traced_peak

    errors: dict[str, float] = {}
    for case in TRACED:
        memory = estimated(case)
        expected, found = memory.total - memory.process, traced_peak(case, plan_of(FIRST, "LoRA 16"))
        errors[case.name] = expected / found - 1
        sizes = f"{expected / 2**30:6.2f} GiB estimated, {found / 2**30:6.2f} traced"
        print(f"{case.name:46} {sizes}, {errors[case.name]:+.1%}", flush=True)
    return errors


def measured() -> dict[str, float]:
    """Measure every case in its own process; return the errors."""
    errors: dict[str, float] = {}
    for model in SHAPES:
        for case in CASES:
            command = [sys.executable, "-m", "bench.performance.memory", model, case]
            lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
            found: Any = json.loads(lines.strip().splitlines()[-1])
            expected = plan_of(model, case).memory_bytes
            errors[f"{model}, {case}"] = error = expected / found - 1
            sizes = f"{expected / 2**30:6.2f} GiB estimated, {found / 2**30:6.2f} measured"
            print(f"{model:14} {case:22} {sizes}, {error:+.1%}", flush=True)
    return errors


def main() -> int:
    """Compare all cases; return the exit status."""
    arguments = sys.argv[1:]
    if len(arguments) == 2:
        print(json.dumps(peak(*arguments)))
        return 0
    errors = measured() if arguments == ["--measured"] else traced()
    outside = [name for name, error in errors.items() if not LEAST <= error <= MOST]
    worst = max(errors, key=lambda name: abs(errors[name]))
    result = {
        "cases": len(errors),
        "outside": len(outside),
        "worst_error": round(errors[worst], 3),
        "worst_case": worst,
    }
    print(json.dumps(result))
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
