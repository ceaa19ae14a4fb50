"""Upstream's messages as it really sends them, in our words."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway.upstream.auth import AuthRefusal, nonce_time
from gateway.upstream.contract import MinerTaskOffer, TrainRequestText, parse
from shared.messages.encoding import decoder
from shared.messages.offers import BareOffer, FileFormat, TaskType

OFFER = {
    "task_id": "6f1c",
    "task_type": "InstructTextTask",
    "model": "org/model",
    "hours_to_complete": 5,
    "ds_size": 100000,
    "model_params_count": None,
}
START = {
    "task_id": "6f1c",
    "model": "org/model",
    "hours_to_complete": 5.5,
    "expected_repo_name": "a-uuid",
    "dataset": "https://store.example/train.json?X-Amz-Signature=1",
    "file_format": "s3",
    # upstream dumps a whole model, so that nulls are sent
    "dataset_type": {
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
}
DECODE_OFFER, DECODE_START = decoder(MinerTaskOffer), decoder(TrainRequestText)


def offer(**fields: Any) -> BareOffer:
    return parse(msgspec.json.encode(OFFER | fields), DECODE_OFFER).offer()


@pytest.mark.parametrize("hours", [1, 5, 0.5, 3.25])
def test_hours_are_whole_or_not(hours: float) -> None:
    assert offer(hours_to_complete=hours).hours_to_complete == hours


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (None, None),
        (0, None),
        (-1, None),
        (1_100_000_000, 1_100_000_000),
        (1.1e9, 1_100_000_000),
        (1e300, None),
    ],
)
def test_a_size_that_is_none_is_not_stated(said: float | None, meant: int | None) -> None:
    assert offer(model_params_count=said).model_params_count == meant


@pytest.mark.parametrize(
    "fields",
    [
        {"task_type": "VideoTask"},
        {"task_type": None},
        {"hours_to_complete": "soon"},
        {"hours_to_complete": 0},
        {"hours_to_complete": None},
        {"model": ""},
        {"model": None},
        {"task_id": 7},
        {"model_params_count": "1B"},
    ],
)
def test_what_is_no_offer_names_the_field(fields: dict[str, Any]) -> None:
    with pytest.raises(AuthRefusal, match=next(iter(fields))) as caught:
        offer(**fields)
    assert caught.value.status == 422


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'"a"'])
def test_what_is_no_json_object_is_422(body: bytes) -> None:
    with pytest.raises(AuthRefusal) as caught:
        parse(body, DECODE_OFFER)
    assert caught.value.status == 422


def test_a_start_keeps_what_the_offer_said() -> None:
    start = parse(msgspec.json.encode(START), DECODE_START)
    job = start.offer(offer(model_params_count=7))
    assert (job.task_type, job.model_params_count, job.ds_size) == (TaskType.INSTRUCT, 7, 100000)
    assert (job.hours_to_complete, job.expected_repo_name) == (5.5, "a-uuid")
    assert job.file_format is FileFormat.S3
    assert job.dataset_type.field_output == "output"


def test_a_starts_type_is_what_its_columns_name_else_what_was_offered() -> None:
    def started(**columns: str) -> TaskType:
        start = parse(msgspec.json.encode(START | {"dataset_type": columns}), DECODE_START)
        return start.offer(offer(task_type="DpoTask")).task_type

    assert started(field_instruction="q") is TaskType.INSTRUCT
    assert started(field_chosen="c") is TaskType.DPO
    assert started(field_system="s") is TaskType.DPO


@pytest.mark.parametrize(
    ("nonce", "seconds"),
    [
        ("1700000000000000000_abc", 1.7e9),
        ("1700000000000000000", 1.7e9),
        ("0_x", 0.0),
        ("100000000000000000001_x", None),
        ("-1_x", None),
        ("1_700", 1e-9),
        ("٣_x", None),
        ("abc_1", None),
        ("", None),
        ("1" * 200, None),
    ],
)
def test_the_time_in_a_nonce(nonce: str, seconds: float | None) -> None:
    assert nonce_time(nonce) == seconds
