"""Compare dense deltas with LoRA of the same freedom: factors as large as the matrix.

    python -m bench dense_vs_lora      # --quick: two seeds, no SmolLM2

The rank is in*out/(in+out) in every linear module: as many trained weights as a dense delta. The tiny oracle
model runs with several seeds, each method at the best of its own learning rates (found on a seed that isn't
counted). SmolLM2 runs a few steps at the house's rates, each method in a separate process, in turns, for its
speed (in CPU seconds, on one thread) and peak memory. For SmolLM2's dense deltas the bench also measures the
loss of a lower rank, and the score of each form of export. SmolLM2 trains in bf16 if the CPU has bf16
instructions, else in fp32. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace

from bench.evaluator.compat import KINDS, WORDNET
from bench.harness import tiny_jobs
from bench.performance.throughput_podium import our_plan
from podium.demo.model import HOME
from shared.messages.runs import Metrics, WorkerJob, decode_worker_job
from shared.planning.hardware import computes_bf16, parse_hardware
from shared.planning.model_shape import ModulePlan
from shared.planning.plan import Plan
from shared.planning.profiles import dense_rate, lora_rate
from trainer_node.engine.data.examples import Examples, tokenize
from trainer_node.engine.data.held_out import hold_out
from trainer_node.engine.data.packing import collate, pack
from trainer_node.engine.evaluate.metric import score
from trainer_node.engine.export import dense_as_lora, writer
from trainer_node.engine.model.adapters import Deltas, add_deltas, load_adapter
from trainer_node.engine.model.loading import load_config, load_model, load_tokenizer
from trainer_node.engine.model.shape import model_shape
from trainer_node.engine.objectives import sft
from trainer_node.engine.train.optimizer import make_optimizer

METHODS = ("dense", "lora")
ALPHA = 32.0
FACTORS = {
    "dense": (1.0, 3.0, 10.0, 30.0),
    "lora": (0.3, 1.0, 3.0, 10.0),
}  # of the house's rate, on the tiny model
SEEDS, TINY_STEPS, TINY_CAPACITY = 5, 120, 256
SMOL_DTYPE = "bfloat16" if computes_bf16(parse_hardware("cpu")) else "float32"
SMOL_STEPS, SMOL_CAPACITY, SMOL_DEV, LAYERS = 8, 512, 48, (0, 14, 29)
WARMUP = 3  # steps that don't count for the speed


def plan_of(model: Path, method: str, dtype: str, capacity: int, factor: float = 1.0) -> Plan:
    """Return all seven kinds of modules by one method, LoRA at the break-even rank."""
    shape = model_shape(load_config(str(model)))
    modules = []
    for linear in shape.linears:
        size = linear.in_features * linear.out_features
        rank = math.ceil(size / (linear.in_features + linear.out_features)) if method == "lora" else 0
        modules.append(
            ModulePlan(
                name=linear.name,
                in_features=linear.in_features,
                out_features=linear.out_features,
                count=linear.count,
                method=method,
                rank=rank,
                alpha=ALPHA if rank else 0.0,
            )
        )
    return replace(
        our_plan("fp32" if dtype == "float32" else "bf16"),
        modules=modules,
        capacity=capacity,
        lr_lora=factor * lora_rate(shape.family, shape.hidden, ALPHA),
        lr_dense=factor * dense_rate(shape.family, shape.hidden),
    )


def train(deltas: Deltas, plan: Plan, examples: Examples, steps: int, seed: int) -> float:
    """`steps` steps of one pack, the rate falling to zero; tokens per CPU second after the first few."""
    deltas.model.train()
    optimizer = make_optimizer(deltas, plan)
    packs = [p for epoch in range(50) for p in pack(examples.lengths, plan.capacity, seed, epoch)]
    tokens, began = 0, time.process_time()
    for step, indices in enumerate(packs[:steps]):
        if step == WARMUP:
            tokens, began = 0, time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 - step / steps)
        batch = collate(examples, indices, plan.capacity)
        (sft.loss(deltas.model, batch) / batch.examples).backward()
        torch.nn.utils.clip_grad_norm_(list(deltas.parameters.values()), plan.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += batch.tokens
    return tokens / (time.process_time() - began)


def rows_of(model: Path, kind: str, count: int) -> tuple[Examples, Examples]:
    """Training and held-out rows of WordNet."""
    task_type, columns, name = KINDS[kind]
    rows = json.loads((WORDNET / name).read_text())[:count]
    return hold_out(tokenize(rows, task_type, columns, load_tokenizer(str(model)), 256)[0], 0)


# --- the tiny model: the same loss?


def tiny_loss(method: str, factor: float, seed: int, rows: tuple[Examples, Examples]) -> float:
    """Held-out loss of one run in fp32."""
    plan = plan_of(tiny_jobs.MODEL, method, "float32", TINY_CAPACITY, factor)
    deltas = add_deltas(load_model(str(tiny_jobs.MODEL), "float32"), plan, seed)
    train(deltas, plan, rows[0], TINY_STEPS, seed)
    return score(deltas.model, rows[1]).loss


def tiny_part(seeds: int) -> dict[str, Any]:
    """Return both methods' losses over seeds, at the best rate of each."""
    rows = rows_of(tiny_jobs.MODEL, "instruct", 1500)
    losses: dict[str, list[float]] = {}
    for method in METHODS:
        tried = {factor: tiny_loss(method, factor, 1000, rows) for factor in FACTORS[method]}
        best = min(tried, key=lambda factor: tried[factor])
        losses[method] = [tiny_loss(method, best, seed, rows) for seed in range(seeds)]
        mean, spread = statistics.mean(losses[method]), statistics.stdev(losses[method])
        rates = ", ".join(f"{factor:g}: {loss:.4f}" for factor, loss in tried.items())
        print(f"tiny {method:6} {mean:.4f} +- {spread:.4f} at rate x {best:g} (tried {rates})", flush=True)
    difference = [d - f for d, f in zip(losses["dense"], losses["lora"], strict=True)]
    error = statistics.stdev(difference) / math.sqrt(seeds)
    print(f"tiny dense less LoRA: {statistics.mean(difference):+.4f}, standard error {error:.4f}", flush=True)
    return {
        **{f"tiny_{method}_loss": round(statistics.mean(losses[method]), 4) for method in METHODS},
        "tiny_spread": round(statistics.stdev(losses["lora"]), 4),
        "tiny_difference": round(statistics.mean(difference), 4),
        "tiny_standard_error": round(error, 4),
    }


# --- SmolLM2: speed, memory, rank, forms of export


def smol_side(method: str, *, forms: bool) -> dict[str, float]:
    """Run one method in this process."""
    train_rows, dev = rows_of(HOME, "chat", 1000)
    dev = dev.take(np.arange(SMOL_DEV))
    plan = plan_of(HOME, method, SMOL_DTYPE, SMOL_CAPACITY)
    deltas = add_deltas(load_model(str(HOME), SMOL_DTYPE), plan, 0)
    answer = {"rate": train(deltas, plan, train_rows, SMOL_STEPS, 0)}
    answer["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answer["loss"] = score(deltas.model, dev).loss
    if forms and method == "dense":
        answer |= ranks(deltas) | exports(deltas, plan, dev)
    return answer


def ranks(deltas: Deltas) -> dict[str, float]:
    """Return the share of a dense delta that its best approximation at the break-even rank loses."""
    before = load_model(str(HOME), SMOL_DTYPE).state_dict()
    lost, full = [], []
    for name, weight in deltas.parameters.items():
        if int(name.split(".")[2]) in LAYERS:
            delta = (weight.detach() - before[name].float()).double()
            sizes = torch.linalg.svdvals(delta).square()
            rank = math.ceil(delta.numel() / sum(delta.shape))
            lost.append(float((sizes[rank:].sum() / sizes.sum()).sqrt()))
            # Numerical rank: the directions that must stay for 0.1% of the size.
            left = (sizes.flip(0).cumsum(0).flip(0) / sizes.sum()).sqrt()
            full.append(int((left > 1e-3).sum()) / len(sizes))
    return {"lost_at_break_even": statistics.median(lost), "numerical_rank_share": min(full)}


def exports(deltas: Deltas, plan: Plan, dev: Examples) -> dict[str, float]:
    """Held-out loss and size of the whole model (exported in bf16) and of an adapter with exact factors."""
    answer: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        job = job_in(Path(name))
        for form, worth in (("model", 0.0), ("adapter", 9.0)):
            dense_as_lora.WORTH = dict.fromkeys(dense_as_lora.WORTH, worth)
            folder = Path(name) / form
            answer[f"{form}_mb"] = writer.write(deltas, plan, job, Metrics(base_loss=0.0), folder).bytes / 1e6
            if form == "model":
                network: Any = load_model(str(folder), SMOL_DTYPE)
            else:
                network = load_adapter(load_model(str(HOME), SMOL_DTYPE), str(folder))
            answer[f"{form}_loss"] = score(network, dev).loss
            del network
    return answer


def job_in(folder: Path) -> WorkerJob:
    """Write a job that names SmolLM2 as its base."""
    path = tiny_jobs.write_job(folder / "job", folder, model_path=str(HOME))
    return decode_worker_job(path.read_bytes())


def smol_part(rounds: int) -> dict[str, Any]:
    """Run both methods in turns; return medians."""
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for turn in range(rounds):
        for method in METHODS:
            command = [sys.executable, "-m", "bench.performance.dense_vs_lora", "--side", method]
            command += ["--forms"] if turn == 0 else []
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=900).stdout
            found[method].append(json.loads(lines.splitlines()[-1]))
            print(f"smollm2 {method:6} {found[method][-1]}", flush=True)
    middle = {
        method: {key: statistics.median(turn[key] for turn in turns) for key in ("rate", "peak_mb", "loss")}
        for method, turns in found.items()
    }
    forms = {key: value for key, value in found["dense"][0].items() if key not in middle["dense"]}
    return {
        "speed_ratio": round(middle["dense"]["rate"] / middle["lora"]["rate"], 2),
        "peak_memory_ratio": round(middle["dense"]["peak_mb"] / middle["lora"]["peak_mb"], 2),
        **{f"smollm2_{method}_loss": round(middle[method]["loss"], 4) for method in METHODS},
        **{f"smollm2_{method}_tokens_per_s": round(middle[method]["rate"], 1) for method in METHODS},
        **{f"smollm2_{method}_peak_mb": round(middle[method]["peak_mb"]) for method in METHODS},
        **{key: round(value, 5) for key, value in forms.items()},
    }


def main() -> None:
    """Run the bench, or one side of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=2, help="of SmolLM2")
    parser.add_argument("--side", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--forms", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.side:
        print(json.dumps(smol_side(args.side, forms=args.forms)))
        return
    answer = tiny_part(2 if args.quick else SEEDS)
    if not args.quick:
        answer |= smol_part(args.rounds) | {"smollm2_dtype": SMOL_DTYPE}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
