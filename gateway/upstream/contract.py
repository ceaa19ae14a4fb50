"""Messages of upstream's protocol of July to October 2025; unknown fields are ignored."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, TypeVar

from msgspec import Meta, Struct

from gateway.upstream.auth import AuthRefusal
from shared.messages.offers import BareOffer, DatasetType, FileFormat, Offer, TaskType, task_type_of

Name = Annotated[str, Meta(min_length=1, max_length=512)]
TaskId = Annotated[str, Meta(min_length=1, max_length=1024)]
Hours = Annotated[float, Meta(gt=0)]  # integers until July 2025, any number since
StartHours = Annotated[float, Meta(gt=0, le=24 * 366)]
DataReference = Annotated[str, Meta(min_length=1, max_length=8192)]  # a presigned URL, valid for seven days


T = TypeVar("T")


class ImageModelType(StrEnum):
    """Kinds of image models."""

    FLUX = "flux"
    SDXL = "sdxl"


class TextFormat(StrEnum):
    """Format of a text task's data; upstream always sends `s3`, a presigned URL of one JSON array."""

    CSV = "csv"
    JSON = "json"
    HF = "hf"
    S3 = "s3"


class MinerTaskOffer(Struct, frozen=True, kw_only=True):
    """An offer of a task. It has no data, and `ds_size` is the same for every text task."""

    task_id: TaskId
    task_type: TaskType
    model: Name
    hours_to_complete: Hours
    ds_size: int | float | None = None
    model_params_count: int | float | None = None

    def offer(self) -> BareOffer:
        """Return Podium's form of the offer; an impossible size counts as not given."""
        return BareOffer(
            task_id=self.task_id,
            task_type=self.task_type,
            model=self.model,
            hours_to_complete=self.hours_to_complete,
            model_params_count=_count(self.model_params_count),
            ds_size=_count(self.ds_size),
        )


class MinerTaskResponse(Struct, frozen=True):
    """The response to an offer. If `message` were not a string, upstream would count it as a rejection."""

    message: str
    accepted: bool


class TrainRequestText(Struct, frozen=True, kw_only=True):
    """The start of an accepted text task, with its data."""

    task_id: TaskId
    model: Name
    hours_to_complete: StartHours
    dataset: DataReference
    dataset_type: DatasetType
    file_format: TextFormat
    expected_repo_name: str | None = None

    def offer(self, accepted: BareOffer | None) -> Offer:
        """Return the job's offer. If the columns name no task type, it is the accepted offer's."""
        known = accepted.task_type if accepted is not None else TaskType.INSTRUCT
        task_type = task_type_of(self.dataset_type, otherwise=known)
        return Offer(
            task_id=self.task_id,
            task_type=task_type,
            model=self.model,
            hours_to_complete=self.hours_to_complete,
            model_params_count=accepted.model_params_count if accepted is not None else None,
            ds_size=accepted.ds_size if accepted is not None else None,
            dataset=self.dataset,
            file_format=FileFormat(self.file_format.value),
            dataset_type=self.dataset_type,
            expected_repo_name=self.expected_repo_name,
        )


class TrainRequestImage(Struct, frozen=True, kw_only=True):
    """The start of an accepted image task, with its data."""

    task_id: TaskId
    model: Name
    hours_to_complete: StartHours
    dataset_zip: DataReference
    model_type: ImageModelType = ImageModelType.SDXL
    expected_repo_name: str | None = None


class TrainResponse(Struct, frozen=True):
    """The response to a start, which upstream only logs."""

    message: str
    task_id: str


class MinerSubmission(Struct, frozen=True):
    """The location of a task's submission. A missing hash is harmless; a wrong one loses the task."""

    repo: str
    model_hash: str | None = None


class TrainingRepo(Struct, frozen=True):
    """The repository that this miner enters for a kind of task."""

    github_repo: str
    commit_hash: str
    github_token: str | None = None
    requested_datasets: list[str] | None = None


def parse(body: bytes, decode: Callable[[bytes], T]) -> T:
    """Decode a body. Raises AuthRefusal 422 that names the field."""
    try:
        return decode(body)
    except ValueError as error:  # msgspec's errors, and bytes that are not UTF-8
        raise AuthRefusal(422, str(error)) from error


def _count(number: float | None) -> int | None:
    return int(number) if number is not None and 1 <= number < 2**63 else None
