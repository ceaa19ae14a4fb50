"""The wire schema and the decision as pydantic models, for bench/performance/fastapi_gateway.py."""

from __future__ import annotations

from enum import StrEnum
from uuid import UUID

from pydantic import BaseModel, Field


class TaskType(StrEnum):
    """Upstream's kinds of tasks."""

    INSTRUCT = "InstructTextTask"
    IMAGE = "ImageTask"
    DPO = "DpoTask"
    GRPO = "GrpoTask"
    CHAT = "ChatTask"


class FileFormat(StrEnum):
    """Upstream's data formats."""

    CSV = "csv"
    JSON = "json"
    HF = "hf"
    S3 = "s3"


class MinerTaskOffer(BaseModel):
    """An offer."""

    ds_size: int | None = None
    model: str
    hours_to_complete: float
    task_id: str
    task_type: TaskType
    model_params_count: int | None = None


class MinerTaskResponse(BaseModel):
    """The answer to an offer."""

    message: str
    accepted: bool


class InstructTextDatasetType(BaseModel):
    """Columns of instruct and completion data."""

    system_prompt: str | None = ""
    system_format: str | None = "{system}"
    field_system: str | None = None
    field_instruction: str | None = None
    field_input: str | None = None
    field_output: str | None = None
    format: str | None = None
    no_input_format: str | None = None
    field: str | None = None


class DpoDatasetType(BaseModel):
    """Columns of preference data."""

    field_prompt: str | None = None
    field_system: str | None = None
    field_chosen: str | None = None
    field_rejected: str | None = None
    prompt_format: str | None = "{prompt}"
    chosen_format: str | None = "{chosen}"
    rejected_format: str | None = "{rejected}"


class RewardFunction(BaseModel):
    """A reward, as source code."""

    reward_func: str
    reward_weight: float = Field(ge=0)
    func_hash: str | None = None
    is_generic: bool | None = None


class GrpoDatasetType(BaseModel):
    """Columns and rewards of GRPO data."""

    field_prompt: str | None = None
    reward_functions: list[RewardFunction] = []


class ChatTemplateDatasetType(BaseModel):
    """Columns of chats."""

    chat_template: str | None = "chatml"
    chat_column: str | None = "conversations"
    chat_role_field: str | None = "from"
    chat_content_field: str | None = "value"
    chat_user_reference: str | None = "user"
    chat_assistant_reference: str | None = "assistant"


class TrainRequest(BaseModel):
    """The common fields of all starts."""

    model: str = Field(min_length=1)
    task_id: UUID
    hours_to_complete: float
    expected_repo_name: str | None = None


class TrainRequestText(TrainRequest):
    """The data of a text task."""

    dataset: str = Field(min_length=1)
    dataset_type: InstructTextDatasetType | DpoDatasetType | GrpoDatasetType | ChatTemplateDatasetType
    file_format: FileFormat


class TrainRequestImage(TrainRequest):
    """The data of an image task."""

    dataset_zip: str = Field(min_length=1)
    model_type: str = "sdxl"


class TrainResponse(BaseModel):
    """The answer to a start."""

    message: str
    task_id: UUID


class MinerSubmission(BaseModel):
    """The location of a model."""

    repo: str
    model_hash: str | None = None


class Term(BaseModel):
    """One summand of the priority."""

    value: float
    weight: float
    cause: str


class Decision(BaseModel):
    """A decision with all its terms, as it is logged."""

    task_id: str
    accepted: bool
    reason: str
    priority: float
    task_weight: Term
    model_performance: Term
    task_success: Term
    maximum_accuracy_bonus: Term
    h100_maximum_bonus: Term
    decided_at: float
