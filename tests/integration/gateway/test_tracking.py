"""`podium track` from a real gateway into the real trackio, without network; read back by trackio."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from shared import subjects
from shared.broker.bus import Bus
from shared.messages.encoding import encode
from shared.messages.jobs import Result, ResultStatus
from shared.messages.runs import Metrics, Phase, Progress

MakeOffer = Callable[..., dict[str, Any]]
READ = """
import json
from trackio.sqlite_storage import SQLiteStorage as storage
print(json.dumps([
    {"name": run["name"], "config": storage.get_run_config("podium", run_id=run["id"]),
     "rows": storage.get_logs("podium", run_id=run["id"])}
    for run in storage.get_run_records("podium")
]))
"""


class Tracker:
    """Starts `podium track` in processes of its own, all with one folder of trackio."""

    def __init__(self, folder: Path) -> None:
        self.environment = os.environ | {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}

    async def start(self, *words: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, *words),
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def track(self, api: Any, *words: str) -> asyncio.subprocess.Process:
        return await self.start("-m", "podium", "track", "--url", str(api.client._base_url), *words)

    async def ends(self, process: asyncio.subprocess.Process) -> list[str]:
        out, errors = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, errors.decode()
        return out.decode().splitlines()

    async def once(self, api: Any) -> list[str]:
        return await self.ends(await self.track(api, "--once"))

    async def runs(self) -> dict[str, Any]:
        (line,) = await self.ends(await self.start("-c", READ))
        found = json.loads(line)
        assert len({run["name"] for run in found}) == len(found), "one run per task"
        return {run["name"]: run for run in found}


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    return Tracker(tmp_path / "trackio")


async def accept(api: Any, offer: dict[str, Any]) -> str:
    _, decision = await api.offer(offer)
    assert decision["accepted"], decision
    return str(decision["slot"])


async def train(bus: Bus, task: str, slot: str, steps: range, began: float) -> None:
    """Report steps, a second apart, with a held-out loss at each tenth."""
    for step in steps:
        dev = 3.0 - step // 10 / 10 if step >= 10 else None
        point = Progress(
            task=task,
            slot=slot,
            phase=Phase.TRAIN,
            step=step,
            loss=3.0 - step / 50,
            lr=1e-4,
            tokens_per_s=100.0,
            base_loss=3.0,
            dev_loss=dev,
            at=began + step,
        )
        await bus.publish(subjects.progress(slot, task), encode(point))


async def end(bus: Bus, task: str, slot: str, status: ResultStatus, **fields: Any) -> None:
    result = Result(
        record_id=f"r-{task}", task=task, task_id=task, slot=slot, status=status, at=time.time(), **fields
    )
    await bus.append(subjects.state_stream(slot), subjects.state(slot, task), encode(result))


def values_of(run: dict[str, Any], name: str) -> list[Any]:
    return [row[name] for row in run["rows"] if name in row]


async def test_a_run_is_whole_and_single_although_tracker_and_gateway_were_killed(
    bus: Bus,
    start_gateway: Any,
    heartbeats: Callable[..., None],
    make_offer: MakeOffer,
    tracker: Tracker,
) -> None:
    heartbeats("a", "b")
    began = time.time()
    async with start_gateway() as api:
        await api.until_live("a", "b")
        slot = await accept(api, make_offer("one"))
        plan = Progress(
            task="one",
            slot=slot,
            phase=Phase.LOADING,
            at=began,
            message="plan: packs is 8 instead of 64: time",
        )
        await bus.publish(subjects.progress(slot, "one"), encode(plan))
        await train(bus, "one", slot, range(1, 31), began)
        killed = await tracker.track(api, "--every", "1", "--json")
        assert killed.stdout is not None
        line = json.loads(await asyncio.wait_for(killed.stdout.readline(), 30))
        assert (line["run"], line["rows"], line["ended"]) == ("one", 33, False)
        await train(bus, "one", slot, range(31, 41), began)
        line = json.loads(await asyncio.wait_for(killed.stdout.readline(), 30))
        assert line["rows"] == 11  # ten steps and a held-out loss: only what is new
        killed.kill()
        await killed.wait()
        await train(bus, "one", slot, range(41, 51), began)
        await api.until("/v1/tasks/one/progress", lambda view: view["points"] == 50)
    await train(bus, "one", slot, range(51, 61), began)  # neither gateway nor tracker runs
    async with start_gateway() as api:
        await api.until("/v1/tasks/one/progress", lambda view: view.get("points") == 60)
        following = await tracker.track(api, "one", "--every", "1")
        await end(
            bus,
            "one",
            slot,
            ResultStatus.SUBMITTED,
            artifact="/artifacts/one",
            deadline_margin_s=600.0,
            metrics=Metrics(base_loss=3.0, final_loss=2.4, steps=60),
        )
        said = await tracker.ends(following)
        assert await tracker.once(api) == []  # nothing is left to write
    assert said[-1] == "one: submitted, in project podium"
    run = (await tracker.runs())["one"]
    losses = [row for row in run["rows"] if "train/loss" in row]
    assert [row["train/step"] for row in losses] == list(range(1, 61))
    assert [row["train/loss"] for row in losses] == pytest.approx([3.0 - step / 50 for step in range(1, 61)])
    times = [datetime.fromisoformat(row["timestamp"]).timestamp() for row in losses]
    assert times == pytest.approx([began + step for step in range(1, 61)], abs=1e-3)
    assert [row["step"] for row in losses] == pytest.approx(range(1, 61), abs=1)  # seconds
    assert set(values_of(run, "train/learning_rate")) == {1e-4}
    assert values_of(run, "dev/loss") == pytest.approx([2.9, 2.8, 2.7, 2.6, 2.5, 2.4])
    assert values_of(run, "result/held_out_loss") == [2.4]
    assert values_of(run, "result/gain") == pytest.approx([0.6])
    assert values_of(run, "result/margin_s") == [600.0]
    wanted = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "hours_to_complete": 2,
        "slot": slot,
        "plan.deviation.packs": "8 instead of 64: time",
        "result.status": "submitted",
        "result.artifact": "/artifacts/one",
    }
    assert {name: run["config"].get(name) for name in wanted} == wanted
    assert "decision.task_weight" in run["config"]


async def test_two_trackers_write_each_row_once_and_a_later_score_is_added(
    api: Any, bus: Bus, make_offer: MakeOffer, tracker: Tracker
) -> None:
    secret = "https://example.invalid/rows.jsonl?X-Amz-Signature=5e3c"
    won = await accept(api, make_offer("won", dataset=secret))
    lost = await accept(api, make_offer("lost"))
    began = time.time() - 60
    await train(bus, "won", won, range(1, 11), began)
    both = [await tracker.track(api, "--every", "1", "--json", "won", "lost") for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.readline(), 30)  # each has written what there was
    await train(bus, "won", won, range(11, 21), began)
    await end(bus, "won", won, ResultStatus.SUBMITTED, metrics=Metrics(base_loss=3.0, final_loss=2.0))
    await end(bus, "lost", lost, ResultStatus.FAILED, reason="no memory")
    said = [json.loads(line) for process in both for line in await tracker.ends(process)]
    assert {line["run"] for line in said if line["ended"]} == {"won", "lost"}
    async with api.client.post("/v1/scores", json={"task_id": "won", "quality_score": 3}) as response:
        assert response.status == 200
    await api.until("/v1/tasks/won", lambda view: view["score"] is not None)
    assert await tracker.once(api) == ["won: submitted, in project podium"]
    runs = await tracker.runs()
    assert values_of(runs["won"], "train/step") == [
        *range(1, 11),
        10,
        *range(11, 21),
        20,
    ]  # and held-out rows
    assert values_of(runs["won"], "result/submitted") == [0.0]  # this result has no margin
    assert values_of(runs["won"], "score/quality_score") == [3.0]
    assert runs["won"]["config"]["score.quality_score"] == 3.0
    assert runs["lost"]["config"]["result.reason"] == "no memory"
    assert "Signature" not in json.dumps(runs)


async def test_a_store_that_fails_is_waited_for(
    api: Any, bus: Bus, make_offer: MakeOffer, tracker: Tracker, tmp_path: Path
) -> None:
    slot = await accept(api, make_offer("one"))
    await train(bus, "one", slot, range(1, 6), time.time())
    await api.until("/v1/tasks/one/progress", lambda view: view["points"] == 5)
    process = await tracker.track(api, "--every", "1", "one")
    assert process.stdout is not None
    assert process.stderr is not None
    assert await asyncio.wait_for(process.stdout.readline(), 30) == b"one: running, in project podium\n"
    folder = tmp_path / "trackio"
    folder.rename(tmp_path / "away")
    folder.write_text("no folder")
    await train(bus, "one", slot, range(6, 11), time.time())
    assert b"trackio's files in" in await asyncio.wait_for(process.stderr.readline(), 30)
    folder.unlink()
    (tmp_path / "away").rename(folder)
    await end(bus, "one", slot, ResultStatus.CANCELLED)
    assert (await tracker.ends(process))[-1] == "one: cancelled, in project podium"
    assert len(values_of((await tracker.runs())["one"], "train/loss")) == 10


async def test_a_token_that_is_not_valid_any_more_ends_it(
    bus: Bus, start_gateway: Any, tracker: Tracker, tmp_path: Path
) -> None:
    """A service manager starts it again, with the new token."""
    tokens, own = tmp_path / "api.token", tmp_path / "own.token"
    for path in (tokens, own):
        path.touch(0o600)
        path.write_text("podium: the-first-token-of-all\n")
    tracker.environment["PODIUM_API_TOKEN_FILE"] = str(own)
    async with start_gateway(api_token_file=str(tokens)) as api:
        await api.until_ready()
        await tracker.once(api)
        process = await tracker.track(api, "--every", "1")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(process.wait(), 5)
        tokens.write_text("podium: the-token-that-came-later\n")
        _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert errors.decode().startswith("podium track: the gateway at http://127.0.0.1")
    assert "answered 401" in errors.decode()
