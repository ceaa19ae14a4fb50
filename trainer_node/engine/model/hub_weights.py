"""A model's weights from the hub, fetched before they are loaded: so it is known how fast they came."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Sequence
from pathlib import Path

import structlog
from huggingface_hub import constants, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.tqdm import disable_progress_bars

from shared.messages.runs import ModelDownload
from trainer_node.engine.data import hf_datasets

# The files that transformers loads: the first kind that a repository has. An index comes before its parts.
KINDS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
)
log = structlog.get_logger(__name__)


def fetch_weights(model: str) -> ModelDownload | None:
    """Fetch what isn't on this machine of a hub model's weights; None if nothing had to come, or can't.

    Nothing is raised: loading the model says what is wrong with it.
    """
    if Path(model).exists() or not hf_datasets.is_reachable():
        return None
    disable_progress_bars()  # a worker's log is a file
    try:
        found = snapshot_download(
            model, allow_patterns=[name for kind in KINDS for name in kind], dry_run=True
        )
        wanted = weight_files([file.filename for file in found])
        missing = [file for file in found if file.filename in wanted and file.will_download]
        if not missing:
            return None
        begun = any(_blobs(model).glob("*.incomplete"))  # a part is here already, of unknown size
        start = time.monotonic()
        snapshot_download(model, allow_patterns=wanted)
        seconds = time.monotonic() - start
    except Exception as error:  # whatever the hub and its library do
        log.info("weights not fetched ahead", model=model, cause=str(error)[:300])
        return None
    size = sum(file.file_size or 0 for file in missing)
    return None if begun or not size else ModelDownload(size=size, seconds=seconds)


def weight_files(names: Sequence[str]) -> list[str]:
    """Return which of a repository's files hold the weights that are loaded."""
    for first, *parts in KINDS:
        if first in names:
            return [
                first,
                *(name for part in parts for name in fnmatch.filter(names, part) if "/" not in name),
            ]
    return []


def _blobs(model: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model") / "blobs"
