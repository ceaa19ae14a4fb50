"""Requests of upstream's validator, field by field: offers, and the data of an accepted task."""

from __future__ import annotations

from typing import Any

from bench.fake_validator.validator import OFFER, OFFER_IMAGE, START, START_GRPO, START_IMAGE

TEXT_ROWS = 100_000  # upstream's `ds_size` of every text offer, whatever the data
MODEL, PARAMETERS = "unsloth/Llama-3.2-1B", 1_235_814_400
INSTRUCT, COMPLETION, CHAT, DPO, GRPO, IMAGE = "instruct", "completion", "chat", "dpo", "grpo", "image"
TEXT_KINDS = (INSTRUCT, COMPLETION, CHAT, DPO)
TASK_TYPES = {
    INSTRUCT: "InstructTextTask",
    COMPLETION: "InstructTextTask",
    CHAT: "ChatTask",
    DPO: "DpoTask",
    GRPO: "GrpoTask",
    IMAGE: "ImageTask",
}
OFFER_PATHS = {kind: OFFER_IMAGE if kind == IMAGE else OFFER for kind in TASK_TYPES}
START_PATHS = {kind: {GRPO: START_GRPO, IMAGE: START_IMAGE}.get(kind, START) for kind in TASK_TYPES}
REWARD = "def reward_length(completions, **kwargs):\n    return [float(len(text)) for text in completions]\n"

DATASET_TYPES: dict[str, dict[str, Any]] = {
    INSTRUCT: {
        "system_prompt": "",
        "system_format": "{system}",
        "field_system": None,
        "field_instruction": "instruct",
        "field_input": None,
        "field_output": "output",
        "format": None,
        "no_input_format": None,
        "field": None,
    },
    DPO: {
        "field_prompt": "prompt",
        "field_system": None,
        "field_chosen": "chosen",
        "field_rejected": "rejected",
        "prompt_format": None,
        "chosen_format": None,
        "rejected_format": None,
    },
    GRPO: {
        "field_prompt": "prompt",
        "reward_functions": [
            {"reward_func": REWARD, "reward_weight": 3.5, "func_hash": None, "is_generic": True}
        ],
    },
    CHAT: {
        "chat_template": "chatml",
        "chat_column": "conversations",
        "chat_role_field": "from",
        "chat_content_field": "value",
        "chat_user_reference": "human",
        "chat_assistant_reference": "gpt",
    },
}
DATASET_TYPES[COMPLETION] = DATASET_TYPES[INSTRUCT] | {"field_output": None}


def offer(kind: str, task_id: str, **fields: Any) -> dict[str, Any]:
    """Return an offer of a kind of task; all it says of the data is a constant."""
    return {
        "ds_size": 24 if kind == IMAGE else TEXT_ROWS,
        "model": "stabilityai/stable-diffusion-xl-base-1.0" if kind == IMAGE else MODEL,
        "hours_to_complete": 1 if kind == IMAGE else 4,
        "task_id": task_id,
        "task_type": TASK_TYPES[kind],
        "model_params_count": None if kind == IMAGE else PARAMETERS,
    } | fields


def start(kind: str, task_id: str, repo: str, dataset: str, **fields: Any) -> dict[str, Any]:
    """Return the start of an accepted task with its data; what is not set is sent as null."""
    asked = offer(kind, task_id)
    common = {
        "model": asked["model"],
        "task_id": task_id,
        "hours_to_complete": asked["hours_to_complete"],
        "expected_repo_name": repo,
    }
    if kind == IMAGE:
        return common | {"dataset_zip": dataset, "model_type": "sdxl"} | fields
    data = {"dataset": dataset, "dataset_type": DATASET_TYPES[kind], "file_format": "s3"}
    return common | data | fields
