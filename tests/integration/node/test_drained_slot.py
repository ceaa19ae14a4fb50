"""An operator steers a real node over a real gateway: nothing is lost, and nothing is trained twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from gateway.server import listening_socket, running
from shared.messages.jobs import Claimed, Result, ResultStatus, Submitting
from tests.integration.gateway.conftest import Api

COLUMNS = {"field_instruction": "q", "field_output": "a"}


@pytest.fixture
async def api(world: Any) -> AsyncIterator[Api]:
    """A gateway for the world's nodes."""
    settings = world.make_settings(
        gateway_id="g",
        data_dir=str(world.folder / "gateway"),
        slots=["a"],
        heartbeat_missing_s=3.0,
        poll_s=0.5,
    )
    listening = listening_socket(settings, {})
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    async with running(settings, listening), aiohttp.ClientSession(url) as client:
        yield Api(client)


def job(world: Any, task: str, **knobs: Any) -> dict[str, Any]:
    """An offer whose worker does as the knobs say."""
    data = world.knobs / f"{task}.json"
    data.write_text(json.dumps(knobs))
    return {
        "task_id": task,
        "task_type": "InstructTextTask",
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "model_params_count": 134_515_008,
        "hours_to_complete": 1,
        "dataset": str(data),
        "dataset_type": COLUMNS,
    }


async def post(api: Api, path: str) -> dict[str, Any]:
    async with api.client.post(path, json={}) as response:
        body: dict[str, Any] = await response.json(content_type=None)
        assert response.status == 200, body
        return body


async def test_a_drained_node_sees_its_job_through_also_if_it_is_killed(world: Any, api: Api) -> None:
    node = world.node().start()
    await api.until_live("a")
    assert (await api.offer(job(world, "job1", steps=40, checkpoint_every=5)))[1]["accepted"]
    await world.trained(node, 6)
    drained = await post(api, "/v1/slots/a/drain")
    assert (drained["task"], drained["state"]) == ("job1", "busy")
    await node.kill()
    node.start()
    result = await world.result()
    assert (result.status, result.digest) == (ResultStatus.SUBMITTED, world.submitted())
    assert world.steps(node) == sorted(set(world.steps(node))), "a step was trained twice"
    records = [type(record) for record in await world.chain()]
    assert records.count(Submitting) == records.count(Result) == 1

    await api.until_live("a")
    _, refused = await api.offer(job(world, "job2", steps=2))
    assert (refused["accepted"], "a: drained by an operator" in refused["reason"]) == (False, True)
    await asyncio.sleep(1.0)
    assert await world.chain("job2") == []
    assert (await post(api, "/v1/slots/a/resume"))["drain"] is None
    assert (await api.offer(job(world, "job2", steps=2)))[1]["accepted"]
    assert (await world.result("job2")).status is ResultStatus.SUBMITTED


async def test_cancel_and_requeue_work_on_a_drained_slot(world: Any, api: Api) -> None:
    node = world.node().start()
    await api.until_live("a")
    assert (await api.offer(job(world, "job1", steps=400, checkpoint_every=5)))[1]["accepted"]
    await world.trained(node, 6)
    await post(api, "/v1/slots/a/drain")
    first = node.worker().pid
    assert (await post(api, "/v1/tasks/job1/requeue"))["state"] == "running"
    assert node.worker().pid != first
    claims = [record for record in await world.chain() if isinstance(record, Claimed)]
    assert claims[-1].step >= 5, "it goes on from its checkpoint"
    assert (await post(api, "/v1/tasks/job1/cancel"))["state"] == "cancelled"
    await api.until("/v1/slots", lambda body: body["slots"][0]["state"] == "free")

    async def worker_ended() -> bool:
        return [line["event"] for line in node.slot_log()][-1] == "released"

    await world.until(worker_ended, 30, "the worker of the cancelled job did not end")
    assert not (world.settings.artifacts / "job1").exists()
    assert (await world.result()).status is ResultStatus.CANCELLED
