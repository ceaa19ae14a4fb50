"""Operators at a real gateway: list, inspect, cancel, requeue, and every way to be refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from nats.aio.msg import Msg

from podium.__main__ import main
from podium.client import Client
from podium.commands.fleet.jobs import show
from podium.console import make_console
from shared import subjects
from shared.broker.bus import Bus
from shared.errors import PodiumError
from shared.messages.encoding import encode
from shared.messages.jobs import Claimed, Result, ResultStatus, Submitting, decode_state_record
from shared.messages.slots import ControlAnswer, ControlKind, decode_control

STATE = subjects.state_stream("a")
CLAIMED = Claimed(record_id="c", task="one", slot="a", node="n", epoch=3, attempt=2, step=40)
SUBMITTING = Submitting(record_id="s", task="one", slot="a", node="n", epoch=3, digest="d")
FAILED = Result(
    record_id="r", task="one", task_id="one", slot="a", status=ResultStatus.FAILED, reason="odd [x]"
)


async def write(bus: Bus, message: Any) -> None:
    await bus.append(subjects.state_stream("a"), subjects.state("a", "one"), encode(message))


async def post(api: Any, path: str, **arguments: Any) -> tuple[int, dict[str, Any]]:
    arguments = arguments or {"json": {"reason": "wrong data"}}
    async with api.client.post(path, **arguments) as response:
        return response.status, await response.json(content_type=None)


@pytest.fixture
async def one(api: Any, bus: Bus, make_offer: Any) -> Any:
    """A gateway that has accepted task `one` for slot a."""
    assert (await api.offer(make_offer("one")))[1]["slot"] == "a"
    return api


async def test_cancelling_writes_the_result_once_frees_the_slot_and_tells_the_node(
    one: Any, bus: Bus, make_offer: Any
) -> None:
    received = asyncio.Queue[Msg]()
    await bus.subscribe(subjects.control("a"), received.put)
    await write(bus, CLAIMED)
    status, task = await post(one, "/v1/tasks/one/cancel")
    assert (status, task["state"], task["result"]["reason"]) == (200, "cancelled", "wrong data")
    async with asyncio.timeout(60):
        assert decode_control((await received.get()).data).kind is ControlKind.LOOK
    status, problem = await post(one, "/v1/tasks/one/cancel")
    assert (status, problem["type"]) == (409, "urn:podium:problem:not-possible")
    assert "ended as cancelled" in problem["detail"]
    records = [decode_state_record(record.data) for record in await bus.read(STATE, 0)]
    assert [type(record) for record in records] == [Claimed, Result]
    assert (await one.offer(make_offer("two")))[1]["slot"] == "a"


async def test_of_many_that_cancel_at_once_one_does_and_a_node_that_ends_it_first_wins(
    one: Any, bus: Bus
) -> None:
    cancels = asyncio.gather(*(post(one, "/v1/tasks/one/cancel") for _ in range(10)))
    answers, _ = await asyncio.gather(cancels, write(bus, CLAIMED))
    assert sorted(status for status, _ in answers) == [200] + [409] * 9
    assert [type(decode_state_record(each.data)) for each in await bus.read(STATE, 0)].count(Result) == 1


@pytest.mark.parametrize(
    ("chain", "said"),
    [((CLAIMED, SUBMITTING), "being stored"), ((CLAIMED, FAILED), "ended as failed"), ((FAILED,), "ended")],
)
@pytest.mark.parametrize("operation", ["cancel", "requeue"])
async def test_what_is_about_to_end_or_has_ended_is_left_as_it_is(
    operation: str, chain: tuple[Any, ...], said: str, one: Any, bus: Bus
) -> None:
    for message in chain:
        await write(bus, message)
    status, problem = await post(one, f"/v1/tasks/one/{operation}")
    assert status == 409
    assert said in problem["detail"]
    assert len(await bus.read(STATE, 0)) == len(chain)


@pytest.mark.parametrize(("refusal", "status"), [("", 200), ("it has a result, or is about to get one", 409)])
async def test_requeue_asks_the_node_of_the_slot(refusal: str, status: int, one: Any, bus: Bus) -> None:
    async def node(message: Msg) -> None:
        control = decode_control(message.data)
        assert (control.kind, control.task, control.reason) == (ControlKind.REQUEUE, "one", "wrong data")
        if not refusal:
            await write(bus, CLAIMED)
        await bus.publish(message.reply, encode(ControlAnswer(not refusal, refusal)))

    await bus.subscribe(subjects.control("a"), node)
    got, body = await post(one, "/v1/tasks/one/requeue")
    assert got == status, body
    assert refusal in body.get("detail", "")
    assert body.get("attempts", 2) == 2


@pytest.mark.parametrize("answer", [b"{", b'{"more": ' + b"[" * 100_000])
async def test_a_nodes_answer_that_cannot_be_read_counts_as_none(answer: bytes, one: Any, bus: Bus) -> None:
    async def node(message: Msg) -> None:
        await bus.publish(message.reply, answer)

    await bus.subscribe(subjects.control("a"), node)
    status, problem = await post(one, "/v1/tasks/one/requeue")
    assert (status, problem["type"]) == (503, "urn:podium:problem:node-silent")
    assert "did not confirm" in problem["detail"]


async def test_requeue_without_a_node_says_so(one: Any) -> None:
    status, problem = await post(one, "/v1/tasks/one/requeue")
    assert (status, problem["type"]) == (503, "urn:podium:problem:node-silent")
    assert "no node of slot a is listening" in problem["detail"]


@pytest.mark.parametrize(
    ("path", "arguments", "status"),
    [
        ("/v1/tasks/none/cancel", {}, 404),
        ("/v1/tasks/none/requeue", {}, 404),
        # what a web page can make a browser send without asking is not taken
        ("/v1/tasks/one/cancel", {"data": b"{}", "headers": {"Content-Type": "text/plain"}}, 415),
        ("/v1/tasks/one/cancel", {"json": {"reason": "x" * 501}}, 400),
        ("/v1/tasks/one/cancel", {"json": [1]}, 400),
    ],
)
async def test_bad_requests_change_nothing(
    path: str, arguments: dict[str, Any], status: int, one: Any, bus: Bus
) -> None:
    assert (await post(one, path, **arguments))[0] == status
    assert await bus.read(STATE, 0) == []


async def test_the_command_lists_inspects_and_is_refused_in_one_line(
    one: Any, bus: Bus, make_offer: Any
) -> None:
    client = Client(str(one.client._base_url))
    assert (await one.offer(make_offer("two")))[1]["slot"] == "b"
    for message in (CLAIMED, FAILED):
        await write(bus, message)
    await one.until("/v1/tasks/one", lambda body: body["state"] == "failed")

    def tasks(**wanted: Any) -> list[str]:
        return [task.task for task in client.tasks(**wanted)]

    def look() -> None:
        assert tasks() == ["two", "one"]
        assert tasks(limit=1) == ["two"]
        assert tasks(states="failed,running") == ["one"]
        assert tasks(slot="b") == ["two"]
        assert tasks(states="failed", slot="b") == []
        with pytest.raises(PodiumError, match=r"400.*states are reserved"):
            client.tasks(states="sleeping")
        with pytest.raises(PodiumError, match=r"409.*ended as failed"):
            client.cancel("one", "")
        for code, command in ((0, "list"), (0, "list --json"), (0, "inspect one --json"), (1, "cancel one")):
            assert main(["jobs", *command.split(), "--url", client.url]) == code
        console = make_console()
        with console.capture() as captured:
            show(console, client.records("one"))
        text = captured.get()
        for said in (
            "h100_maximum_bonus",
            "attempt 2 from step 40",
            "failed, odd [x]",
            "epoch 3",
            "rows.jsonl",
        ):
            assert said in text

    await asyncio.to_thread(look)
