"""What is trained whole besides the linear modules: norms, embeddings and the output matrix.

They are trained in fp32, and what is computed with them is rounded as the exported model's weights are:
matrix products round for themselves under autocast, norms and embeddings do not.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from shared.planning.plan import Plan

# torch makes a class for each module whose weight is rounded. The compiler would compile every layer again
# for the classes of its norms, and give up after eight: those of one kind share the first one's.
_CLASSES: dict[tuple[Any, ...], type] = {}
ROUNDED = re.compile(r"\.parametrizations\.(\w+)\.original$")  # the end of a rounded weight's own name


class Rounded(nn.Module):
    """Hand a weight on in the dtype that it was loaded in; its gradient comes back in its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight."""
        return weight.to(self.dtype)


class Apart(NamedTuple):
    """The trained weights that have rates of their own."""

    norms: list[nn.Parameter]
    embeddings: list[nn.Parameter]  # and the output matrix, unless it is the same


def train_extras(model: PreTrainedModel, plan: Plan) -> Apart:
    """Let the plan's extras be trained, and return them.

    Sharded weights are rounded where they are gathered.
    """
    rounds = plan.parallel != "fsdp2"
    norms, embeddings = list[nn.Parameter](), list[nn.Parameter]()
    if plan.extras.norms:
        for norm in norms_of(model):
            norms += _train(norm, list(weights_of(norm)), rounds=rounds)
    if plan.extras.embeddings:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = embedding.weight is head.weight
        embeddings = _train(embedding, ["weight"], rounds=rounds)
        if tied:
            head.weight = embeddings[0]
        else:
            embeddings += _train(head, ["weight"], rounds=False)  # a product rounds for itself
    return Apart(norms, embeddings)


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


def _train(module: nn.Module, names: list[str], *, rounds: bool) -> list[nn.Parameter]:
    """Replace a module's weights by some in fp32; return those."""
    plain, found, rounded = type(module), list[nn.Parameter](), list[str]()
    for name in names:
        before = module._parameters[name]
        assert before is not None
        found.append(nn.Parameter(before.detach().float()))
        module._parameters[name] = found[-1]
        if rounds and before.dtype != torch.float32:
            # Unsafe: another dtype comes out than goes in.
            parametrize.register_parametrization(module, name, Rounded(before.dtype), unsafe=True)
            rounded.append(name)
    if rounded:
        module.__class__ = _CLASSES.setdefault((plain, *rounded), type(module))
    return found
