"""Load a model, its configuration and its tokenizer from safe files only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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
from trainer_node.engine.data import hf_datasets

HINT = "name its folder in PODIUM_MODELS, put it below PODIUM_MODELS_DIR, or make the hub reachable"


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
    elif not place.is_dir() and not hf_datasets.is_reachable():
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
