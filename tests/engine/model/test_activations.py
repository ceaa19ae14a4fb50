"""What the planner says is kept for the backward pass, against what autograd keeps, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from bench.performance.memory import plan_of
from shared.planning.memory_fit import Layout, activation_bytes, split
from shared.planning.profiles import resolve
from trainer_node.engine.model.adapters import add_deltas
from trainer_node.engine.model.shape import shape_of

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
LAYOUT = Layout(capacity=1, parallel="single", devices=1, checkpointing=False, dtype="bfloat16", cpu=False)


def kept(
    kind: type[PretrainedConfig], layers: int, tokens: int, rank: int, dropout: float
) -> tuple[int, int]:
    """Bytes that autograd keeps for a pack of so many tokens, and the planner's for one token."""
    config = kind(**SIZES, num_hidden_layers=layers, head_dim=64, vocab_size=512, tie_word_embeddings=True)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shape = shape_of(network)
    modules = split(shape, resolve("maximum_accuracy" if rank > 256 else "lora_r16"), rank)
    plan = replace(plan_of("smollm2-135m", "LoRA 16"), modules=modules, dropout=dropout)
    deltas = add_deltas(network, plan, 0)
    deltas.model.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in deltas.model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            found[place] = tensor
        return tensor

    hooks: Any = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        network.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    size = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    return size, activation_bytes(shape, modules, LAYOUT, dropout)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize(("rank", "dropout"), [(8, 0.0), (16, 0.0), (16, 0.05), (8192, 0.0)])
def test_a_layer_keeps_what_the_planner_says(kind: type[PretrainedConfig], rank: int, dropout: float) -> None:
    def layer(tokens: int) -> int:
        return kept(kind, 3, tokens, rank, dropout)[0] - kept(kind, 2, tokens, rank, dropout)[0]

    measured = (layer(256) - layer(128)) / 128  # without the 16-bit copies of weights
    planned = kept(kind, 3, 8, rank, dropout)[1] - kept(kind, 2, 8, rank, dropout)[1]
    # A mask of dropout is counted with two bytes for each value; a bool takes one.
    assert -0.01 <= planned / measured - 1.0 <= (0.25 if dropout else 0.01)
