"""Real tokens per second of our training step against TRL's, and against this machine's matrix products.

    python -m bench throughput --against trl [--dtype bf16|fp32] [--task sft|dpo] [--rounds 3]
    [--seconds 2]
    python -m bench throughput --ablate [--dtype ...]

`--threads 1 --clock cpu` counts each process's own CPU seconds instead of the wall's: on a machine that
others load too, barriers between threads make wall times meaningless.

SmolLM2-135M (converted by `make setup`), LoRA r 16 on all seven kinds of linear modules, no dropout, AdamW
fused, clip 1, examples/wordnet. Every side is a process of its own, so that its peak memory is its own; they
take turns, one round each, and medians over the rounds are compared. TRL's side is the best of several
settings (bench/performance/throughput_trl.py). The last line is one JSON object:

sft_ratio, dpo_ratio: our real (non-padding) tokens/s over TRL's; gemm_share: 4 N FLOPs per real token, N the
weights of all linear modules and the head (134.5 M), times our tokens/s, over the best square matrix product;
peak_memory_ratio: our peak resident memory in SFT over that of TRL's fastest setting. Each also by dtype; the
plain name is the worse of the two dtypes, and fp32 for gemm_share. A DPO step carries its reference pass.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from statistics import median
from typing import Any

from podium.demo.model import HOME

TORCH_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
THREADS = 2
# What is switched off, alone, in the ablation; `compile` is what is switched on, and with it the lanes off.
CHANGES = ("", "packing", "label_only", "lanes", "fused_lora", "bf16", "compile")


# --- the driver


class Side:
    """One process under measurement: it works only between a `round` and its answer."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.name = " ".join(str(value) for key, value in spec.items() if key not in ("task", "dtype"))
        self.rates: list[float] = []
        self.peak_mb = 0.0
        command = [sys.executable, "-m", "bench.performance.throughput", "--side", json.dumps(spec)]
        # Threads that spin at a barrier would take the core from the one that they wait for.
        threads = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": os.environ["BENCH_THREADS"]}
        quiet = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, **quiet},
        )

    def warm(self) -> None:
        """Wait until it has made its first steps."""
        self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"bench"'):
                answer: dict[str, float] = json.loads(line)["bench"]
                return answer
        raise SystemExit(f"bench: {self.name} ended early, exit code {self.process.wait()}")

    def _ask(self, line: str) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def round(self, seconds: float) -> None:
        """Let it work for about `seconds`."""
        self.rates.append(self._ask(str(seconds))["rate"])

    def end(self) -> None:
        """Read its last line, its peak memory."""
        self.peak_mb = self._ask("end")["peak_mb"]
        self.process.wait(60)


def compare(specs: list[dict[str, Any]], rounds: int, seconds: float) -> list[Side]:
    """Measure all sides' rates in interleaved rounds."""
    alone = specs[0]["task"] == "dpo"  # references that are computed beforehand are timed
    sides: list[Side] = []
    for spec in specs:
        sides.append(Side(spec))
        if alone:
            sides[-1].warm()
    for side in [] if alone else sides:
        side.warm()
    for _ in range(rounds):
        for side in sides:
            side.round(seconds)
    for side in sides:
        side.end()
        unit = "GFLOP/s" if side.name == "gemm" else "tokens/s"
        spread = f"{min(side.rates):.1f} .. {max(side.rates):.1f}"
        print(f"  {side.name:34} {median(side.rates):8.1f} {unit:8} ({spread})  peak {side.peak_mb:6.0f} MB")
    return sides


def against_trl(task: str, dtype: str, rounds: int, seconds: float) -> dict[str, float]:
    """Our step and all of TRL's settings for one task and dtype."""
    from bench.performance.throughput_trl import SETTINGS

    common = {"task": task, "dtype": dtype}
    gemm = [{"side": "gemm", **common}] if task == "sft" else []
    print(f"{task}, {dtype}", flush=True)
    specs = [*gemm, {"side": "ours", **common}, *({"side": "trl", **common, **s} for s in SETTINGS[task])]
    sides = compare(specs, rounds, seconds)
    ours = next(side for side in sides if side.spec["side"] == "ours")
    best = max((s for s in sides if s.spec["side"] == "trl"), key=lambda side: median(side.rates))
    ratios = [a / b for a, b in zip(ours.rates, best.rates, strict=True)]
    found = {f"{task}_ratio": median(ratios), f"{task}_tokens_per_s": median(ours.rates)}
    if task == "sft":
        found["peak_memory_ratio"] = ours.peak_mb / best.peak_mb
        flops = 4 * linear_weights() / 1e9
        found["gemm_share"] = flops * median(a / b for a, b in zip(ours.rates, sides[0].rates, strict=True))
    else:
        found["dpo_peak_memory_ratio"] = ours.peak_mb / best.peak_mb
    print(f"  best of TRL: {best.name}; {json.dumps({k: round(v, 3) for k, v in found.items()})}", flush=True)
    return found


def ablate(dtype: str, rounds: int, seconds: float) -> dict[str, float]:
    """Change each part of the step alone; return the share of the full step's tokens/s that is left."""
    specs = []
    for change in CHANGES:
        if change == "bf16" and dtype == "fp32":
            continue
        own = "fp32" if change == "bf16" else dtype
        specs.append({"side": "ours", "task": "sft", "dtype": own, **({"change": change} if change else {})})
    print(f"ablation, {dtype}", flush=True)
    full, *others = compare(specs, rounds, seconds)
    return {
        f"{'with' if side.spec['change'] == 'compile' else 'without'}_{side.spec['change']}": median(
            b / a for a, b in zip(full.rates, side.rates, strict=True)
        )
        for side in others
    }


def linear_weights() -> int:
    """Weights of the model's linear modules and of its head."""
    config = json.loads((HOME / "config.json").read_text())
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    layer = 2 * hidden * heads + 2 * hidden * groups + 3 * hidden * inner
    return int(config["num_hidden_layers"] * layer + config["vocab_size"] * hidden)


def worker(spec: dict[str, Any]) -> None:
    """Be one side."""
    import torch

    from bench.performance import throughput_podium as our_side

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    side = spec.pop("side")
    if side == "gemm":
        our_side.gemm(spec["dtype"])
    elif side == "ours":
        our_side.ours(**spec)
    else:
        from bench.performance import throughput_trl as trl_side

        trl_side.serve(**spec)


def main() -> int:
    """Compare, print, and end with one JSON line."""
    parser = argparse.ArgumentParser(description="Training throughput, in real tokens per second.")
    parser.add_argument("--against", choices=["trl"], help="compare with TRL's trainers")
    parser.add_argument("--ablate", action="store_true", help="change one part of our step after another")
    parser.add_argument("--dtype", choices=list(TORCH_DTYPES), action="append", help="default: both")
    parser.add_argument("--task", choices=["sft", "dpo"], action="append", help="default: both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one side's round")
    parser.add_argument("--threads", type=int, default=THREADS, help="of every side")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        worker(json.loads(options.side))
        return 0
    if not (HOME / "config.json").is_file():
        sys.exit("bench: no converted SmolLM2: run `make setup`")
    if options.against and importlib.util.find_spec("trl") is None:
        sys.exit("bench: TRL is not installed: pip install --group oracle -c constraints.txt")
    os.environ |= {"BENCH_THREADS": str(options.threads), "BENCH_CLOCK": options.clock}
    print(f"{options.threads} threads, {options.clock} clock, load {os.getloadavg()[0]:.1f}", flush=True)
    found: dict[str, Any] = {}
    for dtype in options.dtype or list(TORCH_DTYPES):
        if options.ablate:
            found |= {
                f"{key}_{dtype}": value
                for key, value in ablate(dtype, options.rounds, options.seconds).items()
            }
        for task in (options.task or ["sft", "dpo"]) if options.against else []:
            for key, value in against_trl(task, dtype, options.rounds, options.seconds).items():
                found[f"{key}_{dtype}"] = value
    print(json.dumps({key: round(value, 3) for key, value in {**headline(found), **found}.items()}))
    return 0


def headline(found: dict[str, float]) -> dict[str, float]:
    """Return the plain names: the worse of both dtypes, and fp32 where a share of peak is meant."""
    plain = {}
    for key, worse in (("sft_ratio", min), ("dpo_ratio", min), ("peak_memory_ratio", max)):
        values = [found[f"{key}_{dtype}"] for dtype in TORCH_DTYPES if f"{key}_{dtype}" in found]
        if values:
            plain[key] = worse(values)
    for dtype in TORCH_DTYPES:  # fp32, the last, wins
        if f"gemm_share_{dtype}" in found:
            plain["gemm_share"] = found[f"gemm_share_{dtype}"]
    return plain


if __name__ == "__main__":
    sys.exit(main())
