"""Our metric against the numbers that the upstream validator's own evaluator printed.

    python -m bench scorer_parity

A table of all cases of tests/data/oracle/expected.json (tiny model and adapter; SmolLM2 where `make setup`
has converted it), then one JSON object: cases, failed, worst_abs_error. Exit code 1 if a case is out of its
tolerance.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from podium.commands.score import score
from podium.demo.model import HOME
from shared.messages.offers import DatasetType, task_type_of

ORACLE = Path(__file__).parents[2] / "tests" / "data" / "oracle"


def main() -> int:
    """Score every case and print how far off we are."""
    expected = json.loads((ORACLE / "expected.json").read_text())
    cases = failed = 0
    worst = 0.0
    skipped = []
    print(f"{'case':24} {'model':8} {'upstream':>10} {'podium':>10} {'error':>9} {'allowed':>8}")
    for case in expected["cases"]:
        model = HOME if "model" in case else ORACLE / "base"
        if not (model / "config.json").is_file():
            skipped.append(case["name"])
            continue
        for which in ("base", "adapter"):
            if which not in case:
                continue
            found = _score(case, model, with_adapter=which == "adapter")
            error = abs(found - case[which])
            allowed = expected["tolerance"][_tolerance(case)]
            cases, failed, worst = cases + 1, failed + (error > allowed), max(worst, error)
            print(
                f"{case['name']:24} {which:8} {case[which]:10.6f} {found:10.6f} {error:9.1e} {allowed:8.0e}"
            )
    if skipped:
        print(f"skipped, no converted SmolLM2 (run `make setup`): {', '.join(skipped)}")
    print(json.dumps({"cases": cases, "failed": failed, "worst_abs_error": worst, "skipped": len(skipped)}))
    return 1 if failed else 0


def _score(case: dict[str, Any], model: Path, *, with_adapter: bool) -> float:
    columns = msgspec.convert(case["dataset_type"], DatasetType)
    adapter = str(ORACLE / "adapter") if with_adapter else None
    return score(str(model), adapter, str(ORACLE / case["data"]), columns, task_type_of(columns))[0]


def _tolerance(case: dict[str, Any]) -> str:
    return "dpo" if case["name"] == "dpo" else "smollm2" if "model" in case else "tiny"


if __name__ == "__main__":
    sys.exit(main())
