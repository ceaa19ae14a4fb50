"""The losses of the oracle's cases by the trainers of the versions that contests are scored with.

    .venv-compat-2026/bin/python bench/evaluator/oracle_worker.py SPEC.json

`bench/evaluator/oracle_2026.py` runs it in an environment that has nothing of Podium's: no import from this
repository but `label_worker.py`, which has none either. Rows are encoded by axolotl and TRL, and scored by
transformers' `Trainer` and TRL's `DPOTrainer`, one by one, bf16. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from label_worker import answer
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer

BETA = 0.1
OPTIONS: dict[str, Any] = {
    "per_device_eval_batch_size": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": True,
    "disable_tqdm": True,
}


def main() -> None:
    """Score every case with the base model and with the adapter."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    found = {case["name"]: losses(case, spec, tokenizer) for case in spec["cases"]}
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "axolotl")}
    print(json.dumps({"versions": versions, "losses": found}))


def losses(case: dict[str, Any], spec: dict[str, Any], tokenizer: Any) -> dict[str, float | int]:
    """Return a case's losses, and how many tokens and labels its rows have."""
    encoded = [document for row in answer(case, tokenizer) for document in row or []]
    documents = [(ids, labels) for ids, labels in encoded if kept(ids, labels, case["length"])]
    score = preferences if case["kind"] == "dpo" else texts
    return {
        "tokens": sum(len(ids) for ids, _ in documents),
        # The first token is never predicted.
        "labels": sum(label != -100 for _, labels in documents for label in labels[1:]),
        "base": score(load(spec["base"]), case, documents, spec, tokenizer),
        "adapter": score(load(spec["base"], spec["adapter"]), case, documents, spec, tokenizer),
    }


def kept(ids: list[int], labels: list[int], length: int) -> bool:
    """Return whether a document is scored: it is not too long, and has a label."""
    return 2 <= len(ids) <= length and any(label != -100 for label in labels)


def load(base: str, adapter: str | None = None) -> Any:
    """Load the base model in bf16, with the adapter on it or without."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def texts(model: Any, case: dict[str, Any], documents: Any, spec: dict[str, Any], tokenizer: Any) -> float:
    """Return the mean over rows of the trainer's loss."""
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in documents]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=spec["folder"], **OPTIONS),
        eval_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    return float(trainer.evaluate()["eval_loss"])


def preferences(
    model: Any, case: dict[str, Any], documents: Any, spec: dict[str, Any], tokenizer: Any
) -> float:
    """Return the mean over pairs of TRL's sigmoid loss against the base model."""
    names = {case["columns"][f"field_{name}"]: name for name in ("prompt", "chosen", "rejected")}
    rows = Dataset.from_list(
        [{names[key]: value for key, value in row.items() if key in names} for row in case["rows"]]
    )
    trainer = DPOTrainer(
        model=model,
        ref_model=load(spec["base"]),
        args=DPOConfig(output_dir=spec["folder"], beta=BETA, max_length=case["length"], **OPTIONS),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    return float(trainer.evaluate()["eval_loss"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
