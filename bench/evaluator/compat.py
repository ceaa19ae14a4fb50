"""Check that exports load, and score the same, in the library versions that upstream evaluates with.

    make compat        # makes both environments once: transformers 4.51.3 and peft 0.15.1, 5.12.1 and 0.19.1

Real workers train a tiny model and SmolLM2, as LoRA adapters and as full models, on instructions, chats and
preference pairs; `compat_worker.py` scores each submission in the other environments. Prints a table and one
JSON object for each: cases, failed, worst_abs_error, versions. Exit code 1 if a loss differs from the
engine's own by more than noise. A CPU without bf16 products measures in fp32: then fp32 is compared, and the
column bf16 shows what the scorer would print.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.harness import tiny_jobs
from bench.harness.dataset_types import SHAREGPT
from podium.demo.model import HOME
from shared.messages.offers import DatasetType, FileFormat, TaskType
from shared.messages.runs import Metrics
from trainer_node.engine.data.examples import Examples, read_rows, scored_length, tokenize
from trainer_node.engine.data.held_out import hold_out
from trainer_node.engine.export.writer import stock_config
from trainer_node.engine.model.loading import load_config, load_tokenizer

ROOT = Path(__file__).parents[2]
SIDE = Path(__file__).with_name("compat_worker.py")
WORDNET = ROOT / "examples" / "wordnet"
ROWS = {"tiny": 300, "smollm2": 100}
TOLERANCE = {"tiny": 1e-3, "smollm2": 5e-3}  # bf16 noise of a mean over the held-out rows
TOLERANCE_DPO = 5e-3
INSTRUCT = DatasetType(field_instruction="instruct", field_output="output")
PREFERENCES = DatasetType(field_prompt="prompt", field_chosen="chosen", field_rejected="rejected")
KINDS = {
    "instruct": (TaskType.INSTRUCT, INSTRUCT, "nouns_train.json"),
    "chat": (TaskType.CHAT, SHAREGPT, "chat_train.json"),
    "dpo": (TaskType.DPO, PREFERENCES, "dpo_train.json"),
}
CASES = [
    ("tiny", "instruct", "lora_r16"),
    ("tiny", "instruct", "maximum_accuracy"),
    ("tiny", "chat", "lora_dropout"),
    ("tiny", "chat", "lora_and_dense"),
    ("tiny", "dpo", "lora_r16"),
    ("tiny", "dpo", "maximum_accuracy"),
    ("smollm2", "chat", "lora_r16"),
    ("smollm2", "chat", "maximum_accuracy"),
    ("smollm2", "dpo", "lora_r16"),
]


class Trained(NamedTuple):
    """A finished run, and the rows that its loss is of."""

    metrics: Metrics
    export: Path
    rows: Path
    dtype: str  # that its loss was measured in


def main() -> int:
    """Train, export, score there and here; 1 if any differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    environments = [str(ROOT / name / "bin" / "python") for name in (".venv-compat", ".venv-compat-2026")]
    parser.add_argument("--python", nargs="+", default=environments, help="of the other environments")
    parser.add_argument("--only", help="a part of a case's name")
    args = parser.parse_args()
    cases = [case for case in CASES if not args.only or args.only in "-".join(case)]
    all_failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = {"tiny": tiny_jobs.MODEL, "smollm2": old_style(HOME, folder / "smollm2")}
        trained = {"-".join(case): train(case, bases[case[0]], folder) for case in cases}
        for python in args.python:
            answer = elsewhere(python, trained, bases, folder)
            failed, worst = report(trained, answer["losses"])
            summary = {"cases": len(trained), "failed": failed, "worst_abs_error": worst}
            print(json.dumps({**summary, "versions": answer["versions"]}), flush=True)
            all_failed += failed
    return 1 if all_failed else 0


def report(trained: dict[str, Trained], losses: dict[str, dict[str, float]]) -> tuple[int, float]:
    """Print the table; how many cases failed, and the largest error."""
    failed, worst = 0, 0.0
    print(f"{'case':32} {'kind':8} {'base':>8} {'podium':>9} {'upstream':>9} {'error':>8} {'bf16':>9}")
    for name, run in trained.items():
        said, found = run.metrics.final_loss or float("nan"), losses[name][run.dtype]
        error = abs(found - said)
        failed += not error <= (TOLERANCE_DPO if "dpo" in name else TOLERANCE[name.partition("-")[0]])
        worst = max(worst, error)
        base = run.metrics.base_loss
        print(
            f"{name:32} {run.metrics.kind:8} {base:8.4f} {said:9.5f} {found:9.5f} {error:8.1e} "
            f"{losses[name]['bfloat16']:9.5f}"
        )
    return failed, worst


def train(case: tuple[str, str, str], model: Path, folder: Path) -> Trained:
    """Run the engine's own worker briefly on the token clock."""
    which, kind, profile = case
    task_type, columns, name = KINDS[kind]
    rows = json.loads((WORDNET / name).read_text())[: ROWS[which]]
    data = folder / f"{which}-{name}"
    data.write_text(json.dumps(rows))
    job = tiny_jobs.write_job(
        folder / "-".join(case),
        data,
        model="upstream/model",
        model_path=str(model),
        task_type=task_type,
        dataset_type=columns,
        ready_by=15.0 if which == "tiny" else 45.0,
        token_clock_rate=1000.0 if which == "tiny" else 100.0,
        profile=profile,
    )
    worker = tiny_jobs.start(job)
    worker.wait()
    outcome = tiny_jobs.outcome_of(job)
    if outcome is None or outcome.metrics is None:
        raise RuntimeError(f"{job.parent.name} failed: {outcome and outcome.error}")
    dev = held_out(data, model, task_type, columns).take(np.arange(outcome.metrics.dev_examples))
    target = job.parent / "rows.npz"
    np.savez(target, ids=dev.ids, labels=dev.labels, offsets=dev.offsets, group=np.array(dev.group))
    print(f"trained {job.parent.name}: {outcome.step} steps", flush=True)
    dtype = json.loads((job.parent / "plan.json").read_text())["dtype"]
    return Trained(outcome.metrics, job.parent / "export", target, dtype)


def held_out(data: Path, model: Path, task_type: TaskType, columns: DatasetType) -> Examples:
    """Return the development rows, as the worker's own seed draws them."""
    rows = read_rows(str(data), FileFormat.JSON, allow_private_urls=False).rows
    length = scored_length(load_config(str(model)))
    examples, _ = tokenize(rows, task_type, columns, load_tokenizer(str(model)), length)
    return hold_out(examples, 0)[1]


def old_style(model: Path, folder: Path) -> Path:
    """Return a model as upstream's hub has it: with a configuration of transformers 4."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stock_config(config, "upstream/model")))
    return folder


def elsewhere(
    python: str, trained: dict[str, Trained], bases: dict[str, Path], folder: Path
) -> dict[str, Any]:
    """Score every submission in the other environment."""
    spec = [
        {
            "name": name,
            "folder": str(run.export),
            "rows": str(run.rows),
            "dtype": run.dtype,
            "base": str(bases[name.partition("-")[0]]),
        }
        for name, run in trained.items()
    ]
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    result = subprocess.run([python, str(SIDE), str(path)], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
