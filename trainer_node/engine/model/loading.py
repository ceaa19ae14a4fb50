"""Load a model, and make parts of it trainable.

`Deltas.model` is what the loop calls with a Batch (see network.LabelModel); `Deltas.network` is the Hugging
Face or PEFT model inside it, for saving.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from shared.errors import EngineError, PlanError
from shared.messages import ErrorCode
from shared.planning.model_shape import ModelShape, shape_from_config
from shared.planning.plan import Plan
from trainer_node.engine.data import hf_datasets as hub
from trainer_node.engine.model.fused_lora import fuse_lora
from trainer_node.engine.model.label_model import LabelModel, label_model

HINT = "name its folder in PODIUM_MODELS, put it below PODIUM_MODELS_DIR, or make the hub reachable"


# --- loading


def load_config(path: str) -> PretrainedConfig:
    """The configuration of a model: a folder, a GGUF file (or a folder that holds one), or a hub id."""
    return _load(AutoConfig, path)


def load_tokenizer(path: str) -> Any:
    """The model's own tokenizer, as the scorer uses it."""
    return _load(AutoTokenizer, path)


def load_model(path: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """A causal language model on the CPU with weights in `dtype`, from safetensors or GGUF only.

    Raises EngineError: MODEL_UNAVAILABLE if there are no such weights, UNSUPPORTED if their kind is unknown.
    """
    kind = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    if _gguf(path) is None:
        return _load(AutoModelForCausalLM, path, dtype=kind, use_safetensors=True).eval()
    # Without dequantize=True the weights stay packed 4-bit tensors, which can be neither trained nor saved.
    model = _load(
        AutoModelForCausalLM, path, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    for parameter in model.parameters():  # not model.to(): the rotary frequencies must stay fp32
        parameter.data = parameter.data.to(kind)
    return model.eval()


def load_adapter(model: PreTrainedModel, folder: str) -> nn.Module:
    """A model with a frozen PEFT adapter on it; EngineError(MODEL_UNAVAILABLE) if its files aren't there."""
    if not all(
        (Path(folder) / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")
    ):
        raise EngineError(
            ErrorCode.MODEL_UNAVAILABLE,
            f"no adapter in {folder}: adapter_config.json or adapter_model.safetensors missing",
        )
    with _peft_warnings_off():
        return peft.PeftModel.from_pretrained(model, folder).eval()


def model_shape(config: PretrainedConfig) -> ModelShape:
    """The sizes the planner needs; EngineError(UNSUPPORTED) for a model it doesn't know."""
    try:
        return shape_from_config(config.to_dict())
    except PlanError as error:
        raise EngineError(ErrorCode.UNSUPPORTED, f"model type {config.model_type!r}: {error}") from error


def _gguf(path: str) -> Path | None:
    """The GGUF file that a path means, if it means one."""
    place = Path(path)
    if place.suffix == ".gguf" and place.is_file():
        return place
    if place.is_dir() and not (place / "config.json").is_file():
        return next(iter(sorted(place.glob("*.gguf"))), None)
    return None


def _is_local(path: str) -> bool:
    """Whether a path can only mean a place on this machine, not a model of the hub."""
    return path.startswith(("/", ".", "~")) or path.endswith(".gguf")


def _load(factory: Any, path: str, **options: Any) -> Any:
    """`from_pretrained` without remote code, with errors that say what was tried and what to do."""
    place = Path(path)
    if gguf := _gguf(path):
        path, options["gguf_file"] = str(gguf.parent), gguf.name
    elif (place.is_dir() or _is_local(path)) and not (place / "config.json").is_file():
        what = "has no config.json and no GGUF file" if place.is_dir() else "doesn't exist"
        raise EngineError(ErrorCode.MODEL_UNAVAILABLE, f"no model at {path}: it {what}; {HINT}")
    elif not place.is_dir() and not hub.is_reachable():
        options["local_files_only"] = True  # or the library tries each file for half a minute
    disable_progress_bar()  # a worker's log is a file
    try:
        return factory.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        text = " ".join(str(error).split())[:300].rstrip(".")
        if any(sign in str(error) for sign in ("trust_remote_code", "does not recognize this architecture")):
            raise EngineError(
                ErrorCode.UNSUPPORTED, f"{path} needs code that Podium doesn't run: {text}"
            ) from error
        if options.get("local_files_only"):
            message = f"{path} is not on this machine, and the hub doesn't answer; {HINT}"
            raise EngineError(ErrorCode.MODEL_UNAVAILABLE, message) from error
        tried = "its folder" if place.is_dir() else "the local cache and the hub"
        message = f"can't load {path} (tried {tried}; safetensors and GGUF only): {text}; {HINT}"
        raise EngineError(ErrorCode.MODEL_UNAVAILABLE, message) from error


# --- training


@dataclass(frozen=True)
class Deltas:
    """The trainable part of a model: `parameters` by stable names (Hugging Face paths), always fp32."""

    model: LabelModel
    parameters: dict[str, nn.Parameter]
    lora: bool  # some modules have LoRA factors
    dense: bool  # some modules train their own weight

    @property
    def network(self) -> nn.Module:
        """The PEFT model if there is LoRA, else the Hugging Face model: what is saved."""
        return self.model.network

    def param_groups(self, plan: Plan) -> list[dict[str, Any]]:
        """AdamW's groups, named "lora" and "dense", each at its peak learning rate."""
        groups = {"lora": plan.lr_lora, "dense": plan.lr_dense}
        members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
        for name, parameter in self.parameters.items():
            members["lora" if ".lora_" in name else "dense"].append(parameter)
        return [
            {"name": name, "params": members[name], "lr": rate, "weight_decay": plan.weight_decay}
            for name, rate in groups.items()
            if members[name]
        ]

    def state(self) -> dict[str, Tensor]:
        """The trainable weights themselves, detached: copy them if training goes on."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Set all trainable weights; ValueError if names or shapes differ."""
        if state.keys() != self.parameters.keys():
            raise ValueError(f"other trainable weights: {sorted(state.keys() ^ self.parameters.keys())[:4]}")
        for name, parameter in self.parameters.items():
            if state[name].shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(state[name])


def add_deltas(model: PreTrainedModel, plan: Plan, seed: int) -> Deltas:
    """Freeze a model but for what the plan trains: LoRA factors next to a module, or its own weight.

    Load the model in the plan's dtype: frozen bf16 weights gave 200 tokens/s, fp32 ones under bf16 autocast
    142, all in fp32 92 (SmolLM2, LoRA r 16, one core). What is trained is fp32 in any case.
    Call it with the model on its device. The same seed gives the same factors on every device.
    Raises EngineError(UNSUPPORTED) if the model lacks a module of the plan.
    """
    model.requires_grad_(False)
    targets: dict[str, list[nn.Linear]] = {module.name: [] for module in plan.modules}
    for path, linear in model.named_modules():
        name = path.rpartition(".")[2]
        if name in targets and isinstance(linear, nn.Linear):
            targets[name].append(linear)
    if missing := [name for name, found in targets.items() if not found]:
        raise EngineError(
            ErrorCode.UNSUPPORTED, f"{type(model).__name__} has no linear module {', '.join(missing)}"
        )
    ranks = {module.name: module for module in plan.modules if module.method == "lora"}
    dense = [linear for name, found in targets.items() if name not in ranks for linear in found]
    network: nn.Module = model
    if ranks:
        network = _with_lora(model, plan, seed)
    for linear in dense:
        linear.weight = nn.Parameter(linear.weight.detach().float())
    if plan.activation_checkpointing:
        model.activation_checkpointing_enable()
    parameters = {
        _stable(name): weight for name, weight in network.named_parameters() if weight.requires_grad
    }
    return Deltas(label_model(network, bf16=plan.dtype == "bfloat16"), parameters, bool(ranks), bool(dense))


def _with_lora(model: PreTrainedModel, plan: Plan, seed: int) -> peft.PeftModel:
    ranks = {module.name: module for module in plan.modules if module.method == "lora"}
    first = next(iter(ranks.values()))
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=first.rank,
        lora_alpha=first.alpha,
        rank_pattern={name: module.rank for name, module in ranks.items() if module.rank != first.rank},
        alpha_pattern={name: module.alpha for name, module in ranks.items() if module.alpha != first.alpha},
        target_modules=sorted(ranks),
        lora_dropout=plan.dropout,
        bias="none",
    )
    with _peft_warnings_off():
        network = peft.get_peft_model(model, config)  # keeps its factors in fp32 also where the model is bf16
    random = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if ".lora_A." in name:  # PEFT's own start, but from the seed and on the CPU: equal on every device
            weight.data.copy_(
                torch.empty(weight.shape).uniform_(-1, 1, generator=random) / math.sqrt(weight.shape[1])
            )
    for layer in network.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.cast_input_dtype_enabled = (
                False  # autocast does it: PEFT's detour over fp32 copies every input
            )
    fuse_lora(network)
    return network


@contextmanager
def _peft_warnings_off() -> Iterator[None]:
    """PEFT 0.21 reads an attribute that transformers 5.23 calls deprecated; neither is ours to mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _stable(name: str) -> str:
    """A parameter's name as in the Hugging Face model, without PEFT's prefix and adapter name."""
    return name.removeprefix("base_model.model.").replace(".default.", ".").replace(".base_layer.", ".")
