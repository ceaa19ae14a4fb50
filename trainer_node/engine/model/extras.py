"""What is trained whole besides the linear modules: norms, embeddings and the output matrix.

They are trained in fp32, and what is computed with them is rounded as the exported model's weights are:
matrix products round for themselves under autocast, norms and embeddings do not.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from shared.planning.plan import Plan

ROUNDED = re.compile(r"\.parametrizations\.(\w+)\.original$")  # the end of a rounded weight's own name


class Rounded(nn.Module):
    """Hand a weight on in the dtype that it was loaded in; its gradient comes back in its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight."""
        return weight.to(self.dtype)


def train_extras(model: PreTrainedModel, plan: Plan) -> list[nn.Parameter]:
    """Let the plan's extras be trained; return the embeddings and the output matrix among them.

    Sharded weights are rounded where they are gathered.
    """
    rounds = plan.parallel != "fsdp2"
    if plan.extras.norms:
        for norm in norms_of(model):
            for name in list(weights_of(norm)):
                _train(norm, name, rounds=rounds)
    if not plan.extras.embeddings:
        return []
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    trained = _train(embedding, "weight", rounds=rounds)
    if tied:
        head.weight = trained
        return [trained]
    return [trained, _train(head, "weight", rounds=False)]  # a product rounds for itself


def norms_of(model: PreTrainedModel) -> list[Any]:
    """Return the decoder's norms that have weights: those in its layers, and the last one."""
    return [
        module
        for module in model.get_decoder().modules()
        if type(module).__name__.endswith("Norm") and weights_of(module)
    ]


def weights_of(norm: nn.Module) -> dict[str, nn.Parameter]:
    """Return a norm's own weights: a factor for each number, and in some models a bias."""
    return dict(norm.named_parameters(recurse=False))


def _train(module: nn.Module, name: str, *, rounds: bool) -> nn.Parameter:
    """Replace a module's weight by one in fp32; return that."""
    before = module._parameters[name]
    assert before is not None
    trained = nn.Parameter(before.detach().float())
    module._parameters[name] = trained
    if rounds and before.dtype != torch.float32:
        # Unsafe: another dtype comes out than goes in.
        parametrize.register_parametrization(module, name, Rounded(before.dtype), unsafe=True)
    return trained
