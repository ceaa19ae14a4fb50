"""Train, export and reload a tiny model of every architecture, by LoRA and by dense deltas.

    python -m bench models [--only NAME ...] [--log FILE] [--write docs/models.md]

One line per architecture. Then one JSON object: how many were tried and are exact, whole jobs by each method,
and how many other model types with a causal head the gateway refuses before it accepts. Exit code 1 if one of
the architectures that the gateway accepts is not exact. `--log` keeps each result, and goes on where an
earlier run stopped. With `--write` the table in that page is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench.architectures.samples import SAMPLES, Sample
from bench.architectures.trial import METHODS, Trial, try_out
from bench.architectures.zoo import config_of
from bench.harness.page import with_part
from shared.planning.architectures import ARCHITECTURES, facts_from_config

BEGIN, END = "<!-- models: made by bench/architectures/table.py -->", "<!-- end of models -->"


def refusal_of(sample: Sample) -> str:
    """What the gateway would say to a model of this architecture; empty if it would accept."""
    return facts_from_config(config_of(sample).to_dict()).refusal


def other_types() -> list[str]:
    """Model types with a causal head in transformers that are none of the engine's."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(ARCHITECTURES))


def line_of(trial: Trial) -> str:
    """One architecture's result in a line."""
    if not trial.exact:
        return f"{'refused' if trial.refused else 'WRONG':8}{trial.name:22} {trial.cause}"
    jobs = ", ".join(
        f"{method}: {trial.kind[method]}, gained {trial.gain[method]:.2f}, {trial.reported[method]:.4f} off"
        for method in METHODS
    )
    return f"{'exact':8}{trial.name:22} {trial.batching}; {jobs}"


def row_of(trial: Trial) -> str:
    """One architecture's row in the page."""
    jobs = [trial.kind[method] if trial.exact else "-" for method in METHODS]
    trained = trial.trained if trial.exact else f"not exact: {trial.cause}"
    return f"| {' | '.join([trial.name, trial.batching, trained, *jobs])} |"


def row_without_job(sample: Sample) -> str:
    """The row of an architecture whose jobs were not run this time."""
    return f"| {sample.name} | {ARCHITECTURES[sample.model_type]} | not run | - | - |"


def page_with(text: str, trials: Sequence[Trial]) -> str:
    """Return a page with its table replaced. Raises ValueError if it has no place for one."""
    head = f"| architecture | documents | trained | {' | '.join(f'export, {method}' for method in METHODS)} |"
    found = {trial.name: row_of(trial) for trial in trials}
    rows = [found.get(sample.name) or row_without_job(sample) for sample in SAMPLES]
    return with_part(text, BEGIN, END, [head, "| --- " * (3 + len(METHODS)) + "|", *rows])


def summary_of(trials: Sequence[Trial]) -> dict[str, int]:
    """The last line's figures."""
    refusals = {sample.name: refusal_of(sample) for sample in SAMPLES}
    others = other_types()
    return {
        "architectures": len(trials),
        "exact": sum(trial.exact for trial in trials),
        **{method: sum(trial.exact and method in trial.kind for trial in trials) for method in METHODS},
        "other_types": len(others),
        "refused_by_gateway": sum(bool(facts_from_config({"model_type": name}).refusal) for name in others),
        "accepted_but_refused_by_engine": sum(
            not trial.exact and not refusals[trial.name] for trial in trials
        ),
    }


def tried(log: Path | None) -> dict[str, Trial]:
    """The results that an earlier run left."""
    if log is None or not log.exists():
        return {}
    trials = [msgspec.json.decode(line, type=Trial) for line in log.read_bytes().splitlines()]
    return {trial.name: trial for trial in trials}


def main() -> int:
    """The bench; 1 if an architecture that the gateway accepts is not exact."""
    parser = argparse.ArgumentParser(prog="python -m bench models", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures alone")
    parser.add_argument("--log", type=Path, help="keep each result in this file, and skip those in it")
    parser.add_argument("--write", type=Path, help="replace the table in this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples = [sample for sample in SAMPLES if not args.only or sample.name in args.only]
    known, trials = tried(args.log), []
    for sample in samples:
        trial = known.get(sample.name)
        if trial is None:
            with tempfile.TemporaryDirectory() as folder:
                trial = try_out(sample, Path(folder))
            if args.log:
                with args.log.open("ab") as log:
                    log.write(msgspec.json.encode(trial) + b"\n")
        print(line_of(trial), flush=True)
        trials.append(trial)
    if args.write:
        args.write.write_text(page_with(args.write.read_text(), trials))
    summary = summary_of(trials)
    print(json.dumps(summary))
    return 1 if summary["accepted_but_refused_by_engine"] else 0


if __name__ == "__main__":
    sys.exit(main())
