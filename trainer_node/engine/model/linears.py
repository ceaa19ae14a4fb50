"""Find the linear modules that are trained: by where they are and what they do, not by their names.

They are those inside a decoder's layers. Embeddings, the head, a vision tower and routers stay as they are.
Layers of experts that are one tensor for all experts are no linear modules, and stay as they are, too, as do
the other feed-forward modules of such a model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shared.planning.model_shape import Linear

# PEFT takes these names for those of single experts, wherever they are, and puts its factors on the tensors
# that hold all experts.
EXPERTS = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")
SMALLEST = 8  # inputs or outputs; below are gates, which hold next to no weights


class LinearPlace(NamedTuple):
    """One linear module: its path in the model, and its sizes."""

    path: str
    in_features: int
    out_features: int


def sizes(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear module; GPT-2's hold their weights the other way round."""
    weight: Any = linear.weight
    rows, columns = weight.shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def trainable_linears(model: PreTrainedModel) -> dict[Linear, list[str]]:
    """Each kind of linear module in the decoder's layers, with the paths of its modules.

    A kind's name is the shortest end of a path that none of the other kinds has: `q_proj`, or `attn.c_proj`
    next to `mlp.c_proj`. A model on the meta device will do.
    """
    layers, stack = layers_of(model)
    taken = EXPERTS if expert_tensors(stack) else ()
    places = [
        LinearPlace(f"{layers}.{path}", *sizes(module))
        for path, module in stack.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and path.rpartition(".")[2] not in taken
        and _is_called(stack, path)
        and min(sizes(module)) >= SMALLEST
    ]
    groups = _groups(layers, places)
    return {
        Linear(_shortest(name, groups), found[0].in_features, found[0].out_features, len(found)): [
            place.path for place in found
        ]
        for name, found in groups.items()
    }


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the decoder's layers and their path in the model; LookupError if it has none."""
    decoder = model.get_decoder()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(module is part for part in decoder.children()):
            return path, module
    raise LookupError(f"{type(decoder).__name__} has no list of layers")


def expert_tensors(layers: nn.Module) -> list[nn.Parameter]:
    """Return the tensors that hold a matrix for each of several experts."""
    return [
        weight for weight in layers.parameters() if weight.dim() == 3 and min(weight.shape[1:]) >= SMALLEST
    ]


def _is_called(layers: nn.Module, path: str) -> bool:
    """Return whether a module is called as a module in every case.

    Next to a convolution along the text, kernels are given all weights but those of the first product; a LoRA
    factor next to the others would train on one machine and be overlooked on another.
    """
    above, _, name = path.rpartition(".")
    parts = layers.get_submodule(above).children()
    return name.startswith("in_proj") or not any(isinstance(part, nn.Conv1d) for part in parts)


def _groups(layers: str, places: list[LinearPlace]) -> dict[str, list[LinearPlace]]:
    """Modules by their path within a layer; one by one where their sizes differ from layer to layer."""
    groups: dict[str, list[LinearPlace]] = {}
    for place in places:
        groups.setdefault(place.path.removeprefix(f"{layers}.").partition(".")[2], []).append(place)
    for name, found in list(groups.items()):
        if len({(place.in_features, place.out_features) for place in found}) > 1:
            del groups[name]
            groups.update({place.path: [place] for place in found})
    return groups


def _shortest(name: str, groups: dict[str, list[LinearPlace]]) -> str:
    """Return the shortest end of a kind's name that no module of another kind has."""
    others = [f".{place.path}" for other, found in groups.items() if other != name for place in found]
    parts = name.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if not any(path.endswith(f".{end}") for path in others):
            return end
    return name
