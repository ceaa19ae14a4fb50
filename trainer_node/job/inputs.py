"""Where a job's model and data are on this machine. What upstream sends is a name, never a way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from shared.errors import DataError, EngineError
from shared.messages.hardware import Hardware
from shared.messages.jobs import Job
from shared.messages.offers import FileFormat
from shared.messages.runs import ErrorCode, WorkerJob
from shared.planning.architectures import LARGEST_CONFIG, ModelFacts, facts_from_config, facts_from_name
from shared.planning.feasibility import check_offer
from shared.planning.hardware import memory_share
from shared.planning.transfers import UPLOAD_SHARE, Transfers
from shared.settings import Settings
from trainer_node.transfer_rates import Direction, measured

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_HUB_ID = re.compile(rf"({_NAME}/)?{_NAME}")


def model_path(settings: Settings, model: str) -> str:
    """Return where the weights are: as set by `models`, in `models_dir`, else the hub id itself.

    Raises EngineError for an id that is no hub id: a path must not reach the worker as a model.
    """
    if model in settings.models:
        return str(Path(settings.models[model]).expanduser().resolve())
    if not _HUB_ID.fullmatch(model):
        raise EngineError(
            ErrorCode.MODEL_UNAVAILABLE,
            f"model {model!r} is neither a hub id (org/name) nor named by the setting PODIUM_MODELS",
        )
    if settings.models_dir:
        folder = Path(settings.models_dir).expanduser()
        flat, name = model.replace("/", "--"), model.rpartition("/")[2]
        for candidate in (flat, name, flat.lower(), name.lower()):
            if (folder / candidate).exists():
                return str((folder / candidate).resolve())
    return model


def dataset_path(settings: Settings, dataset: str, file_format: FileFormat) -> str:
    """Return the data reference as the worker may open it: a URL, a data set id, or an allowed local file.

    Raises DataError that names the setting.
    """
    if dataset.lower().startswith(("https://", "http://")):
        return dataset
    if "://" in dataset:
        raise DataError(
            f"data at {dataset.partition('://')[0]}:// can't be read; only http and https URLs can"
        )
    if file_format is FileFormat.HF:
        if not _HUB_ID.fullmatch(dataset):
            raise DataError(f"{dataset!r} is not the id of a Hugging Face data set (org/name)")
        return dataset
    roots = [Path(root).expanduser().resolve() for root in settings.dataset_roots]
    try:
        # An absolute path stays what it is when joined; links are followed before it is judged.
        inside = [path for root in roots if (path := (root / dataset).resolve()).is_relative_to(root)]
        for path in inside:
            if path.is_file():
                return str(path)
    except (OSError, ValueError, RuntimeError) as error:  # too long; with a NUL; links in a circle
        raise DataError(f"local data {dataset[:200]!r} is not the name of a file: {error!s:.200}") from error
    if inside:
        raise DataError(f"no data file at {inside[0]}")
    allowed = ", ".join(map(str, roots)) or "none"
    raise DataError(
        f"local data {dataset} lies outside the folders that PODIUM_DATASET_ROOTS allows (now: {allowed})"
    )


RESERVE_SHARE = 0.1  # of a short job's whole time that the submit reserve may take at most


def upload_s(settings: Settings, job: Job, hardware: Hardware) -> float:
    """Return how long the upload of a job's submission is expected to take; 0 if it stays here. Blocks."""
    if settings.artifacts_kind != "hub":
        return 0.0
    offer = job.offer
    found = check_offer(
        offer.model,
        offer.model_params_count,
        offer.task_type,
        offer.hours_to_complete,
        hardware,
        settings.profile,
        _facts(offer.model, model_path(settings, offer.model)),
    )
    rate = measured(settings.node, Direction.UPLOAD) or settings.hub_upload_bytes_per_s
    return Transfers(upload_bytes_per_s=rate).upload_s(found.submission_bytes)


def _facts(model: str, path: str) -> ModelFacts:
    """Return what the model's config says, if it is here, else its name; whether to train it was decided."""
    try:
        with (Path(path) / "config.json").open("rb") as file:
            config = msgspec.json.decode(file.read(LARGEST_CONFIG), type=dict[str, Any])
        found = facts_from_config(config)
    except (OSError, ValueError, RecursionError):
        found = facts_from_name(model)
    return msgspec.structs.replace(found, refusal="")


def worker_job(settings: Settings, job: Job, hardware: Hardware, threads: int) -> WorkerJob:
    """Return all that a worker needs to know about a job. Raises EngineError for a bad model or data."""
    offer = job.offer
    whole_s = max(0.0, job.deadline_at - job.received_at)
    reserve = min(settings.submit_reserve_s, RESERVE_SHARE * whole_s)
    reserve += min(upload_s(settings, job, hardware), UPLOAD_SHARE * whole_s)
    return WorkerJob(
        task_id=job.task_id,
        task=job.task,
        slot=job.slot,
        task_type=offer.task_type,
        model=offer.model,
        model_path=model_path(settings, offer.model),
        dataset=dataset_path(settings, offer.dataset, offer.file_format),
        file_format=offer.file_format,
        dataset_type=offer.dataset_type,
        start_at=job.received_at,
        ready_by=job.deadline_at - reserve,
        hardware=hardware,
        profile=settings.profile,
        seed=settings.seed,
        checkpoint_interval_s=settings.checkpoint_interval_s,
        allow_private_urls=settings.allow_private_urls,
        threads=threads,
        memory_share=memory_share(own_limit=settings.own_memory_limit),
    )
