"""Upstream's upload of a submission folder: what is taken, what is left out, what is written over."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from pathlib import Path
from typing import Final

METADATA_BYTES: Final = 1024
IGNORED: Final = (
    *("trainer_state.json", "training_args.bin", "optimizer.pt", "optimizer.bin"),
    *("scheduler.pt", "scaler.pt", "rng_state*.pth"),
)


def upload(folder: Path, target: Path, model: str) -> str | None:
    """Copy what upstream would upload to `target`, with the real model's name; return why not, or None."""
    if not folder.is_dir():
        return "there is no submission folder"
    source = next(
        (one for one in sorted(folder.iterdir()) if one.is_dir() and any(one.glob("*.safetensors"))), folder
    )
    files = [path for path in source.rglob("*") if path.is_file() and not _is_ignored(path.name)]
    if not any(path.stat().st_size > METADATA_BYTES for path in files):
        return "empty, or only metadata"
    for path in files:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    _name_the_base(target, model)
    return None


def _is_ignored(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in IGNORED)


def _name_the_base(folder: Path, model: str) -> None:
    """Write the task's real model over the anonymous name."""
    config = folder / "adapter_config.json"
    if config.is_file():
        fields = json.loads(config.read_text())
        config.write_text(json.dumps({**fields, "base_model_name_or_path": model}))
    card = folder / "README.md"
    if card.is_file():
        card.write_text(re.sub(r"(?m)^base_model:.*$", f"base_model: {model}", card.read_text()))
