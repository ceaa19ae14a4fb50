"""What is submitted, as stock files: a PEFT adapter, or the whole model where that is smaller."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from msgspec.structs import replace
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from shared.files import sync, write_atomically
from shared.messages.runs import Metrics, WorkerJob
from shared.planning.plan import Plan
from trainer_node.engine.damage.repair import restores_frozen
from trainer_node.engine.export.dense_as_lora import factors, fit_better, rank_of
from trainer_node.engine.export.verify import UnverifiedError, verify
from trainer_node.engine.model.adapters import Deltas, has_transposed, stable_name
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.safetensors_file import write_tensors

__all__ = ["UnverifiedError", "card", "describe", "full_state", "verify", "write"]

SHARD = "5GB"
README = "README.md"
ADAPTER = "default"
ROPE_OWN = ("rope_theta", "partial_rotary_factor")  # in transformers 4 fields of their own


def write(deltas: Deltas, plan: Plan, job: WorkerJob, metrics: Metrics, folder: Path) -> Metrics:
    """Write the submission into `folder`, which appears whole; the metrics with its kind and size."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    whole = (
        (deltas.dense and not fit_better(plan, base_of(deltas)))
        or plan.extras.parameters > 0
        or is_renamed(deltas)
        or restores_frozen(plan.repair, set(deltas.parameters))
    )
    try:
        if whole:
            write_model(base_of(deltas), job, temporary)
        else:
            _write_adapter(deltas, plan, job, temporary)
        kind = "model" if whole else "adapter"
        return complete(temporary, folder, plan, job, replace(metrics, kind=kind))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def complete(temporary: Path, folder: Path, plan: Plan, job: WorkerJob, metrics: Metrics) -> Metrics:
    """Add the README to written files, and let the folder appear; the metrics with its size."""
    metrics = replace(metrics, bytes=sum(path.stat().st_size for path in temporary.iterdir()))
    (temporary / README).write_text(card(job, plan, metrics))
    for path in temporary.iterdir():
        path.chmod(0o644)
        sync(path)
    sync(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    sync(folder.parent)
    return metrics


def describe(folder: Path, plan: Plan, job: WorkerJob, metrics: Metrics) -> None:
    """Write the README of a submission that is on disk again."""
    write_atomically(folder / README, card(job, plan, metrics).encode())
    (folder / README).chmod(0o644)


def card(job: WorkerJob, plan: Plan, metrics: Metrics) -> str:
    """Return the README of a submission."""
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
    if metrics.copied_rows:
        lines.append(f"- rows that are the same as an earlier one, or nearly: {metrics.copied_rows}")
    if metrics.skipped_steps:
        lines.append(f"- steps without a finite gradient, which changed nothing: {metrics.skipped_steps}")
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


def base_of(deltas: Deltas) -> Any:
    """Return the Hugging Face model, with LoRA layers inside if there are any."""
    return deltas.network.get_base_model() if isinstance(deltas.network, PeftModel) else deltas.network


def _write_adapter(deltas: Deltas, plan: Plan, job: WorkerJob, folder: Path) -> None:
    state: dict[str, Tensor] = {}
    if deltas.lora:
        lora = get_peft_model_state_dict(deltas.network, adapter_name=ADAPTER, save_embedding_layers=False)
        state = {name: value.float() for name, value in lora.items()}
    if deltas.dense:
        state |= _dense_factors(deltas, plan, job)
    write_tensors(folder / "adapter_model.safetensors", state)
    adapter_config(deltas, plan, job).save_pretrained(str(folder))


def _dense_factors(deltas: Deltas, plan: Plan, job: WorkerJob) -> dict[str, Tensor]:
    """Return the changes of dense matrices, relative to the base model as the scorer loads it: in bf16.

    Changed to what products were computed with: weights that were rounded to bf16 in every step have learnt
    to be rounded, and score .026 worse without (docs/experiments.md).
    """
    computed = getattr(torch, plan.dtype)
    before = load_model(job.model_path, torch.bfloat16).state_dict()
    state: dict[str, Tensor] = {}
    for name in deltas.parameters:
        if ".lora_" in name:
            continue
        path = name.removesuffix(".weight")
        module = base_of(deltas).get_submodule(path)
        trained, known = module.weight.to(computed), before[name]
        if isinstance(module, Conv1D):  # the other way round; PEFT's factors never are
            trained, known = trained.T, known.T
        a, b = factors(trained, known)
        state[f"base_model.model.{path}.lora_A.weight"] = a
        state[f"base_model.model.{path}.lora_B.weight"] = b
    return state


def adapter_config(deltas: Deltas, plan: Plan, job: WorkerJob) -> LoraConfig:
    """Return the configuration of an adapter with all that was trained."""
    dense = {module.name: rank_of(module) for module in plan.modules if module.method == "dense"}
    if deltas.lora:
        config = copy.deepcopy(deltas.network.peft_config[ADAPTER])
    else:
        rank = next(iter(dense.values()))
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, bias="none")
        config.fan_in_fan_out = has_transposed(base_of(deltas))
    config.target_modules = list(deltas.targets)
    config.rank_pattern = {**config.rank_pattern, **dense}
    config.alpha_pattern = {**config.alpha_pattern, **dense}  # equal to the rank: factors at their own size
    config.base_model_name_or_path = job.model  # never the local path: the scorer loads the base by this name
    config.inference_mode = True
    return config


def write_model(base: Any, job: WorkerJob, folder: Path) -> None:
    """Write a whole model: weights in bf16, as published, and the configuration; no tokenizer."""
    state = as_published(base, dict(full_state(base)))
    split = split_torch_state_dict_into_shards(state, max_shard_size=SHARD)
    for name, keys in split.filename_to_tensors.items():
        write_tensors(folder / name, {key: state[key] for key in keys})
    write_configs(base, job, split, folder)


def write_configs(base: Any, job: WorkerJob, split: Any, folder: Path) -> None:
    """Write what belongs to a whole model's weights, which are `split` into files."""
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    config = model_config(base, job)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if base.generation_config is not None:
        base.generation_config.save_pretrained(folder)


def as_published(base: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names and in the tensors that the model is published in.

    transformers 5 renames some models' parts and joins experts while it loads. transformers 4 and other
    readers know the published form only.
    """
    published: dict[str, Tensor] = revert_weight_conversion(base, state)
    return {name: tensor.contiguous() for name, tensor in published.items()}


def is_renamed(deltas: Deltas) -> bool:
    """Return whether a trained module is published under another name, which an adapter would miss.

    Another version of transformers may not have that name, and PEFT would overlook the factors.
    """
    base = base_of(deltas)
    trained = {f"{name.partition('.lora_')[0].removesuffix('.weight')}.weight" for name in deltas.parameters}
    empty = {
        stable_name(name): torch.empty(value.shape, device="meta")
        for name, value in base.state_dict().items()
        if ".lora_" not in name
    }
    return not trained <= as_published(base, empty).keys()


def full_state(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return all weights of the model, LoRA factors added to their matrices; tied ones once.

    In bf16, but for those that the model's own code keeps in fp32, such as some routers.

    Added, not merged in place: taking them out of bf16 weights again would not give the old ones back.
    """
    layers = {
        f"{name}.base_layer.weight": module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer)
    }
    exact = kept_in_fp32(base)
    seen: set[int] = set()
    for name, value in base.state_dict(keep_vars=True).items():
        if ".lora_" in name or (value.numel() and value.data_ptr() in seen):
            continue
        seen.add(value.data_ptr())
        full = value.detach()
        if layer := layers.get(name):
            full = full.float() + layer.get_delta_weight(ADAPTER)
        plain = stable_name(name)
        dtype = torch.bfloat16 if full.is_floating_point() and plain not in exact else full.dtype
        yield plain, full.detach().to(dtype).cpu()


def kept_in_fp32(base: nn.Module) -> set[str]:
    """Return the weights that stay fp32 where a model is loaded in bf16; none of what is no stock model."""
    if not isinstance(base, PreTrainedModel):
        return set()
    with torch.device("meta"):
        loaded = AutoModelForCausalLM.from_config(base.config, dtype=torch.bfloat16)
    named = loaded._keep_in_fp32_modules_strict or ()
    return {
        name
        for name, value in loaded.state_dict().items()
        if value.dtype == torch.float32 or any(f".{part}." in f".{name}." for part in named)
    }


def model_config(base: Any, job: WorkerJob) -> dict[str, Any]:
    """Return the config.json of a whole model that was trained from `base`."""
    return stock_config(_original(base, job), job.model)


def _original(base: Any, job: WorkerJob) -> dict[str, Any]:
    """Return the base model's own config.json; without one (GGUF), what transformers made of it."""
    path = Path(job.model_path) / "config.json"
    if not Path(job.model_path).exists():
        cached = cached_file(
            job.model_path, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
        path = Path(cached) if cached else path
    return json.loads(path.read_text()) if path.is_file() else base.config.to_dict()


def stock_config(config: dict[str, Any], model: str) -> dict[str, Any]:
    """Return a model's configuration in terms that transformers 4 and 5 both understand.

    transformers 5 writes `rope_parameters` and `dtype`; 4.51, which upstream scores with, overlooks both and
    takes rotary base 10,000 for granted: a whole model would load and score like a broken one.
    """
    config = {name: value for name, value in config.items() if name not in ("dtype", "quantization_config")}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        del config["rope_parameters"]
        scaling = {name: value for name, value in rope.items() if name not in ROPE_OWN}
        config.update({name: rope[name] for name in ROPE_OWN if name in rope})
        config["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    return {**config, "_name_or_path": model, "torch_dtype": "bfloat16"}
