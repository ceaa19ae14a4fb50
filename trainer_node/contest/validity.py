"""What upstream's uploader and loader would object to in a submission folder. Reads headers, not weights.

The uploader takes a subfolder instead of the folder if one holds weights; refuses a folder that is empty or
has only small metadata; and takes whatever lies there, half-written files included. The loader takes an
adapter if `adapter_config.json` is there; a whole model must have the base model's architecture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from trainer_node.contest.safetensors_file import BrokenFileError, read_shapes

METADATA_BYTES: Final = 1024
IGNORED: Final = (
    "trainer_state.json",
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
)  # never uploaded, and so no content
# Fields of config.json that must be the base model's.
SAME: Final = (
    "architectures",
    "hidden_size",
    "n_layer",
    "intermediate_size",
    "head_dim",
    "hidden_act",
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def objections(folder: Path, base: Path | None = None) -> list[str]:
    """Return everything that is wrong with a submission, empty if it is valid; `base` is the base model."""
    if not folder.is_dir():
        return ["there is no such folder"]
    return list(_objections(folder, base))


def _objections(folder: Path, base: Path | None) -> Iterator[str]:
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if any(inner.glob("*.safetensors")):
            yield f"only the subfolder {inner.name} would be uploaded: it holds weights"
    files = [path for path in folder.iterdir() if path.is_file() and path.name not in IGNORED]
    if not any(path.stat().st_size > METADATA_BYTES for path in files):
        yield "it is empty, or holds nothing but small metadata"
    if (folder / ADAPTER).is_file():
        yield from _of_adapter(folder)
    elif (folder / "config.json").is_file():
        yield from _of_model(folder, base)
    else:
        yield "it has neither adapter_config.json nor config.json"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            read_shapes(path)
        except (BrokenFileError, OSError) as error:
            yield str(error)


def _of_adapter(folder: Path) -> Iterator[str]:
    config = _read(folder / ADAPTER)
    if config is None:
        yield f"{ADAPTER} is not a JSON object"
    elif not config.get("peft_type") or not config.get("target_modules"):
        yield f"{ADAPTER} names no peft_type or no target_modules"
    if not (folder / ADAPTER_WEIGHTS).is_file():
        yield f"{ADAPTER_WEIGHTS} is missing"


def _of_model(folder: Path, base: Path | None) -> Iterator[str]:
    config = _read(folder / "config.json")
    if config is None:
        yield "config.json is not a JSON object"
    elif base is not None and (original := _read(base / "config.json")) is not None:
        yield from _unlike(config, original)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(((_read(index) or {}).get("weight_map") or {}).values())
        if not names:
            yield f"{index.name} names no file"
        for name in sorted(name for name in names if not (folder / str(name)).is_file()):
            yield f"{name} is missing"
    elif not any(folder.glob("*.safetensors")):
        yield "it has no safetensors file"


def _unlike(config: Mapping[str, Any], original: Mapping[str, Any]) -> Iterator[str]:
    for name in SAME:
        if config.get(name) != original.get(name):
            yield f"config.json has {name} {config.get(name)!r}, the base model {original.get(name)!r}"
    ours, theirs = (one.get("max_position_embeddings") for one in (config, original))
    if isinstance(ours, int) and isinstance(theirs, int) and ours < theirs:
        yield f"config.json has max_position_embeddings {ours}, the base model {theirs}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
