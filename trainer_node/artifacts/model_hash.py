"""The hash by which upstream recognises a submission's weights.

Upstream computes it over the weight and configuration files of a repository: hex sha256 of `path:sha256`
of each, in order of their paths, with nothing in between.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from shared.files import file_digest

PATTERNS: Final = (
    "adapter_config.json",
    "config.json",
    "adapter_model.bin",
    "adapter_model.safetensors",
    "model.safetensors",
    "model-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model.safetensors",
    "pytorch_model-*.bin",
    "pytorch_model-*.safetensors",
    "last-*.safetensors",
    "checkpoint/last.safetensors",
    "checkpoint/last-*.safetensors",
    "checkpoint/checkpoint-*.safetensors",
    "diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder_2/pytorch_model.bin",
)


def model_hash(folder: Path) -> str | None:
    """Upstream's hash of a submission; None if nothing in it counts. Reads all of it: use a thread."""
    found = {path for pattern in PATTERNS for path in folder.glob(pattern)}
    files = sorted(path for path in found if path.is_file() and path.stat().st_size)
    if not files:
        return None
    entries = (f"{path.relative_to(folder).as_posix()}:{file_digest(path)}" for path in files)
    return hashlib.sha256("".join(entries).encode()).hexdigest()
