"""Real nodes whose submissions leave the machine: killed at every step, one submission and one result."""

from __future__ import annotations

import asyncio
import hashlib
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import nats.js
import pytest

from bench.harness.fake_hub import FakeHub
from shared.broker.streams import bootstrap
from shared.files import digest_of, file_digest, folder_digest
from shared.messages.jobs import Claimed, ResultStatus
from tests.integration.node.conftest import NodeProcess, World
from trainer_node.fault_injection import VARIABLE, FaultPoint

REPO = "me/podium-job1"


async def test_a_node_killed_between_store_and_result_leaves_a_submission_that_any_other_names(
    world: World,
) -> None:
    """The heir has another disk, and only the object store to go by."""
    await bootstrap(world.bus, world.make_settings(artifacts_kind="object"))
    values = {"artifacts_kind": "object"}
    first = world.node("one", **values, artifacts_dir=world.folder / "disk1")
    first.environment[VARIABLE] = FaultPoint.STORED
    first.start()
    await world.give(steps=3, step_s=0.01)
    assert await first.wait() == -signal.SIGKILL
    heir = world.node("two", **values, artifacts_dir=world.folder / "disk2").start()
    result = await world.result(timeout_s=60)
    assert (result.status, result.node) == (ResultStatus.SUBMITTED, heir.node_id)
    assert result.digest == folder_digest(world.folder / "disk1/job1/submission")
    assert result.artifact == f"nats://artifacts-a/job1/{result.digest}"
    assert not (heir.folder / "worker.json").exists()
    assert not (world.folder / "disk2").exists()
    bucket = await nats.js.JetStreamContext(world.bus.client).object_store("artifacts-a")
    assert [info.name for info in await bucket.list()] == [f"job1/{result.digest}"]


async def test_a_node_killed_before_it_stored_stores_once(world: World) -> None:
    await bootstrap(world.bus, world.make_settings(artifacts_kind="object"))
    node = world.node(artifacts_kind="object")
    node.environment[VARIABLE] = FaultPoint.ANNOUNCED
    node.start()
    await world.give(steps=3, step_s=0.01)
    assert await node.wait() == -signal.SIGKILL
    del node.environment[VARIABLE]
    node.start()
    result = await world.result(timeout_s=60)
    assert result.digest == world.submitted()  # the copy on disk is the same
    bucket = await nats.js.JetStreamContext(world.bus.client).object_store("artifacts-a")
    assert [info.name for info in await bucket.list()] == [f"job1/{result.digest}"]


@pytest.mark.parametrize("wanted", [True, False])
async def test_a_result_tells_upstreams_hash_if_it_is_to_be_told(world: World, wanted: bool) -> None:
    world.node(upstream_model_hash=wanted).start()
    await world.give(steps=3, step_s=0.01, adapter_config="{}")
    result = await world.result(timeout_s=60)
    config = world.settings.artifacts / "job1/submission/adapter_config.json"
    expected = hashlib.sha256(f"adapter_config.json:{file_digest(config)}".encode()).hexdigest()
    assert result.model_hash == (expected if wanted else None)


def hub_node(world: World, hub: FakeHub, name: str = "one", **values: Any) -> NodeProcess:
    token = world.folder / "token"
    token.write_text(hub.token)
    known = {
        "artifacts_kind": "hub",
        "hub_url": hub.url,
        "hub_namespace": "me",
        "hub_token_file": token,
    }
    return world.node(name, **(known | values))


def uploads(hub: FakeHub) -> list[str]:
    """Processes that upload to this hub."""
    variable = f"PODIUM_HUB_URL={hub.url}\0".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            command = (folder / "cmdline").read_bytes()
            if b"hub_process" in command and variable in (folder / "environ").read_bytes():
                found.append(folder.name)
    return found


def committed(hub: FakeHub) -> list[str]:
    return [commit["title"] for commit in hub.repos.get(REPO, [])]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_node_killed_at_every_step_of_an_upload_commits_once(world: World, hub: FakeHub) -> None:
    node = hub_node(world, hub)
    await world.give(seconds=600, steps=3, step_s=0.01)
    for kind, after in [
        ("create", True),
        ("preupload", False),
        ("put", False),
        ("commit", False),
        ("commit", True),
    ]:
        hold = hub.hold(kind, after=after)
        node.start()
        assert await asyncio.to_thread(hold.reached.wait, 60), (kind, after, node.log[-2000:])
        await node.kill()
        await world.until(
            lambda: asyncio.to_thread(lambda: not uploads(hub)), 60, "the upload outlived its node"
        )
        hold.forget()
        assert committed(hub)[1:] == (["podium: job1"] if (kind, after) == ("commit", True) else [])
    node.environment[VARIABLE] = FaultPoint.STORED  # it finds the commit, reads it back, and dies once more
    node.start()
    assert await node.wait() == -signal.SIGKILL
    del node.environment[VARIABLE]
    node.start()
    result = await world.result(timeout_s=60)
    assert committed(hub) == ["initial commit", "podium: job1"]
    assert result.status is ResultStatus.SUBMITTED
    assert result.artifact == f"hf://{REPO}@{hub.repos[REPO][-1]['id']}"
    (there,) = hub.repos[REPO][-1]["files"].keys() - {".gitattributes"}
    export = node.folder / "runs/job1/export" / there
    assert result.digest == world.submitted() == digest_of({there: file_digest(export)})
    assert {claim.attempt for claim in await world.chain() if isinstance(claim, Claimed)} == {1}
    assert hub.token not in node.log


@pytest.mark.parametrize(
    ("kind", "patience_s", "says"),
    [("commit", 60, "could not be stored: .* answers 503"), ("commits", 1, "nobody knows whether")],
)
async def test_a_hub_of_no_use_at_upstreams_deadline_fails_the_task_and_says_why(
    world: World, hub: FakeHub, kind: str, patience_s: float, says: str
) -> None:
    """The life before had put the submission on disk when it died, and now it is late."""
    hub.fault(kind, *[503] * 1000)
    await world.give(seconds=0.01)
    kept = world.settings.artifacts.absolute() / "job1" / "submission"
    kept.mkdir(parents=True)
    (kept / "adapter.txt").write_text("weights")
    hub_node(world, hub, deadline_margin_s=0.01, expire_after_s=patience_s).start()
    result = await world.result(timeout_s=90)
    assert (result.status, result.artifact) == (ResultStatus.FAILED, None)
    assert re.search(f"{says}.*; kept at {kept}", result.reason)
    assert (kept / "adapter.txt").read_text() == "weights"
    assert "podium: job1" not in committed(hub)


async def test_a_hub_that_comes_back_in_time_gets_the_submission(world: World, hub: FakeHub) -> None:
    """While it is away nobody knows what it holds: no second announcement, no worker, no result."""
    hub.fault("commits", "drop", 502)
    node = hub_node(world, hub).start()
    await world.give(seconds=600, steps=3, step_s=0.01)
    result = await world.result(timeout_s=90)
    assert result.status is ResultStatus.SUBMITTED
    assert [type(record).__name__ for record in await world.chain()] == ["Claimed", "Submitting", "Result"]
    assert "will retry" in node.log


async def test_a_drain_does_not_wait_for_an_upload_and_the_next_life_ends_it(
    world: World, hub: FakeHub
) -> None:
    hold = hub.hold("put")
    node = hub_node(world, hub).start()
    await world.give(seconds=600, steps=3, step_s=0.01)
    assert await asyncio.to_thread(hold.reached.wait, 60)
    node.signal(signal.SIGTERM)
    assert await node.wait() == 0
    assert not uploads(hub)
    hold.forget()
    node.start()
    assert (await world.result(timeout_s=90)).status is ResultStatus.SUBMITTED
    assert committed(hub) == ["initial commit", "podium: job1"]


async def test_a_name_that_no_hub_takes_fails_before_the_run(world: World, hub: FakeHub) -> None:
    node = hub_node(world, hub).start()
    await world.give("-")
    result = await world.result("-", timeout_s=60)
    assert result.status is ResultStatus.FAILED
    assert "takes no repository named" in result.reason
    assert not (node.folder / "worker.json").exists()
