"""The wire schemas are our public surface: frozen here, additive only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.telemetry import decision_log, event_sources, run_history
from gateway.upstream import nonces, validators
from shared.messages import hardware, jobs, offers, runs, slots
from shared.messages.encoding import decode, encode
from shared.messages.hardware import Hardware
from shared.messages.jobs import Job, Result, ResultStatus, decode_job_record, decode_state_record
from shared.messages.offers import (
    DatasetType,
    Decision,
    DecisionKind,
    TaskType,
    decode_offer,
    task_type_of,
)

FROZEN = Path(__file__).parents[2] / "data" / "schemas.json"
OFFER = {
    "task_id": "t1",
    "task_type": "InstructTextTask",
    "model": "org/model",
    "hours_to_complete": 2,
    "dataset": "https://example.org/train.json",
}


def structs() -> list[type[msgspec.Struct]]:
    """Every message."""
    values = [value for module in (hardware, jobs, offers, runs, slots) for value in vars(module).values()]
    structs = [one for one in values if isinstance(one, type) and issubclass(one, msgspec.Struct)]
    return [one for one in structs if one is not msgspec.Struct]


def schemas() -> dict[str, object]:
    """Field names, types and defaults of every message, as JSON schema."""
    return {struct.__name__: msgspec.json.schema(struct) for struct in structs()}


def test_schemas_are_what_they_were() -> None:
    """After a deliberate, additive change: `python -m tests.unit.shared.test_messages` rewrites them."""
    assert schemas() == json.loads(FROZEN.read_text())


def test_every_message_is_frozen() -> None:
    for struct in structs():
        assert struct.__struct_config__.frozen, struct.__name__


def decoders() -> dict[str, Callable[[bytes], object]]:
    """What reads messages and records that came from outside, by name."""
    modules = (jobs, offers, runs, slots, decision_log, event_sources, run_history, nonces, validators)
    return {
        f"{module.__name__}.{name}": value
        for module in modules
        for name, value in vars(module).items()
        if name.lstrip("_").startswith("decode_") or name == "_decode"
    }


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"more": ' + b"[" * 100_000, b'{"more": "\xff"}', b"\0"])
@pytest.mark.parametrize("name", decoders())
def test_bytes_that_are_no_message_are_a_value_error(name: str, data: bytes) -> None:
    """Who reads messages skips what raises ValueError; deep nesting would end the service."""
    with pytest.raises(ValueError, match=r"nested too deeply|Expected|malformed|codec|missing"):
        decoders()[name](data)


def test_deep_nesting_is_told_from_other_damage() -> None:
    with pytest.raises(ValueError, match="the JSON is nested too deeply"):
        decode(b"[" * 100_000, Any)


def test_unknown_fields_are_ignored() -> None:
    offer = decode_offer(json.dumps(OFFER | {"new_field": {"x": 1}}))
    assert offer.task_type is TaskType.INSTRUCT
    assert offer.hours_to_complete == 2.0


@pytest.mark.parametrize(
    "change",
    [
        {"hours_to_complete": 0},
        {"hours_to_complete": -1},
        {"hours_to_complete": "two"},
        {"hours_to_complete": None},
        {"task_id": ""},
        {"task_id": 7},
        {"task_type": "SomethingElse"},
        {"model": ""},
        {"dataset": ""},
        {"dataset_type": "instruct"},
    ],
)
def test_malformed_offers_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_offer(json.dumps(OFFER | change))


@pytest.mark.parametrize("hours", ["NaN", "Infinity", "1e999"])
def test_hours_must_be_a_finite_number(hours: str) -> None:
    text = json.dumps(OFFER).replace('"hours_to_complete": 2', f'"hours_to_complete": {hours}')
    with pytest.raises(msgspec.DecodeError):
        decode_offer(text)


def test_records_tell_their_kind() -> None:
    offer = decode_offer(json.dumps(OFFER))
    decision = Decision(task_id="t1", task="t1", accepted=True, reason="yes", slot="a")
    job = Job(
        record_id="r",
        task_id="t1",
        task="t1",
        slot="a",
        gateway="g",
        offer=offer,
        decision=decision,
        received_at=1.0,
        deadline_at=2.0,
    )
    assert decode_job_record(encode(job)) == job
    result = Result(record_id="r", task="t1", task_id="t1", slot="a", status=ResultStatus.SUBMITTED)
    assert decode_state_record(encode(result)) == result
    assert json.loads(encode(result))["kind"] == "result"
    with pytest.raises(msgspec.ValidationError):
        decode_state_record(encode(job))


def test_a_decision_s_kind_may_be_absent_or_of_a_newer_version() -> None:
    text = '{"task_id": "t", "task": "t", "accepted": false, "reason": "no"%s}'
    for kind, expected in (
        ("", DecisionKind.OTHER),
        (', "kind": "plan"', DecisionKind.PLAN),
        (', "kind": "not known yet"', DecisionKind.OTHER),
    ):
        assert msgspec.json.decode(text % kind, type=Decision).kind is expected


def test_hardware_has_a_short_name() -> None:
    assert Hardware(device="H100", count=4, memory_bytes=80 * 2**30).name == "4xH100-80GB"
    assert Hardware(device="cpu", count=2, memory_bytes=24 * 2**30).name == "cpu"


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(schemas(), indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    ("columns", "task_type"),
    [
        ({"field_instruction": "q", "field_output": "a"}, TaskType.INSTRUCT),
        ({"field_instruction": "text"}, TaskType.INSTRUCT),
        ({"field_instruction": "q", "chat_template": "chatml"}, TaskType.INSTRUCT),
        ({"field_prompt": "p", "field_chosen": "c", "field_rejected": "r"}, TaskType.DPO),
        ({"field_rejected": "r"}, TaskType.DPO),
        ({"chat_template": "chatml", "chat_column": "conversations"}, TaskType.CHAT),
        ({}, None),
        ({"field_system": "s"}, None),
    ],
)
def test_the_columns_tell_the_kind_of_task(columns: dict[str, str], task_type: TaskType | None) -> None:
    """The gateway and the command line ask the same function."""
    named = msgspec.convert(columns, DatasetType)
    for otherwise in TaskType:
        assert task_type_of(named, otherwise) is (task_type or otherwise)
    assert task_type_of(named) is (task_type or TaskType.INSTRUCT)
