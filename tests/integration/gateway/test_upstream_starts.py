"""A start is compared with its offer; a reservation is its validator's, and no validator holds them all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from bench.fake_validator.validator import keys_from_seed
from shared.broker.bus import Bus
from tests.integration.gateway.conftest import Api
from tests.integration.gateway.upstream_client import (
    SIGNED,
    VALIDATOR,
    Start,
    Validator,
    accepted,
    offer,
    start,
)

DPO = {"field_prompt": "p", "field_chosen": "c", "field_rejected": "r"}


class Second(Validator):
    """Another validator that is allowed."""

    keys = keys_from_seed("second")
    address = keys.address


SECOND = Second()


@pytest.fixture
async def both(bus: Bus, start_gateway: Start, heartbeats: Callable[..., None]) -> AsyncIterator[Api]:
    """A gateway that takes requests of two validators."""
    heartbeats("a", "b")
    allowed = [VALIDATOR.address, SECOND.address]
    async with start_gateway(**(SIGNED | {"upstream_validators": allowed})) as api:
        await api.until_ready()
        await api.until_live("a", "b")
        yield api


async def counted(api: Api) -> str:
    async with api.client.get("/metrics") as response:
        text = await response.text()
    name = 'podium_starts_total{outcome="mismatch"} '
    return next(line for line in text.splitlines() if line.startswith(name)).removeprefix(name)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"model": "org/another"}, "its model is 'org/another'"),
        ({"dataset_type": DPO}, "its columns are those of DpoTask, and InstructTextTask was offered"),
        ({"hours_to_complete": 4}, "it is for 4 hours, and 3 were offered"),
        ({"hours_to_complete": 97}, "it is for 97 hours, and the limit is 96"),
    ],
)
async def test_a_start_of_another_task_than_the_accepted_one_is_refused(
    both: Api, changed: dict[str, Any], why: str
) -> None:
    assert await accepted(both, "t1")
    status, answer = await VALIDATOR.post(both, "/start_training/", start("t1", **changed))
    assert (status, answer["type"], answer["status"]) == (409, "urn:podium:problem:start-differs", 409)
    assert why in answer["detail"]
    assert await counted(both) == "1.0"
    assert (await both.get("/v1/tasks/t1"))[1]["state"] == "reserved"
    assert (await VALIDATOR.post(both, "/start_training/", start("t1")))[0] == 200


async def test_over_v1_too_the_data_must_be_for_the_accepted_task(
    both: Api, make_offer: Callable[..., dict[str, Any]]
) -> None:
    assert await accepted(both, "t1")
    status, answer = await both.offer(make_offer("t1", model="org/another"))
    assert (status, answer["type"]) == (409, "urn:podium:problem:start-differs")
    status, answer = await both.offer(make_offer("t1"))
    assert (status, answer["accepted"]) == (200, True)


async def test_a_reservation_belongs_to_its_validator(both: Api) -> None:
    assert await accepted(both, "t1")
    assert (await both.get("/v1/tasks/t1"))[1]["decision"]["validator"] == VALIDATOR.address
    status, answer = await SECOND.post(both, "/start_training/", start("t1"))
    assert (status, answer["detail"]) == (409, "task 't1' was offered by another validator")
    status, answer = await SECOND.post(both, "/task_offer/", offer("t1"))
    assert (status, answer["accepted"]) == (200, False)
    assert "accepted from another validator" in answer["message"]
    assert (await VALIDATOR.post(both, "/start_training/", start("t1")))[0] == 200
    status, _ = await SECOND.post(both, "/start_training/", start("t1"))
    assert status == 409
    assert await counted(both) == "2.0"


async def test_one_validator_holds_one_reservation_while_others_ask(both: Api) -> None:
    assert await accepted(both, "t1")
    status, answer = await SECOND.post(both, "/task_offer/", offer("far", hours_to_complete=97))
    assert (status, answer["accepted"]) == (200, False)  # but it asked
    status, answer = await VALIDATOR.post(both, "/task_offer/", offer("t2"))
    assert (status, answer["accepted"]) == (200, False)
    assert answer["message"] == "This validator holds a reservation already (task 't1'), and others ask"
    assert await accepted(both, "t1")  # the same again is no second one
    assert (await SECOND.post(both, "/task_offer/", offer("s1")))[1]["accepted"] is True
    assert (await both.get("/v1/tasks"))[1]["tasks"][0]["task_id"] == "s1"


async def test_a_started_job_is_no_reservation(both: Api) -> None:
    await SECOND.post(both, "/task_offer/", offer("far", hours_to_complete=97))
    assert await accepted(both, "t1")
    assert (await VALIDATOR.post(both, "/start_training/", start("t1")))[0] == 200
    assert await accepted(both, "t2")


async def test_alone_a_validator_may_hold_every_slot(both: Api) -> None:
    assert await accepted(both, "t1")
    assert await accepted(both, "t2")
