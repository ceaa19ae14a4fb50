"""Load a model, its configuration and its tokenizer, without running code from their files."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import structlog
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.logging import disable_progress_bar

from shared.errors import EngineError, in_a_line, is_failure
from shared.files import is_disk_full
from shared.messages.runs import ErrorCode
from shared.planning.architectures import why_not
from trainer_node.engine.data import hf_datasets

log = structlog.get_logger(__name__)
HINT = "name its folder in PODIUM_MODELS, put it below PODIUM_MODELS_DIR, or make the hub reachable"
CODE = ("trust_remote_code", "does not recognize this architecture")  # of errors that ask for a model's code
PLAIN = (OSError, ValueError, RuntimeError)  # their texts say enough without their names


class ShardIndex(msgspec.Struct):
    """The file that says which of several files holds a tensor."""

    weight_map: dict[str, str] = {}


def load_config(path: str) -> PretrainedConfig:
    """Return the configuration of a model: a folder, a GGUF file (or a folder that holds one), or a hub id.

    Raises EngineError(UNSUPPORTED) for one that can't be trained, before its weights are downloaded.
    """
    config: PretrainedConfig = _load(AutoConfig, path)
    refusal = why_not(config.to_dict())
    if refusal is None and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        refusal = f"models of type {config.model_type!r} have no causal form"
    if refusal:
        raise EngineError(ErrorCode.UNSUPPORTED, f"{path}: {refusal}")
    return config


def load_tokenizer(path: str) -> Any:
    """Return the model's own tokenizer, as the scorer uses it."""
    return _load(AutoTokenizer, path)


def load_model(path: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a causal language model on the CPU in `dtype`: from safetensors, GGUF, or pickled tensors.

    Pickled files are read without running what is in them. Raises EngineError: MODEL_UNAVAILABLE if there are
    no such weights or some are missing, UNSUPPORTED if their kind is unknown.
    """
    kind = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    if _gguf(path) is None:
        return _with_weights(path, dtype=kind).eval()
    # Without dequantize=True the weights stay packed 4-bit tensors, which can be neither trained nor saved.
    model = _with_weights(path, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    for parameter in model.parameters():  # not model.to(): the rotary frequencies must stay fp32
        parameter.data = parameter.data.to(kind)
    return model.eval()


def load_unread(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model as it is stored, if it can be: then its weights take no memory until they are read.

    Else in `dtype`. Raises EngineError as `load_model`.
    """
    if _gguf(path) is not None:
        return load_model(path, dtype)
    model = _with_weights(path, dtype="auto").eval()
    wide = (getattr(model, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    # Which of its weights would stay fp32 does not show in a model that is all fp32.
    return load_model(path, dtype) if any(wide) and model.dtype is not dtype else model


def _with_weights(path: str, **options: Any) -> PreTrainedModel:
    """Return the model with all its weights from its files: what they lack would be random numbers."""
    _check_indices(path)
    model, info = _load(AutoModelForCausalLM, path, output_loading_info=True, weights_only=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise EngineError(
            ErrorCode.MODEL_UNAVAILABLE,
            f"the weights of {path} lack {len(missing)} of {type(model).__name__}'s tensors, such as "
            f"{missing[0]}: they are another model's, or not all of them are there",
        )
    if unexpected := sorted(info["unexpected_keys"]):
        log.warning("weights not used", model=path, tensors=len(unexpected), such_as=unexpected[0])
    return model


def _check_indices(path: str) -> None:
    """Check that a model's weights are all in its own folder. Raises EngineError(MODEL_UNAVAILABLE)."""
    for place in sorted(Path(path).glob("*.index.json")):
        try:
            index = msgspec.json.decode(place.read_bytes(), type=ShardIndex)
        except (OSError, ValueError, RecursionError) as error:
            what = f"can't load {path}: {place.name} is no list of its weights: {str(error)[:200]}"
            raise EngineError(ErrorCode.MODEL_UNAVAILABLE, what) from error
        for name in index.weight_map.values():
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts:
                what = f"can't load {path}: {place.name} names a file outside of its folder: {name[:100]!r}"
                raise EngineError(ErrorCode.MODEL_UNAVAILABLE, what)


def _gguf(path: str) -> Path | None:
    """Return the GGUF file that a path means, if it means one."""
    place = Path(path)
    if place.suffix == ".gguf" and place.is_file():
        return place
    if place.is_dir() and not (place / "config.json").is_file():
        return next(iter(sorted(place.glob("*.gguf"))), None)
    return None


def _is_local(path: str) -> bool:
    """Return whether a path can only mean a place on this machine, not a model of the hub."""
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
    except BaseException as error:  # whatever odd files bring the libraries to
        if not is_failure(error) or _is_machines(error):
            raise
        raise _explained(error, path, offline="local_files_only" in options) from error


def _is_machines(error: BaseException) -> bool:
    """Return whether memory or disk ran out, which is not the model's fault."""
    if isinstance(error, OSError):
        return is_disk_full(error)
    return isinstance(error, RuntimeError) and "memory" in str(error).lower()


def _explained(error: BaseException, path: str, *, offline: bool) -> EngineError:
    """Return what a library's error means for a job."""
    text = " ".join(str(error).split())[:300].rstrip(".")
    if any(sign in str(error) for sign in CODE):
        return EngineError(ErrorCode.UNSUPPORTED, f"{path} needs code that Podium doesn't run: {text}")
    if offline and isinstance(error, OSError | ValueError):
        message = f"{path} is not on this machine, and the hub doesn't answer; {HINT}"
        return EngineError(ErrorCode.MODEL_UNAVAILABLE, message)
    if not isinstance(error, PLAIN):
        text = in_a_line(error)
    tried = "its folder" if Path(path).is_dir() else "the local cache and the hub"
    why = _why_closed(error) or f"{text}; {HINT}"
    return EngineError(ErrorCode.MODEL_UNAVAILABLE, f"can't load {path} (tried {tried}): {why}")


def _why_closed(error: BaseException) -> str | None:
    """Return what to do about a model that the hub shows only to some; None for another error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RepositoryNotFoundError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    what = (
        "it is gated" if isinstance(cause, GatedRepoError) else "the hub has no such model, or it is private"
    )
    return f"{what}: {hf_datasets.TOKEN_ADVICE}"
