"""What `podium train` runs: one file with an offer's names, and the options of the command line over it."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from podium.arguments import nearest
from podium.dataset_type import refuse_unknown
from podium.own_hardware import hardware_of
from shared.errors import SettingsError
from shared.messages.offers import DatasetType, FileFormat, TaskType, task_type_of
from shared.messages.runs import WorkerJob
from shared.planning.plan import SUPPORTED_TASKS
from shared.planning.profiles import DEFAULT_PROFILE
from shared.settings import Settings
from shared.settings_sources import load_settings
from trainer_node.engine.data.splits import format_of
from trainer_node.job.inputs import model_path

TRAINED = tuple(kind for kind in TaskType if kind in SUPPORTED_TASKS)
OPTIONS = {"dataset": "--data", "hours_to_complete": "--hours"}  # others are called as the field
REQUIRED = ("model", "dataset", "dataset_type", "hours_to_complete", "out")


class TrainConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fine-tune on this machine. The first fields are an offer's, by its names."""

    model: Annotated[str, Meta(min_length=1)]
    dataset: Annotated[str, Meta(min_length=1)]
    dataset_type: DatasetType
    hours_to_complete: Annotated[float, Meta(gt=0)]
    task_type: TaskType | None = None  # None = derived from the named columns
    file_format: FileFormat | None = None  # None = by the file's name
    task_id: str | None = None
    model_params_count: int | None = None  # these three mean nothing here: an offer may have them
    ds_size: int | None = None
    expected_repo_name: str | None = None
    out: Annotated[str, Meta(min_length=1)]
    model_id: str | None = None
    profile: str = DEFAULT_PROFILE
    hardware: str = "auto"
    threads: Annotated[int, Meta(ge=1)] | None = None
    seed: Annotated[int, Meta(ge=0)] = 0
    kl_coef: Annotated[float, Meta(ge=0)] = 0.0


def read_config(file: Path | None, options: Mapping[str, Any]) -> TrainConfig:
    """Return the file's values with the given options over them; an option that is None isn't given.

    Raises SettingsError that names what is missing or wrong, and what to do.
    """
    where = str(file) if file else "the options"
    values = _of_file(file) if file else {}
    values |= {name: value for name, value in options.items() if value is not None}
    known = list(TrainConfig.__struct_fields__)
    for name in values.keys() - set(known):
        raise SettingsError(f"{where}: {nearest(name, known, 'field')}")
    for name in REQUIRED:
        if values.get(name) is None:
            option = OPTIONS.get(name, f"--{name.replace('_', '-')}")
            raise SettingsError(f"{name} is missing: give {option}, or {name!r} in a CONFIG file")
    if not isinstance(values["dataset_type"], DatasetType):
        refuse_unknown(values["dataset_type"], f"{where}: dataset_type")
    try:
        config = msgspec.convert(values, TrainConfig)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{where}: {error}") from error
    if config.kl_coef and config_task_type(config) is TaskType.DPO:
        raise SettingsError(
            f"{where}: kl_coef is for instruct and chat tasks: preference pairs have no divergence"
        )
    if config.task_type not in (None, *TRAINED):
        raise SettingsError(f"{where}: a {config.task_type} can't be trained, only {', '.join(TRAINED)}")
    return config


def _of_file(file: Path) -> dict[str, Any]:
    """Read a JSON or TOML object. Raises SettingsError."""
    try:
        text = file.expanduser().read_text(encoding="utf-8")
        values = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise SettingsError(f"{file} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        kind = "TOML" if file.suffix == ".toml" else "JSON (a .toml file is read as TOML)"
        raise SettingsError(f"{file} is not {kind}: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{file} must be one object with an offer's names, such as model and dataset")
    return values


def config_task_type(config: TrainConfig) -> TaskType:
    """Return the task type: as configured, else the one that the named columns belong to."""
    return config.task_type or task_type_of(config.dataset_type)


def config_format(config: TrainConfig) -> FileFormat:
    """Return the data's format: as configured, else by its name, else JSON."""
    return config.file_format or format_of(urlsplit(config.dataset).path) or FileFormat.JSON


def local_model(model: str, models_dir: Path) -> str:
    """Return where a model is: a path here, a folder of the settings or of `models_dir`, else its hub id."""
    if Path(model).exists():
        return str(Path(model).absolute())
    settings: Settings = load_settings()
    if settings.models_dir is None:
        settings = msgspec.structs.replace(settings, models_dir=str(models_dir))
    return model_path(settings, model)


def local_data(dataset: str, examples: Path) -> str:
    """Return where data is: a path here, one of the examples, else the URL or hub id itself."""
    if "://" in dataset:
        return dataset
    candidates = (Path(dataset).expanduser(), examples / dataset)
    return next((str(path.absolute()) for path in candidates if path.exists()), dataset)


def worker_job_of(config: TrainConfig, model: str, data: str) -> WorkerJob:
    """Return the job of a run that begins now."""
    now, name = time.time(), Path(config.out).name
    return WorkerJob(
        task_id=config.task_id or name,
        task=name,
        slot="local",
        task_type=config_task_type(config),
        model=config.model_id or config.model,
        model_path=model,
        dataset=data,
        file_format=config_format(config),
        dataset_type=config.dataset_type,
        start_at=now,
        ready_by=now + 3600 * config.hours_to_complete,
        hardware=hardware_of(config.hardware),
        profile=config.profile,
        seed=config.seed,
        threads=config.threads,
        kl_coefficient=config.kl_coef,
    )
