"""A model's shape, from the model itself without its weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from shared.errors import EngineError
from shared.messages.runs import ErrorCode
from shared.planning.architectures import is_held_whole
from shared.planning.model_shape import ModelShape
from shared.planning.profiles import family_of
from trainer_node.engine.model.extras import norms_of, weights_of
from trainer_node.engine.model.linears import expert_tensors, layers_of, trainable_linears

HEAD = 64  # of a model without attention: only the packs' limits depend on it
POSITIONS = 4096  # of a model whose config doesn't say

_known: dict[str, ModelShape] = {}  # by config: a plan is drawn several times in a run


def model_shape(config: PretrainedConfig) -> ModelShape:
    """Return the sizes the planner needs; EngineError(UNSUPPORTED) for a model that can't be trained."""
    text = config.to_json_string(use_diff=False)
    if text not in _known:
        try:
            _known[text] = shape_of(outline_of(config))
        except Exception as error:  # whatever an odd config brings a model's code to
            cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            what = f"model type {config.model_type!r} can't be trained: {cause}"
            raise EngineError(ErrorCode.UNSUPPORTED, what) from error
    return _known[text]


def outline_of(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def heads_of(config: PretrainedConfig) -> tuple[int, int]:
    """Return the number of attention heads, and the size of one."""
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    heads = _whole(text, "num_attention_heads", max(1, hidden // HEAD))
    return heads, _whole(text, "head_dim", max(1, hidden // heads))


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Return the sizes of a model; one on the meta device will do."""
    config = model.config.get_text_config()
    linears = tuple(trainable_linears(model))
    if not linears:
        raise LookupError(f"{type(model).__name__} has no linear modules in its layers")
    _, layers = layers_of(model)
    heads, head_dim = heads_of(model.config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return ModelShape(
        hidden=int(config.hidden_size),
        layers=len(layers),
        intermediate=max(_used_experts(config), *(linear.in_features for linear in linears), 1),
        heads=heads,
        kv_heads=_whole(config, "num_key_value_heads", _whole(config, "num_kv_heads", heads)),
        head_dim=head_dim,
        vocab=int(embedding.shape[0]),
        tied=head is embedding,
        head_norms=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        layer_norms=_norms(layers[0], int(config.hidden_size)),
        max_positions=_whole(config, "max_position_embeddings", POSITIONS),
        family=family_of(str(config.model_type)),
        own_linears=linears,
        own_parameters=sum(weight.numel() for weight in model.parameters()),
        own_norm_parameters=sum(
            weight.numel() for norm in norms_of(model) for weight in weights_of(norm).values()
        ),
        idle_parameters=_idle(model, config),
        whole=is_held_whole(model.config.to_dict()),
    )


def _norms(layer: Any, hidden: int) -> int:
    """Return how many norms over the hidden size a layer has."""
    found = [module for name, module in layer.named_modules() if name.rpartition(".")[2].endswith("norm")]
    weights = [getattr(module, "weight", None) for module in found]  # some norms have none
    return sum(weight is not None and tuple(weight.shape) == (hidden,) for weight in weights)


def _idle(model: PreTrainedModel, config: Any) -> int:
    """Weights of experts that a token doesn't meet: those of all experts are one tensor in each layer."""
    used = _whole(config, "num_experts_per_tok", 0)
    _, layers = layers_of(model)
    experts = expert_tensors(layers)
    return (
        sum(weight.numel() * max(0, len(weight) - used) // len(weight) for weight in experts) if used else 0
    )


def _used_experts(config: Any) -> int:
    """Width of all experts together that a token meets; 0 without experts."""
    width = _whole(config, "moe_intermediate_size", _whole(config, "intermediate_size", 0))
    return _whole(config, "num_experts_per_tok", 0) * width


def _whole(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else default
