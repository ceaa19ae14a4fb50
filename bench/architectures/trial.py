"""Try the engine on one architecture: train, export, reload with stock libraries, resume.

What is compared is said by the engine on one side, and by nothing but transformers and PEFT on the other.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from msgspec import Struct
from msgspec.structs import replace
from transformers import AutoModelForCausalLM

from bench.architectures.samples import Sample
from bench.architectures.zoo import write
from bench.harness.tiny_jobs import write_job, write_rows
from shared.errors import EngineError
from shared.messages.offers import FileFormat, TaskType
from shared.messages.runs import Outcome, OutcomeStatus, WorkerJob, decode_outcome
from shared.messages.runs import decode_worker_job as decode_job
from shared.planning.profiles import PROFILES
from shared.planning.recipe import Recipe
from trainer_node.engine import pipeline
from trainer_node.engine.data.examples import IGNORED, Examples, read_rows, scored_length, tokenize
from trainer_node.engine.data.held_out import hold_out
from trainer_node.engine.data.packing import Batch, collate
from trainer_node.engine.model.exactness import label_model
from trainer_node.engine.model.label_model import LabelModel
from trainer_node.engine.model.loading import load_config, load_model, load_tokenizer
from trainer_node.engine.signals import Stop

LORA = Recipe(profile="sample_lora", rank=8, alpha=16.0, dropout=0.0, device_batch=8, bf16=False, rate=5e-3)
DENSE = Recipe(
    profile="sample_dense", rank=8192, alpha=16.0, dropout=0.0, device_batch=8, bf16=False, rate=5e-4
)
METHODS = {"lora": LORA, "dense": DENSE}
PROFILES.update({recipe.profile: recipe for recipe in METHODS.values()})
ALONE = 1e-5  # nats between a document in a batch and the same alone in the stock model
# Nats between the reported loss and that of the reloaded export: deltas are stored in bf16, and what that
# rounds can send a token to another expert.
REPORTED = {"attention": 2e-3, "experts": 5e-3}
LENGTHS = [9, 30, 4, 17, 21]


class Trial(Struct, frozen=True):
    """What one architecture gave; `cause` is empty where everything was as it should be."""

    name: str
    batching: str = ""  # "packed" or "padded"
    trained: str = ""  # the kinds of modules
    alone: float = 0.0  # largest difference to the stock model, document by document
    moved: float = 0.0  # of a document whose neighbour changed
    gain: dict[str, float] = {}  # nats that training gained, by method
    reported: dict[str, float] = {}  # difference to the reloaded export, by method
    kind: dict[str, str] = {}  # of the export, by method
    resumed: bool | None = None  # bit-equal
    refused: bool = False  # the engine said that it can't be trained
    cause: str = ""

    @property
    def exact(self) -> bool:
        """Trained, and everything is as it should be."""
        return not self.cause


def try_model(sample: Sample, folder: Path) -> Trial:
    """Try only the model, without training: its batching, and both differences."""
    place = str(write(sample, folder / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = label_model(load_model(place, torch.float32))
        except EngineError as error:
            return Trial(sample.name, refused=True, cause=str(error))
        alone, moved = difference_to_stock(model, place), influence(model)
        batching = model.batching.value
    cause = "" if alone <= ALONE else f"differs from the stock model by {alone:.1g}"
    if not moved <= ALONE / 10:
        cause = f"a document moves by {moved:.1g} when its neighbour changes"
    return Trial(sample.name, batching, alone=alone, moved=moved, cause=cause)


def examples() -> Examples:
    """Five random documents, each with labels from its second token on."""
    random = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    ids = random.integers(3, 990, offsets[-1], dtype=np.int32)
    labels = ids.copy()
    labels[offsets[:-1]] = IGNORED
    return Examples(ids, labels, offsets)


def batch_of(rows: Examples) -> Batch:
    """Return all rows in one batch, with some padding."""
    return collate(rows, list(range(len(rows))), sum(LENGTHS) + 47)


def difference_to_stock(model: LabelModel, place: str) -> float:
    """Largest difference of a label's log-probability to the stock model's, which sees one document."""
    rows = examples()
    stock = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model.eval()(batch_of(rows))
        wanted = torch.cat([stock_logprobs(stock, rows.take([index])) for index in range(len(rows))])
    return float((found - wanted).abs().max())


def stock_logprobs(stock: Any, row: Examples) -> torch.Tensor:
    """Log-probability of every label of one document."""
    ids = torch.from_numpy(row.ids.astype(np.int64))
    logp_TV = torch.log_softmax(stock(input_ids=ids[None], use_cache=False).logits[0].float(), 1)
    where = torch.from_numpy(np.flatnonzero(row.labels != IGNORED))
    return logp_TV[where - 1, ids[where]]


def influence(model: LabelModel) -> float:
    """Return how far the other documents move when the first one changes."""
    rows = examples()
    ids = rows.ids.copy()
    ids[: LENGTHS[0]] = (ids[: LENGTHS[0]] + 17) % 900 + 3
    other = Examples(ids, np.where(rows.labels == IGNORED, IGNORED, ids), rows.offsets)
    with torch.no_grad():
        moved = model(batch_of(other)) - model(batch_of(rows))
    return float(moved[LENGTHS[0] - 1 :].abs().max())


def try_out(sample: Sample, folder: Path, methods: tuple[str, ...] = ("lora", "dense")) -> Trial:
    """Everything: the model, whole jobs by each method, their exports, and a resumed one."""
    trial = try_model(sample, folder)
    if not trial.exact:
        return trial
    data = write_rows(folder / "rows.json", 200)
    found: dict[str, Any] = {"gain": {}, "reported": {}, "kind": {}}
    for method in methods:
        job = write_job(
            folder / method,
            data,
            model="upstream/sample",
            model_path=str(folder / "base"),
            profile=METHODS[method].profile,
            ready_by=8.0,
            checkpoint_interval_s=1.0,
        )
        outcome = run(job)
        if outcome.status is not OutcomeStatus.READY or outcome.metrics is None:
            refused = outcome.code is not None and outcome.code.value == "unsupported"
            return replace(trial, **found, refused=refused, cause=f"{method}: {outcome.error}")
        metrics = outcome.metrics
        loss = metrics.final_loss or float("nan")
        found["gain"][method] = metrics.base_loss - loss
        found["kind"][method] = metrics.kind
        found["reported"][method] = abs(reloaded_loss(decode_job(job.read_bytes()), job.parent) - loss)
        if not found["reported"][method] <= REPORTED["experts" if sample.has_experts else "attention"]:
            return replace(trial, **found, cause=f"{method}: the export scores another loss than reported")
        if not found["gain"][method] > 0:
            return replace(trial, **found, cause=f"{method}: nothing was learnt")
    plan = json.loads((folder / methods[0] / "plan.json").read_text())
    found["trained"] = ", ".join(module["name"] for module in plan["modules"])
    found["resumed"] = resumes_equal(folder / methods[0])
    return replace(trial, **found, cause="" if found["resumed"] else "a resumed run ends otherwise")


def run(job: Path) -> Outcome:
    """Run the engine's own pipeline in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.main(job, Stop())
    return decode_outcome((job.parent / "outcome.json").read_bytes())


def reloaded_loss(job: WorkerJob, folder: Path) -> float:
    """Return the scorer's loss of an export on the held-out rows, by stock transformers and PEFT alone."""
    export = folder / "export"
    adapter = (export / "adapter_config.json").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = job.model_path if adapter else export
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        if adapter:
            model = peft.PeftModel.from_pretrained(model, str(export))
        model.eval()
        rows = held_out(job)
        with torch.no_grad():
            losses = [-stock_logprobs(model, rows.take([index])).mean() for index in range(len(rows))]
    return float(torch.stack(losses).double().mean())


def held_out(job: WorkerJob) -> Examples:
    """Return the development rows, as the worker's own seed draws them."""
    rows = read_rows(job.dataset, FileFormat.JSON, allow_private_urls=False).rows
    length = scored_length(load_config(job.model_path))
    tokenizer = load_tokenizer(job.model_path)
    found, _ = tokenize(rows, TaskType.INSTRUCT, job.dataset_type, tokenizer, length)
    return hold_out(found, job.seed)[1]


def resumes_equal(calm: Path) -> bool:
    """Return whether a finished run, resumed from an earlier checkpoint, ends with the same bytes."""
    rough = Path(shutil.copytree(calm, calm.with_name("rough")))
    (rough / "outcome.json").unlink()
    (rough / "standby.json").unlink(missing_ok=True)
    shutil.rmtree(rough / "export")
    kept = sorted((rough / "checkpoints").glob("step-*"))
    if len(kept) < 2:
        raise RuntimeError(f"{calm}: no earlier checkpoint to go on from")
    shutil.rmtree(kept[-1])
    if run(rough / "job.json").status is not OutcomeStatus.READY:
        return False
    return all(
        path.read_bytes() == (rough / "export" / path.name).read_bytes()
        for path in (calm / "export").glob("*.safetensors")
    )
