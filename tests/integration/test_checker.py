"""The judge of the chaos runs must see each violation: every one is made on purpose here."""

from __future__ import annotations

import json
from pathlib import Path

from bench.harness.checker import Report, check
from shared import subjects
from shared.broker.bus import Bus
from shared.files import folder_digest
from shared.messages.encoding import encode
from shared.messages.jobs import Claimed, Job, Moved, Result, ResultStatus, SlotDrain, Submitting
from shared.messages.offers import DatasetType, Decision, Offer, TaskType


async def store_job(
    bus: Bus,
    task: str,
    slot: str = "a",
    *,
    deadline_at: float = 100.0,
    decided_at: float = 60.0,
    moved_from: str | None = None,
) -> None:
    offer = Offer(
        task_id=task,
        task_type=TaskType.INSTRUCT,
        model="m",
        hours_to_complete=1.0,
        dataset="d",
        dataset_type=DatasetType(),
    )
    decision = Decision(
        task_id=task, task=task, accepted=True, reason="yes", slot=slot, decided_at=decided_at
    )
    job = Job(
        record_id=f"job-{task}-{slot}",
        task_id=task,
        task=task,
        slot=slot,
        gateway="g",
        offer=offer,
        decision=decision,
        received_at=0.0,
        deadline_at=deadline_at,
        moved_from=moved_from,
    )
    await bus.append(subjects.JOBS_STREAM, subjects.job(slot, task), encode(job))


async def store_result(
    bus: Bus, task: str, *, digest: str | None, at: float = 50.0, slot: str = "a", announced: bool = True
) -> None:
    if digest and announced:
        submitting = Submitting(record_id="s", task=task, slot=slot, node="n", epoch=1, digest=digest)
        await bus.append(subjects.state_stream(slot), subjects.state(slot, task), encode(submitting))
    status = ResultStatus.SUBMITTED if digest else ResultStatus.FAILED
    result = Result(
        record_id="r",
        task=task,
        task_id=task,
        slot=slot,
        status=status,
        digest=digest,
        at=at,
        node="n",
        epoch=1,
    )
    await bus.append(subjects.state_stream(slot), subjects.state(slot, task), encode(result))


async def store_claim(bus: Bus, task: str, *, node: str = "n", epoch: int = 1) -> None:
    claim = Claimed(record_id="c", task=task, slot="a", node=node, epoch=epoch, attempt=1)
    await bus.append(subjects.state_stream("a"), subjects.state("a", task), encode(claim))


async def store_move(bus: Bus, task: str, slot: str = "a") -> None:
    moved = Moved(record_id="m", task=task, slot=slot, gateway="g")
    await bus.append(subjects.state_stream(slot), subjects.state(slot, task), encode(moved))


def store_artifact(artifacts: Path, task: str, name: str = "submission") -> str:
    folder = artifacts / task / name
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(task.encode())
    return folder_digest(folder)


async def judge(bus: Bus, tmp_path: Path, acknowledged: set[str]) -> Report:
    logs = {"a": tmp_path / "slot.log"}
    return await check(bus, acknowledged=acknowledged, artifacts=tmp_path / "artifacts", lock_logs=logs)


async def test_a_good_run_is_clean(bus: Bus, tmp_path: Path) -> None:
    digest = store_artifact(tmp_path / "artifacts", "t1")
    await store_job(bus, "t1")
    for _ in range(2):
        await store_claim(bus, "t1")
    await store_result(bus, "t1", digest=digest)
    report = await judge(bus, tmp_path, {"t1"})
    assert report.clean, report.findings
    assert (report.jobs, report.results, report.resumes) == (1, {"submitted": 1}, 1)


async def test_the_drain_of_a_slot_is_no_job(bus: Bus, tmp_path: Path) -> None:
    await store_job(bus, "t1")
    await store_result(bus, "t1", digest=store_artifact(tmp_path / "artifacts", "t1"))
    drain = SlotDrain(record_id="d", slot="a", drained=True, reason="new disk", at=50.0)
    await bus.append(subjects.JOBS_STREAM, subjects.drain("a"), encode(drain))
    report = await judge(bus, tmp_path, {"t1"})
    assert report.clean, report.findings
    assert report.jobs == 1


async def test_every_violation_is_seen(bus: Bus, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    await store_job(bus, "twice", "a")
    await store_job(bus, "twice", "b")
    await store_job(bus, "unfinished")
    await store_job(bus, "double")
    digest = store_artifact(artifacts, "double")
    await store_result(bus, "double", digest=digest)
    await store_result(bus, "double", digest=digest)
    await store_job(bus, "late")
    await store_result(bus, "late", digest=store_artifact(artifacts, "late"), at=101.0)
    await store_job(bus, "forged")
    store_artifact(artifacts, "forged")
    await store_result(bus, "forged", digest="0" * 64)
    await store_job(bus, "after")
    await store_result(bus, "after", digest=store_artifact(artifacts, "after"))
    await store_claim(bus, "after")
    await store_job(bus, "two-names")
    await store_result(bus, "two-names", digest=store_artifact(artifacts, "two-names"))
    store_artifact(artifacts, "two-names", "submission-2")
    report = await judge(bus, tmp_path, {"gone", "double"})

    assert (report.lost, report.stored_twice, report.late) == (1, 1, 1)
    assert report.without_result == 2  # `unfinished` and `twice`: a task counts once
    assert report.double_submissions == 2
    text = "\n".join(report.findings)
    for sentence in (
        "gone: acknowledged but not stored",
        "twice: stored 2 times",
        "unfinished: 0 results",
        "double: 2 results",
        "late: submitted 1.0 s late",
        "forged: stored",
        "after: something was written after the result",
        "two-names: 2 submissions are stored",
    ):
        assert sentence in text


async def test_a_job_moves_once_and_only_behind_a_fence(bus: Bus, tmp_path: Path) -> None:
    async def moved(task: str, *, fence: bool = True, claimed: bool = False, times: int = 1) -> None:
        await store_job(bus, task)
        if fence:
            await store_move(bus, task)
        if claimed:
            await store_claim(bus, task)
        for _ in range(times):
            await store_job(bus, task, "b", moved_from="a")
        digest = store_artifact(tmp_path / "artifacts", task)
        await store_result(bus, task, digest=digest, slot="b")

    await moved("good")
    assert (await judge(bus, tmp_path, {"good"})).clean
    await moved("unfenced", fence=False)
    await moved("claimed", claimed=True)
    await moved("again", times=2)
    await store_job(bus, "never-there", "b", moved_from="a")
    report = await judge(bus, tmp_path, {"good", "unfenced", "claimed", "again", "never-there"})
    assert report.lost == 1
    text = "\n".join(report.findings)
    for sentence in (
        "never-there: acknowledged but not stored",
        "unfenced: stored for slot b while slot a could still claim it",
        "claimed: slot a wrote about it, though it had moved",
        "again: moved 2 times",
        "never-there: moved off slot a, for which it was not stored",
    ):
        assert sentence in text


async def test_a_slot_is_one_jobs_and_one_epochs_at_a_time(bus: Bus, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    await store_job(bus, "t1")
    await store_claim(bus, "t1")
    await store_claim(bus, "t1", node="heir", epoch=5)
    await store_claim(bus, "t1", node="n", epoch=5)
    await store_claim(bus, "t1", node="n", epoch=1)
    await store_job(bus, "t2", decided_at=40.0)
    await store_result(bus, "t1", digest=None, at=50.0)
    await store_result(bus, "t2", digest=store_artifact(artifacts, "t2"), announced=False)
    report = await judge(bus, tmp_path, set())
    assert (report.overlaps, report.takeovers) == (1, 2)
    text = "\n".join(report.findings)
    for sentence in (
        "slot a: t2 was accepted before t1 had a result",
        "n and heir both wrote under epoch 5",
        "epoch 1 was written after epoch 5",
        "which nobody had announced",
    ):
        assert sentence in text


async def test_two_workers_on_one_slot_are_seen(bus: Bus, tmp_path: Path) -> None:
    events = [("acquired", 1), ("released", 1), ("acquired", 2), ("acquired", 3)]
    lines = [json.dumps({"event": event, "pid": pid, "task": "t", "at": 0.0}) for event, pid in events]
    (tmp_path / "slot.log").write_text("\n".join(lines) + "\n")
    report = await judge(bus, tmp_path, set())
    assert report.overlaps == 1
    assert "3 (t) took the lock at 0.00 while 2 (t) held it" in report.findings[0]
