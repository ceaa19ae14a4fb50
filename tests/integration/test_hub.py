"""Submissions on a hub: its library, its own process and real sockets against a stand-in of the hub."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog

from bench.harness.fake_hub import FakeHub
from shared.errors import EngineError
from shared.files import folder_digest
from shared.messages.jobs import Job
from shared.messages.offers import Decision, Offer, TaskType
from shared.settings_sources import load_settings
from trainer_node import transfer_rates
from trainer_node.artifacts.hub import Hub
from trainer_node.artifacts.interface import Stored, StoreError
from trainer_node.lease import LeaseLostError

REPO = "me/6f1c-expected"
UPLOAD = transfer_rates.Direction.UPLOAD
OFFER = Offer(
    task_id="t1",
    task_type=TaskType.INSTRUCT,
    model="org/base",
    hours_to_complete=1,
    dataset="d",
    expected_repo_name="6f1c-expected",
)
JOB = Job(
    record_id="j",
    task_id="t1",
    task="t1",
    slot="a",
    gateway="g",
    offer=OFFER,
    decision=Decision(task_id="t1", task="t1", accepted=True, reason=""),
    received_at=0,
    deadline_at=0,
)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """What the engine makes: small files, and a large one that is uploaded in parts."""
    return make_export(tmp_path / "export", "one")


def make_export(folder: Path, text: str) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "README.md").write_text(f"---\nlibrary_name: peft\n---\n{text}\n")
    (folder / "adapter_model.safetensors").write_text(text * 900)
    (folder / "deep" / "more.safetensors").write_text(text)
    return folder


@pytest.fixture
def connect(hub: FakeHub, tmp_path: Path) -> Callable[..., Hub]:
    def make(**values: Any) -> Hub:
        token = tmp_path / "token"
        if not token.exists():
            token.write_text(f"{hub.token}\n")
        known = {"hub_url": hub.url, "hub_namespace": "me", "hub_token_file": str(token)}
        return Hub(load_settings({}, artifacts_kind="hub", **(known | values)))

    return make


async def put(hub: Hub, folder: Path, job: Job = JOB) -> Stored:
    return await hub.store(job, folder, folder_digest(folder), must_hold=lambda: None, limit_s=60)


def children() -> list[str]:
    """Command lines of this process's children."""
    pids = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
    return [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]


def titles(hub: FakeHub, repo: str = REPO) -> list[str]:
    return [commit["title"] for commit in hub.repos[repo]]


async def test_a_submission_is_one_commit_and_is_read_back(
    hub: FakeHub, connect: Callable[..., Hub], export: Path
) -> None:
    here = connect()
    assert await here.find(JOB) is None
    stored = await put(here, export)
    assert titles(hub) == ["initial commit", "podium: t1"]
    assert stored == Stored(folder_digest(export), f"hf://{REPO}@{hub.repos[REPO][-1]['id']}")
    assert hub.repos[REPO][-1]["files"]["deep/more.safetensors"] == b"one"
    assert hub.seen.count("complete") == 1  # the large one went in parts
    assert await here.find(JOB) == stored


@pytest.mark.parametrize("known", [[], ["adapter_model.safetensors"], None])
async def test_the_rate_is_that_of_uploads_that_sent_all(
    known: list[str] | None,
    hub: FakeHub,
    connect: Callable[..., Hub],
    export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hub that has a file, from an attempt before or of another repository, answers at once."""
    monkeypatch.setattr(transfer_rates, "LEAST_BYTES", 100)
    large = (export / "adapter_model.safetensors", export / "deep" / "more.safetensors")
    there = [path for path in large if known is None or path.name in known]
    hub.large.update({hashlib.sha256(path.read_bytes()).hexdigest(): path.read_bytes() for path in there})
    here = connect(node_dir=str(tmp_path))
    await put(here, export)
    rate = transfer_rates.measured(here.settings.node, UPLOAD)
    assert (rate is not None) == (known == [])
    if rate is not None:
        size = sum(path.stat().st_size for path in large)
        assert size / 30 < rate < size / 0.001
        transfer_rates.rate_file(here.settings.node, UPLOAD).unlink()
        await put(here, export)  # it is there
        assert transfer_rates.measured(here.settings.node, UPLOAD) is None


async def test_a_rate_that_can_not_be_kept_fails_no_upload(
    hub: FakeHub, connect: Callable[..., Hub], export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_rates, "LEAST_BYTES", 100)
    here = connect(node_dir=str(tmp_path))
    transfer_rates.rate_file(here.settings.node, UPLOAD).mkdir(parents=True)
    with structlog.testing.capture_logs() as logs:
        stored = await put(here, export)
    assert stored == await here.find(JOB)
    assert "can't keep the rate of transfers" in [line["event"] for line in logs]


async def test_of_two_that_commit_at_once_the_first_wins_and_both_name_it(
    hub: FakeHub, connect: Callable[..., Hub], export: Path, tmp_path: Path
) -> None:
    """Both looked, found nothing, and uploaded: only the commit's condition is left between them."""
    holds = [hub.hold("commit"), hub.hold("commit")]
    other = make_export(tmp_path / "other", "two")
    both = [asyncio.create_task(put(connect(), folder)) for folder in (export, other)]
    for hold in holds:
        assert await asyncio.to_thread(hold.reached.wait, 60)
    for hold in holds:
        hold.released.set()
    first, second = await asyncio.gather(*both)
    assert first == second
    assert first.digest in {folder_digest(export), folder_digest(other)}
    assert titles(hub) == ["initial commit", "podium: t1"]


async def test_a_wrong_token_is_said_and_a_better_one_is_taken_at_once(
    hub: FakeHub, connect: Callable[..., Hub], export: Path, tmp_path: Path
) -> None:
    here = connect()
    (tmp_path / "token").write_text("hf_wrong")
    with pytest.raises(StoreError, match="refuses the token \\(401\\): check hub_token_file") as error:
        await put(here, export)
    assert "hf_wrong" not in str(error.value)
    (tmp_path / "token").unlink()
    with pytest.raises(StoreError, match="can't be read"):
        await here.find(JOB)
    (tmp_path / "token").write_text(hub.token)
    assert await here.find(JOB) is None


async def test_a_node_that_lost_the_slot_does_not_commit(
    hub: FakeHub, connect: Callable[..., Hub], export: Path
) -> None:
    def must_hold() -> None:
        raise LeaseLostError("lost")

    with pytest.raises(LeaseLostError):
        await connect().store(JOB, export, "d", must_hold=must_hold, limit_s=60)
    assert "verify" in hub.seen  # all was uploaded
    assert "commit" not in hub.seen


async def test_a_stopped_upload_leaves_no_process(
    hub: FakeHub, connect: Callable[..., Hub], export: Path
) -> None:
    hold = hub.hold("put")
    upload = asyncio.create_task(put(connect(), export))
    assert await asyncio.to_thread(hold.reached.wait, 60)
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    hold.forget()
    with pytest.raises(StoreError, match="not done within 0 s"):
        await connect().store(JOB, export, "d", must_hold=lambda: None, limit_s=0.01)
    assert not any("hub_process" in line for line in await asyncio.to_thread(children))


def test_names_that_no_hub_takes_are_refused_before_the_run(connect: Callable[..., Hub]) -> None:
    def named(name: str | None, task: str = "t1") -> str:
        offer = msgspec.structs.replace(OFFER, expected_repo_name=name)
        return connect().repository(msgspec.structs.replace(JOB, offer=offer, task=task))

    assert named("6f1c-expected") == REPO
    assert named(None) == "me/podium-t1"
    assert named(None, task="--t1---x-") == "me/podium-t1-x"
    for name in ("", "a/b", "../x", "a..b", "a--b", "-a", "a.", "x.git", "a b", "a" * 97, "a\n"):
        with pytest.raises(EngineError, match="takes no repository named"):
            named(name)
