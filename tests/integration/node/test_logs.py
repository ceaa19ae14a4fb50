"""One task's way through the logs of every service: each line that is about it says so in the same field."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from podium.client import Client, Refusal
from shared.errors import PodiumError
from shared.net import free_port
from tests.integration.node.conftest import World

Line = dict[str, Any]


def lines_of(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def offer(world: World, task: str) -> bytes:
    data = world.knobs / "knobs.json"
    data.write_text(json.dumps({"steps": 3, "step_s": 0.05}))
    message = {
        "task_id": task, "task_type": "InstructTextTask", "model": "org/tiny-0.1B",
        "hours_to_complete": 1, "dataset": str(data),
    }  # fmt: skip
    return json.dumps(message).encode()


async def until_ready(client: Client) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                if (await asyncio.to_thread(client.slots))[0].live:
                    return
            except PodiumError:
                pass  # it starts
            await asyncio.sleep(0.1)


async def test_a_jobs_life_can_be_followed_by_its_task(world: World, tmp_path: Path) -> None:
    port, log_file = free_port(), tmp_path / "gateway.log"
    settings = {
        "nats_url": world.broker.url, "data_dir": world.settings.data_dir, "gateway_port": str(port),
        "expected_hardware": "cpu", "log_format": "json", "log_level": "debug", "slots": "a",
    }  # fmt: skip
    environment = os.environ | {f"PODIUM_{name.upper()}": value for name, value in settings.items()}
    node = world.node(log_format="json", slots="a").start()
    client = Client(f"http://127.0.0.1:{port}")
    with log_file.open("wb") as log:
        command = [sys.executable, "-m", "gateway"]
        gateway = await asyncio.to_thread(subprocess.Popen, command, env=environment, stderr=log)
    try:
        await until_ready(client)
        accepted = await asyncio.to_thread(client.offer, offer(world, "job/1"))
        assert not isinstance(accepted, Refusal)
        assert accepted.accepted, accepted.reason
        await asyncio.to_thread(client.offer, offer(world, "too-much"))
        result = await world.result(accepted.task)
        assert result.status == "submitted"
    finally:
        gateway.terminate()
        await asyncio.to_thread(gateway.wait, 60)
    node.signal(15)
    await node.wait()
    for path, service, expected in (
        (log_file, "gateway", {"offer accepted"}),
        (node.log_file, "node", {"claimed", "worker started", "submitting", "worker ended", "task ended"}),
    ):
        lines = lines_of(path)
        about = [line for line in lines if line.get("task") == accepted.task]
        assert {line["service"] for line in about} == {service}
        assert {line["slot"] for line in about} == {"a"}
        assert {line["event"] for line in about} >= expected
        silent = [line for line in lines if accepted.task in json.dumps(line) and "task" not in line]
        assert silent == []
    refused = [line["event"] for line in lines_of(log_file) if line.get("task") == "too-much"]
    assert refused == ["At maximum accuracy capacity: 1/1 jobs"]
