"""Our metric against the trainers of the versions that contests are scored with, on the oracle's cases.

    make compat                               # makes .venv-compat-2026 once
    python -m bench oracle_2026 [--write]     # --write: keep them in tests/data/oracle/expected_2026.json

`oracle_worker.py` encodes the rows by axolotl and TRL and scores them by their trainers. A pair whose prompt
fills the model's positions has nothing to score: it adds ln 2 there, and is left out here. Prints a table,
then one JSON object: cases, failed, worst_abs_error, versions. Exit code 1 if a case is out of its tolerance
or has other tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch

from bench.conformance.scorer_parity import ORACLE
from bench.evaluator.label_parity import FORMS, PYTHON
from shared.messages.offers import DatasetType, FileFormat, TaskType, task_type_of
from shared.messages.runs import Scorer
from trainer_node.engine.data.examples import IGNORED, Examples, longest_row, read_rows, tokenize
from trainer_node.engine.evaluate import metric
from trainer_node.engine.model.adapters import load_adapter
from trainer_node.engine.model.loading import load_config, load_model, load_tokenizer

WORKER = Path(__file__).with_name("oracle_worker.py")
EXPECTED = ORACLE / "expected_2026.json"
BASE, ADAPTER = str(ORACLE / "base"), str(ORACLE / "adapter")
TOLERANCE = {"tiny": 1e-4, "dpo": 5e-3}
ABOUT = (
    "losses by the trainers of the versions that contests are scored with (transformers' Trainer and TRL's "
    "DPOTrainer; rows encoded by axolotl and TRL), CPU, bf16 weights and bf16 autocast, batch 1"
)


def encoded(case: dict[str, Any]) -> Examples:
    """Return a case's rows as the engine encodes them for contests."""
    columns = msgspec.convert(case["dataset_type"], DatasetType)
    task_type = task_type_of(columns)
    rows = read_rows(str(ORACLE / case["data"]), FileFormat.JSON, allow_private_urls=False).rows
    length = longest_row(load_config(BASE), task_type, Scorer.CONTESTS)
    return tokenize(rows, task_type, columns, load_tokenizer(BASE), length, scorer=Scorer.CONTESTS)[0]


def scored(examples: Examples, *, with_adapter: bool) -> float:
    """Return the engine's loss of the oracle's base model or of its adapter."""
    model: torch.nn.Module = load_model(BASE, torch.bfloat16)
    if examples.group == 2:
        examples = examples.with_reference(metric.reference_logprobs(model, examples))
    return metric.score(load_adapter(model, ADAPTER) if with_adapter else model, examples).loss


def ours(case: dict[str, Any]) -> dict[str, float | int]:
    """Return what the worker answers for a case, by the engine."""
    examples = encoded(case)
    return {
        "tokens": len(examples.ids),
        "labels": int((examples.labels != IGNORED).sum()),
        "base": scored(examples, with_adapter=False),
        "adapter": scored(examples, with_adapter=True),
    }


def theirs(python: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the worker's answer: versions, and losses by case."""
    with tempfile.TemporaryDirectory() as folder:
        spec = {"base": BASE, "adapter": ADAPTER, "folder": folder, "cases": [asked(case) for case in cases]}
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec))
        done = subprocess.run([python, str(WORKER), str(path)], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def asked(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case as `label_worker.py` reads it."""
    columns = msgspec.convert(case["dataset_type"], DatasetType)
    task_type = task_type_of(columns)
    forms = FORMS if columns.field_input else {**FORMS, "format": FORMS["no_input_format"]}
    kind = {TaskType.CHAT: "chat", TaskType.DPO: "dpo"}.get(task_type, "instruct")
    return {
        "name": case["name"],
        "kind": "completion" if kind == "instruct" and not columns.field_output else kind,
        "length": longest_row(load_config(BASE), task_type, Scorer.CONTESTS),
        "columns": {**(forms if kind == "instruct" else {}), **case["dataset_type"]},
        "rows": json.loads((ORACLE / case["data"]).read_text()),
    }


def differences(name: str, expected: dict[str, Any], found: dict[str, Any]) -> tuple[float, bool]:
    """Print one case; return the largest error, and whether it is allowed."""
    errors = [abs(found[which] - expected[which]) for which in ("base", "adapter")]
    counts = [[side[which] for which in ("tokens", "labels")] for side in (expected, found)]
    print(
        f"{name:24} tokens and labels {counts[0]}, ours {counts[1]}; base {expected['base']:.6f}, "
        f"error {errors[0]:.1e}; adapter {expected['adapter']:.6f}, error {errors[1]:.1e}",
        flush=True,
    )
    return max(errors), counts[0] == counts[1] and max(errors) <= TOLERANCE[
        "dpo" if name == "dpo" else "tiny"
    ]


def main() -> int:
    """Compare; 1 if a case differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=str(PYTHON), help="of the evaluator's environment")
    parser.add_argument("--write", action="store_true", help="keep the numbers")
    args = parser.parse_args()
    cases = [
        case
        for case in json.loads((ORACLE / "expected.json").read_text())["cases"]
        if "model" not in case  # SmolLM2's weights are not in the repository
    ]
    answer = theirs(args.python, cases)
    found = [differences(case["name"], answer["losses"][case["name"]], ours(case)) for case in cases]
    if args.write:
        kept = [
            {
                **{name: case[name] for name in ("name", "data", "dataset_type")},
                **answer["losses"][case["name"]],
            }
            for case in cases
        ]
        about = {"about": ABOUT, "versions": answer["versions"], "tolerance": TOLERANCE, "cases": kept}
        EXPECTED.write_text(json.dumps(about, indent=1) + "\n")
    failed = sum(not allowed for _, allowed in found)
    worst = max(error for error, _ in found)
    summary = {"cases": len(cases), "failed": failed, "worst_abs_error": worst}
    print(json.dumps({**summary, "versions": answer["versions"]}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
