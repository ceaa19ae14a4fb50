"""An adapter that changes nothing, written within a second: the submission until a better one is there.

A container that is killed before training has shown anything would otherwise leave no submission, which costs
a point; this one scores as the base model does. Only the headers of the weights are read, and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from shared.errors import PodiumError
from trainer_node.contest.safetensors_file import BrokenFileError, read_shapes, write_zeros

# A linear module of an attention block, by the names that families give it; the first that is there is used.
LINEARS: Final = ("q_proj", "qkv_proj", "query_key_value", "Wqkv", "wqkv", "query", "o_proj", "out_proj")
TRANSPOSED: Final = ("c_attn",)  # [inputs, outputs], as GPT-2's Conv1D has it
FAILURES: Final = (OSError, ValueError, BrokenFileError)


class NoAdapterError(PodiumError):
    """No adapter can be written for a model without reading its weights."""


def module_shapes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, tuple[int, int]]]:
    """Return a kind of linear module, and (inputs, outputs) of each module of that kind by its path."""
    for kind in (*LINEARS, *TRANSPOSED):
        ending = f".{kind}.weight"
        found = {
            name.removesuffix(".weight"): shape
            for name, shape in shapes.items()
            if name.endswith(ending) and len(shape) == 2
        }
        if found:
            sizes = {path: (rows, columns) for path, (rows, columns) in found.items()}
            if kind in LINEARS:
                sizes = {path: (columns, rows) for path, (rows, columns) in sizes.items()}
            return kind, sizes
    raise NoAdapterError(f"none of the weights is named like {', '.join((*LINEARS, *TRANSPOSED))}")


def factors(modules: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of rank-1 factors by the names that PEFT gives them."""
    return {
        f"base_model.model.{path}.lora_{side}.weight": shape
        for path, (inputs, outputs) in sorted(modules.items())
        for side, shape in (("A", (1, inputs)), ("B", (outputs, 1)))
    }


def adapter_config(kind: str, model: str) -> dict[str, Any]:
    """Return PEFT's configuration of such an adapter."""
    return {
        "base_model_name_or_path": model,
        "bias": "none",
        "fan_in_fan_out": kind in TRANSPOSED,
        "inference_mode": True,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": 1,
        "target_modules": [kind],
        "task_type": "CAUSAL_LM",
    }


def write_untrained(model_folder: Path, model: str, folder: Path) -> None:
    """Write the adapter of a model into an empty folder.

    Raises NoAdapterError if the model has no weights that can be read, and OSError if the folder can't be
    written.
    """
    kind, modules = module_shapes(_shapes(sorted(model_folder.glob("*.safetensors"))))
    write_zeros(folder / "adapter_model.safetensors", factors(modules))
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(kind, model), indent=2) + "\n")


def _shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for path in files:
            shapes |= read_shapes(path)
    except FAILURES as error:
        raise NoAdapterError(f"the base model's weights can't be read: {error}") from error
    if not shapes:
        raise NoAdapterError("the base model has no safetensors files")
    return shapes
