"""The scorer's metric by plain transformers and peft of the versions upstream evaluates with.

    .venv-compat/bin/python bench/conformance/compat_worker.py SPEC.json

`bench/conformance/compat.py` runs it in an environment that has nothing of Podium's: no import from this
repository. SPEC
is a list of cases; the last line is one JSON object: versions, and the losses by case.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

BETA = 0.1  # of the scorer's preference loss


def main() -> None:
    """Score every case of the spec."""
    cases = json.loads(Path(sys.argv[1]).read_text())
    losses = {case["name"]: score(case) for case in cases}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    print(json.dumps({"versions": versions, "losses": losses}))


def score(case: dict[str, Any]) -> float:
    """Return the mean loss of a submission over the case's rows, one by one."""
    rows = np.load(case["rows"])
    offsets, group = rows["offsets"], int(rows["group"])
    documents = [(rows["ids"][start:end], rows["labels"][start:end]) for start, end in pairwise(offsets)]
    model = load(case)
    if group == 1:
        return float(np.mean([-logprob(model, *document)[1] for document in documents]))
    reference = AutoModelForCausalLM.from_pretrained(case["base"], torch_dtype=torch.bfloat16).eval()
    gains = [logprob(model, *document)[0] - logprob(reference, *document)[0] for document in documents]
    margins = BETA * torch.tensor(gains).view(-1, 2).diff(dim=1).neg()
    return float(-torch.nn.functional.logsigmoid(margins).mean())


def load(case: dict[str, Any]) -> torch.nn.Module:
    """Load a submission as the scorer does: bf16 weights, the adapter on its base or the model itself."""
    folder = Path(case["folder"])
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
    base = AutoModelForCausalLM.from_pretrained(case["base"], torch_dtype=torch.bfloat16)
    return PeftModel.from_pretrained(base, str(folder)).eval()


@torch.inference_mode()
def logprob(model: torch.nn.Module, ids: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Sum and mean of the log-probabilities of one document's labels, as the Trainer computes them."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    wanted = torch.from_numpy(labels.astype(np.int64))[1:]
    losses = torch.nn.functional.cross_entropy(logits[:-1].float(), wanted, reduction="none")
    return -float(losses.sum()), -float(losses.sum() / (wanted != -100).sum())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
