"""What is submitted, as stock files: a PEFT adapter, or the whole model if any delta is dense.

And the proof that stock transformers and peft read it as it was trained.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from msgspec.structs import replace
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

from shared.files import sync
from shared.messages import Metrics, WorkerJob
from shared.plan import Plan
from trainer_node.engine.checkpoint import write_tensors
from trainer_node.engine.data import Examples
from trainer_node.engine.model import Deltas, load_model
from trainer_node.engine.objectives import dpo
from trainer_node.engine.score import Score

SHARD = "5GB"
TOLERANCE = 0.02  # nats between the trained model and its export: bf16 rounding of weights costs up to .005
ADAPTER = "default"
ROPE_OWN = ("rope_theta", "partial_rotary_factor")  # fields of their own in transformers 4, not of the scaling

PER_LABEL = 0.005  # of it per label token


def write(deltas: Deltas, plan: Plan, job: WorkerJob, metrics: Metrics, folder: Path) -> Metrics:
    """Write the submission into `folder`, which appears whole; the metrics with its kind and size."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    kind = "model" if deltas.dense else "adapter"
    try:
        if deltas.dense:
            _write_model(deltas, job, temporary)
        else:
            _write_adapter(deltas.network, job, temporary)
        size = sum(path.stat().st_size for path in temporary.iterdir())
        metrics = replace(metrics, kind=kind, bytes=size)
        (temporary / "README.md").write_text(card(job, plan, metrics))
        for path in temporary.iterdir():
            path.chmod(0o644)
            sync(path)
        sync(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(folder.parent)
    return metrics


def card(job: WorkerJob, plan: Plan, metrics: Metrics) -> str:
    """The README of a submission."""
    library = "peft" if metrics.kind == "adapter" else "transformers"
    lines = [
        "---",
        f"base_model: {json.dumps(job.model)}",
        f"library_name: {library}",
        "tags: [podium]",
        "---",
        "",
        f"# {job.model}, fine-tuned",
        "",
        f"- base model: `{job.model}`",
        f"- task: {job.task_type.value}, data as {job.file_format.value}",
        f"- profile: {plan.profile}; trained in {plan.dtype}",
        _losses(metrics),
        f"- {metrics.train_examples} rows, {metrics.tokens} tokens, {metrics.epochs:.2f} epochs, "
        f"{metrics.steps} steps, {metrics.train_s:.0f} s",
    ]
    if metrics.dropped_rows:
        dropped = "; ".join(f"{count} {reason}" for reason, count in sorted(metrics.dropped_rows.items()))
        lines.append(f"- rows not used: {dropped}")
    if plan.deviations:
        lines += ["", "## Where the plan differs from its profile", ""]
        lines += [f"- {d.what}: {d.got} instead of {d.wanted}, because {d.reason}" for d in plan.deviations]
    return "\n".join(lines) + "\n"


def _losses(metrics: Metrics) -> str:
    if metrics.final_loss is None:
        return f"- held-out loss: not measured (base model {metrics.base_loss:.4f})"
    return (
        f"- held-out loss: {metrics.final_loss:.4f} (base model {metrics.base_loss:.4f}, "
        f"{metrics.dev_examples} rows)"
    )


def verify(
    folder: Path, job: WorkerJob, dev: Examples, trained: Score | None, limit_s: float, device: torch.device
) -> str | None:
    """Reload the submission with stock transformers and peft and score development rows one by one.

    As many rows as `limit_s` allows, at least two. Returns what is wrong, or None. `trained` is the score of
    the same weights before the export; without it the files need only load and give finite losses.
    """
    try:
        model = _reload(folder, job).to(device)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        return f"the exported files don't load: {error}"
    losses: list[float] = []
    until = time.monotonic() + limit_s
    with torch.inference_mode():
        for index in range(len(dev)):
            if len(losses) >= 2 and time.monotonic() > until:
                break
            losses.append(_stock_loss(model, dev.take([index])))
    found = float(np.mean(losses))
    if not np.isfinite(found):
        return f"the exported files give a loss of {found}"
    wanted = float(trained.per_example[: len(losses)].mean()) if trained else found
    if abs(found - wanted) > tolerance(dev.take(np.arange(len(losses)))):
        return f"the exported files score {found:.4f} instead of {wanted:.4f} on {len(losses)} rows"
    return None


def _write_adapter(network: PeftModel, job: WorkerJob, folder: Path) -> None:
    state = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
    write_tensors(
        folder / "adapter_model.safetensors", {name: value.float() for name, value in state.items()}
    )
    config = copy.deepcopy(network.peft_config[ADAPTER])
    config.base_model_name_or_path = job.model  # never the local path: the scorer loads the base by this name
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _write_model(deltas: Deltas, job: WorkerJob, folder: Path) -> None:
    base = deltas.network.get_base_model() if isinstance(deltas.network, PeftModel) else deltas.network
    state = dict(full_state(base))
    split = split_torch_state_dict_into_shards(state, max_shard_size=SHARD)
    for name, keys in split.filename_to_tensors.items():
        write_tensors(folder / name, {key: state[key] for key in keys})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    config = stock_config(_original_config(base, job), job.model)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if base.generation_config is not None:
        base.generation_config.save_pretrained(folder)


def _original_config(base: Any, job: WorkerJob) -> dict[str, Any]:
    """The base model's own config.json; where it has none (GGUF), what transformers made of it."""
    path = Path(job.model_path) / "config.json"
    if not path.is_file():
        cached = cached_file(
            job.model_path, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
        path = Path(cached) if cached else path
    return json.loads(path.read_text()) if path.is_file() else base.config.to_dict()


def stock_config(config: dict[str, Any], model: str) -> dict[str, Any]:
    """A model's configuration in words that transformers 4 and 5 both understand.

    transformers 5 writes `rope_parameters` and `dtype`; 4.51, which upstream scores with, overlooks both and takes
    rotary base 10,000 for granted: a whole model would load and score like a broken one.
    """
    config = {name: value for name, value in config.items() if name not in ("dtype", "quantization_config")}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        del config["rope_parameters"]
        scaling = {name: value for name, value in rope.items() if name not in ROPE_OWN}
        config.update({name: rope[name] for name in ROPE_OWN if name in rope})
        config["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    return {**config, "_name_or_path": model, "torch_dtype": "bfloat16"}


def full_state(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All weights of the model in bf16, LoRA factors added to their matrices; tied weights once.

    Added, not merged in place: taking them out of bf16 weights again would not give the old ones back.
    """
    deltas = {
        f"{name}.base_layer.weight": module.get_delta_weight(ADAPTER)
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer)
    }
    seen: set[int] = set()
    for name, value in base.state_dict(keep_vars=True).items():
        if ".lora_" in name or (value.numel() and value.data_ptr() in seen):
            continue
        seen.add(value.data_ptr())
        full = value.detach().float() + deltas[name] if name in deltas else value.detach()
        dtype = torch.bfloat16 if full.is_floating_point() else full.dtype
        yield name.replace(".base_layer.", "."), full.detach().to(dtype).cpu()


def _reload(folder: Path, job: WorkerJob) -> nn.Module:
    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(load_model(job.model_path, torch.float32), str(folder)).eval()
    # bf16 weights computed in fp32: the rounding of the files shows, the rounding of the check does not.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()


def tolerance(rows: Examples) -> float:
    """How far the loss of an export may be from that of the trained model on these rows.

    A preference pair's loss follows the sum over its labels, times beta, at a slope of one half at most: a
    bf16 error of PER_LABEL in each of them may add up.
    """
    if rows.group == 1:
        return TOLERANCE
    return max(TOLERANCE, 0.5 * dpo.BETA * PER_LABEL * rows.label_tokens / len(rows))


def _stock_loss(model: Any, example: Examples) -> float:
    """The scorer's loss of one row, from plain logits."""
    if example.group == 1:
        return _nll(model, example.ids, example.labels, "mean")
    spans = [slice(start, end) for start, end in pairwise(example.offsets.tolist())]
    logp_D = torch.tensor([-_nll(model, example.ids[span], example.labels[span], "sum") for span in spans])
    reference = None if example.reference is None else torch.from_numpy(example.reference)
    return float(dpo.pair_losses(logp_D, reference))


def _nll(model: Any, ids: NDArray[np.int32], labels: NDArray[np.int32], reduction: str) -> float:
    """Negative log-likelihood of one document's labels."""
    ids_1T = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
    labels_T = torch.from_numpy(labels.astype(np.int64)).to(model.device)
    logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
    return float(nn.functional.cross_entropy(logits_TV[:-1], labels_T[1:], reduction=reduction))
