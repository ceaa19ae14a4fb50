"""A submission's configuration, in words that every transformers since 4.51 understands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from shared.messages import WorkerJob

ROPE_OWN = ("rope_theta", "partial_rotary_factor")  # in transformers 4 fields of their own


def model_config(base: Any, job: WorkerJob) -> dict[str, Any]:
    """The config.json of a whole model that was trained from `base`."""
    return stock_config(_original(base, job), job.model)


def _original(base: Any, job: WorkerJob) -> dict[str, Any]:
    """The base model's own config.json; where it has none (GGUF), what transformers made of it."""
    path = Path(job.model_path) / "config.json"
    if not Path(job.model_path).exists():
        cached = cached_file(
            job.model_path, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
        path = Path(cached) if cached else path
    return json.loads(path.read_text()) if path.is_file() else base.config.to_dict()


def stock_config(config: dict[str, Any], model: str) -> dict[str, Any]:
    """A model's configuration in words that transformers 4 and 5 both understand.

    transformers 5 writes `rope_parameters` and `dtype`; 4.51, which upstream scores with, overlooks both and
    takes rotary base 10,000 for granted: a whole model would load and score like a broken one.
    """
    config = {name: value for name, value in config.items() if name not in ("dtype", "quantization_config")}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        del config["rope_parameters"]
        scaling = {name: value for name, value in rope.items() if name not in ROPE_OWN}
        config.update({name: rope[name] for name in ROPE_OWN if name in rope})
        config["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    return {**config, "_name_or_path": model, "torch_dtype": "bfloat16"}
