"""Make parts of a model trainable: LoRA factors next to its modules, or their own weights.

`Deltas.model` is what the loop calls with a Batch (see label_model.LabelModel); `Deltas.network` is the
Hugging Face or PEFT model inside it, for saving.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shared.errors import EngineError
from shared.messages.runs import ErrorCode
from shared.planning.plan import Plan
from trainer_node.engine.model.exactness import label_model
from trainer_node.engine.model.extras import ROUNDED, train_extras
from trainer_node.engine.model.fused_lora import fuse_lora
from trainer_node.engine.model.label_model import LabelModel
from trainer_node.engine.model.linears import trainable_linears

_RANDOM = re.compile(r"drop|jitter_noise")


@dataclass(frozen=True)
class Deltas:
    """The trainable part of a model: `parameters` by stable names (Hugging Face paths), always fp32."""

    model: LabelModel
    parameters: dict[str, nn.Parameter]
    lora: bool  # some modules have LoRA factors
    dense: bool  # some modules train their own weight
    targets: tuple[str, ...] = ()  # all trained modules in PEFT's words
    norms: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()  # the parameters that are embeddings, or the output matrix

    @property
    def network(self) -> nn.Module:
        """Return the PEFT model if there is LoRA, else the Hugging Face model: what is saved."""
        return self.model.network

    def param_groups(self, plan: Plan) -> list[dict[str, Any]]:
        """AdamW's groups, "lora", "dense", "norms" and "embeddings", each at its peak learning rate."""
        groups = {
            "lora": plan.lr_lora,
            "dense": plan.lr_dense,
            "norms": plan.lr_norms,
            "embeddings": plan.lr_embeddings,
        }
        members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
        for name, parameter in self.parameters.items():
            members[self._group_of(name)].append(parameter)
        return [
            {"name": name, "params": members[name], "lr": rate, "weight_decay": plan.weight_decay}
            for name, rate in groups.items()
            if members[name]
        ]

    def _group_of(self, name: str) -> str:
        if name in self.embeddings:
            return "embeddings"
        if name in self.norms:
            return "norms"
        return "lora" if ".lora_" in name else "dense"

    def state(self) -> dict[str, Tensor]:
        """Return the trainable weights themselves, detached: copy them if training goes on."""
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


def load_adapter(model: PreTrainedModel, folder: str) -> nn.Module:
    """Put a frozen PEFT adapter on a model. Raises EngineError(MODEL_UNAVAILABLE) without its files."""
    if not all(
        (Path(folder) / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")
    ):
        raise EngineError(
            ErrorCode.MODEL_UNAVAILABLE,
            f"no adapter in {folder}: adapter_config.json or adapter_model.safetensors missing",
        )
    with _peft_warnings_off():
        return peft.PeftModel.from_pretrained(model, folder).eval()


def add_deltas(model: PreTrainedModel, plan: Plan, seed: int) -> Deltas:
    """Freeze a model but for what the plan trains: LoRA factors next to a module, or its own weight.

    Load the model in the plan's dtype: frozen bf16 weights gave 200 tokens/s, fp32 ones under bf16 autocast
    142, all in fp32 92 (SmolLM2, LoRA r 16, one core). What is trained is fp32 in any case.
    Call it with the model on its device. The same seed gives the same factors on every device. One without
    weights stays unchecked (`exactness.choose_batching`), and LoRA's factors unset, until it has them.
    Raises EngineError(UNSUPPORTED) if the model lacks a module of the plan.
    """
    model.requires_grad_(False)
    no_dropout(model)
    targets = {linear.name: paths for linear, paths in trainable_linears(model).items()}
    if missing := [module.name for module in plan.modules if module.name not in targets]:
        raise EngineError(
            ErrorCode.UNSUPPORTED, f"{type(model).__name__} has no linear module {', '.join(missing)}"
        )
    dense = [
        model.get_submodule(path)
        for module in plan.modules
        if module.method == "dense"
        for path in targets[module.name]
    ]
    ranks = [module.name for module in plan.modules if module.method == "lora"]
    words = target_modules(model, {module.name: targets[module.name] for module in plan.modules})
    network: nn.Module = model
    if ranks:
        named = target_modules(model, {name: targets[name] for name in ranks})
        network = _with_lora(model, plan, named, seed)
    for linear in dense:
        linear.weight = nn.Parameter(linear.weight.detach().float())
    apart = train_extras(model, plan)
    if plan.activation_checkpointing:
        _recompute_activations(model)
    parameters = {
        stable_name(name): weight for name, weight in network.named_parameters() if weight.requires_grad
    }
    bf16 = plan.dtype == "bfloat16"
    empty = any(weight.is_meta for weight in network.parameters())
    labels = LabelModel(network, bf16) if empty else label_model(network, bf16=bf16)
    norms, embeddings = (
        frozenset(name for name, weight in parameters.items() if any(weight is one for one in kind))
        for kind in apart
    )
    return Deltas(labels, parameters, bool(ranks), bool(dense), tuple(words), norms, embeddings)


def _recompute_activations(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise EngineError(
            ErrorCode.UNSUPPORTED,
            f"{type(model).__name__} fits only if activations are computed twice, which its code can't do",
        )
    model.activation_checkpointing_enable()


def target_modules(model: PreTrainedModel, targets: dict[str, list[str]]) -> list[str]:
    """PEFT's words for kinds of modules: their names, or whole paths where others bear the names, too."""
    ends = tuple(f".{name}" for name in targets)
    found = [path for path, _ in model.named_modules() if f".{path}".endswith(ends)]
    paths = [path for those in targets.values() for path in those]
    return sorted(targets) if len(found) == len(paths) else sorted(paths)


def has_transposed(model: nn.Module) -> bool:
    """Return whether linear modules hold their weights as inputs x outputs, as GPT-2's do."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def no_dropout(model: PreTrainedModel) -> None:
    """Let a model train as it is scored: no dropout, no layer left out, no noise on a router's input.

    Fine-tuning is a few passes over the rows; and what is random differs between a batch and a document.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
    for holder in (*model.modules(), model.config, model.config.get_text_config()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and _RANDOM.search(name):
                setattr(holder, name, 0.0)


def _with_lora(model: PreTrainedModel, plan: Plan, targets: list[str], seed: int) -> peft.PeftModel:
    ranks = {module.name: module for module in plan.modules if module.method == "lora"}
    first = next(iter(ranks.values()))
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=first.rank,
        lora_alpha=first.alpha,
        rank_pattern={name: module.rank for name, module in ranks.items() if module.rank != first.rank},
        alpha_pattern={name: module.alpha for name, module in ranks.items() if module.alpha != first.alpha},
        target_modules=targets,
        fan_in_fan_out=has_transposed(model),
        lora_dropout=plan.dropout,
        bias="none",
    )
    with _peft_warnings_off():
        network = peft.get_peft_model(model, config)  # keeps its factors in fp32 also where the model is bf16
    weights = dict(network.named_parameters())
    if any(weight.is_meta for weight in weights.values()):
        _empty_factors(network)
    else:
        for name, start in lora_starts(network, seed):
            weights[name].data.copy_(start)
    for layer in network.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.cast_input_dtype_enabled = (
                False  # autocast does it: PEFT's detour over fp32 copies every input
            )
    fuse_lora(network)
    return network


def _empty_factors(network: nn.Module) -> None:
    """Put LoRA's factors on the meta device, too, until their model gets its weights."""
    for layer in network.modules():
        for name, weight in layer._parameters.items():
            if weight is not None and not weight.is_meta:
                layer._parameters[name] = nn.Parameter(weight.to("meta"), weight.requires_grad)


def lora_starts(network: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield LoRA's first factors by their names: PEFT's own start, but from the seed: equal everywhere."""
    random = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if ".lora_A." in name:
            start = torch.empty(weight.shape).uniform_(-1, 1, generator=random)
            yield name, start / math.sqrt(weight.shape[1])


@contextmanager
def _peft_warnings_off() -> Iterator[None]:
    """PEFT 0.21 reads an attribute that transformers 5.23 calls deprecated; neither is ours to mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def stable_name(name: str) -> str:
    """Return a parameter's name as in the Hugging Face model, without what PEFT and rounding add to it."""
    name = name.removeprefix("base_model.model.").replace(".default.", ".").replace(".base_layer.", ".")
    return ROUNDED.sub(r".\1", name)
