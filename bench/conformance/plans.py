"""Write docs/plans.md: plans of `maximum_accuracy` for public decoders, on GPUs and on a small CPU.

python -m bench plans [--out docs/plans.md]

The last line is one JSON object: `{"plans", "fit", "refused", "slowest_ms"}`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from podium.commands.plan import facts_of
from shared.errors import PlanError
from shared.messages.hardware import Hardware
from shared.planning.feasibility import ASSUMED_DATA
from shared.planning.hardware import parse_hardware
from shared.planning.model_shape import shape_from_config
from shared.planning.planner import make_plan
from shared.planning.profiles import resolve

HOURS = 4.0
HARDWARE = ("4xH100-80GB", "cpu-4x32GB")
_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
MODELS: dict[str, dict[str, Any]] = {
    name: dict(zip(_KEYS, values, strict=True))
    for name, values in {
        "Qwen2.5-0.5B": ("qwen2", 896, 24, 4864, 14, 2, 64, 151936, True),
        "Llama-3.2-1B": ("llama", 2048, 16, 8192, 32, 8, 64, 128256, True),
        "Llama-3.2-3B": ("llama", 3072, 28, 8192, 24, 8, 128, 128256, True),
        "Llama-3.1-8B": ("llama", 4096, 32, 14336, 32, 8, 128, 128256, False),
        "Qwen2.5-14B": ("qwen2", 5120, 48, 13824, 40, 8, 128, 152064, False),
        "Qwen2.5-32B": ("qwen2", 5120, 64, 27648, 40, 8, 128, 152064, False),
        "Llama-3.1-70B": ("llama", 8192, 80, 28672, 64, 8, 128, 128256, False),
    }.items()
}
ROWS = f"{ASSUMED_DATA.examples:,} rows of {ASSUMED_DATA.tokens // ASSUMED_DATA.examples} tokens"
INTRODUCTION = f"""# Plans of `maximum_accuracy`

Made by `python -m bench plans`. `auto` is the default profile; these plans show what a job would be under the
house recipe. Nothing here was trained: every figure is the planner's own estimate.
Assumed: {ROWS}, half of the tokens scored, the longest row {ASSUMED_DATA.max_length} tokens; {HOURS:g} hours.
`cpu-4x32GB` is 4 cores for one slot, and 32 GB that both slots share.
"""


def section(name: str, hardware: Hardware) -> tuple[str, bool, float]:
    """Return one plan as Markdown, whether it fits, and the milliseconds it took."""
    start = time.perf_counter()
    try:
        shape = shape_from_config(MODELS[name])
        plan = make_plan(resolve("maximum_accuracy"), shape, ASSUMED_DATA, hardware, HOURS * 3600)
    except PlanError as error:
        return f"### {name}\n\nRefused: {error}.\n", False, 1e3 * (time.perf_counter() - start)
    took = 1e3 * (time.perf_counter() - start)
    lines = [f"### {name}", ""]
    lines += [f"- {label}: {text}" for label, text in facts_of(plan, hardware)]
    lines += ["", "| what | wanted | got | reason |", "| --- | --- | --- | --- |"]
    lines += [f"| {d.what} | {d.wanted} | {d.got} | {d.reason} |" for d in plan.deviations]
    return "\n".join(lines) + "\n", True, took


def main() -> None:
    """Write the page and print what it holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/plans.md"))
    out = parser.parse_args().out
    page, fits, slowest = [INTRODUCTION], [], 0.0
    for text in HARDWARE:
        hardware = parse_hardware(text)
        page.append(f"## {text}\n")
        for name in MODELS:
            body, fit, took = section(name, hardware)
            page.append(body)
            fits.append(fit)
            slowest = max(slowest, took)
            print(f"{text:12} {name:14} {'fits' if fit else 'refused':8} {took:.2f} ms")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(page))
    print(
        json.dumps(
            {
                "plans": len(fits),
                "fit": sum(fits),
                "refused": fits.count(False),
                "slowest_ms": round(slowest, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
