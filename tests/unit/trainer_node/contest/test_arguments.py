"""Upstream's arguments and environment, with all the nulls it sends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.fake_validator.requests import DATASET_TYPES, INSTRUCT
from shared.errors import SettingsError
from shared.messages.offers import DatasetType, TaskType
from trainer_node.contest.arguments import USUAL_PROFILES, ContestTask, dataset_type, parse


def arguments(**changes: str) -> list[str]:
    usual = {
        "--task-id": "0b5c0f4e-1111-2222-3333-444455556666",
        "--model": "0123456789abcdef",
        "--dataset": "https://data.example/rows.json?signature=x",
        "--dataset-type": json.dumps(DATASET_TYPES[INSTRUCT]),
        "--task-type": "InstructTextTask",
        "--file-format": "s3",
        "--expected-repo-name": "tournament-tourn_1-0b5c0f4e-5F3sa2TJ",
        "--hours-to-complete": "0.75",
    }
    given = usual | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return [part for pair in given.items() for part in pair]


def test_a_task_as_upstream_describes_it() -> None:
    task = parse(arguments(), {})
    assert task == ContestTask(
        task_id="0b5c0f4e-1111-2222-3333-444455556666",
        model="0123456789abcdef",
        task_type="InstructTextTask",
        dataset_type=DatasetType(
            system_prompt="", system_format="{system}", field_instruction="instruct", field_output="output"
        ),
        expected_repo_name="tournament-tourn_1-0b5c0f4e-5F3sa2TJ",
        hours=0.75,
    )
    assert task.profiles == USUAL_PROFILES
    assert task.trainable is TaskType.INSTRUCT


def test_the_environment_is_read() -> None:
    environment = {
        "USE_KL": "1",
        "KL_COEF": "0.25",
        "BASELINE_STATS_PATH": "/cache/baseline_stats_t_h.json",
        "PODIUM_CONTEST_PROFILES": "maximum_accuracy lora_r16",
        "PODIUM_CONTEST_ROOT": "/private",
    }
    task = parse(arguments(), environment)
    assert task.kl_coefficient == 0.25
    assert task.stats_path == "/cache/baseline_stats_t_h.json"
    assert task.profiles == ("maximum_accuracy", "lora_r16")
    assert task.root == "/private"


@pytest.mark.parametrize(
    "environment",
    [{}, {"KL_COEF": "0.5"}, {"USE_KL": "0", "KL_COEF": "0.5"}, {"USE_KL": "1"}]
    + [{"USE_KL": "1", "KL_COEF": value} for value in ("", "much", "nan", "inf", "-1", "0")],
)
def test_a_task_without_a_usable_coefficient_has_none(environment: dict[str, str]) -> None:
    assert parse(arguments(), environment).kl_coefficient is None


def test_an_unknown_argument_is_no_reason_to_fail() -> None:
    assert parse([*arguments(), "--new-thing", "7"], {}).ignored == ("--new-thing", "7")


def test_a_task_type_that_the_engine_lacks_is_kept() -> None:
    task = parse(arguments(task_type="EnvTask"), {})
    assert (task.task_type, task.trainable) == ("EnvTask", None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hours_to_complete": "soon"}, "must be a number"),
        ({"hours_to_complete": "nan"}, "above 0"),
        ({"hours_to_complete": "0"}, "above 0"),
        ({"task_id": "../other"}, "without slashes"),
        ({"expected_repo_name": ".."}, "without slashes"),
        ({"expected_repo_name": ""}, "without slashes"),
        ({"dataset_type": "{"}, "not JSON"),
        ({"dataset_type": '{"field_input": "\udcff"}'}, "not JSON"),
        ({"dataset_type": "[" * 100_000}, "not JSON"),
        ({"dataset_type": "[]"}, "must be a JSON object"),
    ],
)
def test_arguments_that_can_not_be_used_are_named(changes: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse(arguments(**changes), {})


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(SettingsError, match="--model"):
        parse(arguments()[:2], {})


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"field_prompt": "prompt", "reward_functions": [{"reward_id": "x"}]}, {"field_prompt": "prompt"}),
        ({"field_prompt": 3, "field_chosen": "chosen"}, {"field_chosen": "chosen"}),
        ({"environment_names": ["othello"]}, {}),
        ({"chat_template": "tokenizer_default"}, {"chat_template": "tokenizer_default"}),
    ],
)
def test_fields_of_other_tasks_are_left_out(fields: dict[str, Any], found: dict[str, str]) -> None:
    assert dataset_type(json.dumps(fields)) == DatasetType(**found)
