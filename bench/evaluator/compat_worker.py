"""The scorer's metric by plain transformers and peft of the versions upstream evaluates with.

    .venv-compat/bin/python bench/evaluator/compat_worker.py SPEC.json

`bench/evaluator/compat.py` runs it in an environment that has nothing of Podium's: no import from this
repository. SPEC is a list of cases; the last line is one JSON object: versions, and each case's losses: in
bf16, as the scorer computes, and in the run's own dtype if that is another.
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
    losses = {
        case["name"]: {dtype: score(case, dtype) for dtype in ("bfloat16", case["dtype"])} for case in cases
    }
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    print(json.dumps({"versions": versions, "losses": losses}))


def score(case: dict[str, Any], dtype: str) -> float:
    """Return the mean loss of a submission over the case's rows, one by one."""
    rows = np.load(case["rows"])
    offsets, group = rows["offsets"], int(rows["group"])
    documents = [(rows["ids"][start:end], rows["labels"][start:end]) for start, end in pairwise(offsets)]
    model = load(case, dtype)
    if group == 1:
        return float(np.mean([-logprob(model, *document)[1] for document in documents]))
    reference = base_model(case["base"], dtype).eval()
    gains = [logprob(model, *document)[0] - logprob(reference, *document)[0] for document in documents]
    margins = BETA * torch.tensor(gains).view(-1, 2).diff(dim=1).neg()
    return float(-torch.nn.functional.logsigmoid(margins).mean())


def load(case: dict[str, Any], dtype: str) -> torch.nn.Module:
    """Load a submission as the scorer does: the adapter on its base or the model itself."""
    folder = Path(case["folder"])
    if not (folder / "adapter_config.json").exists():
        return base_model(folder, dtype).eval()
    return PeftModel.from_pretrained(base_model(case["base"], dtype), str(folder)).eval()


def base_model(folder: Path | str, dtype: str) -> Any:
    """Load a whole model."""
    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=getattr(torch, dtype))


@torch.inference_mode()
def logprob(model: torch.nn.Module, ids: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Sum and mean of the log-probabilities of one document's labels, as the Trainer computes them."""
    with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype is torch.bfloat16):
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    wanted = torch.from_numpy(labels.astype(np.int64))[1:]
    losses = torch.nn.functional.cross_entropy(logits[:-1].float(), wanted, reduction="none")
    return -float(losses.sum()), -float(losses.sum() / (wanted != -100).sum())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
