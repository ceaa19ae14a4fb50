"""Submissions in an object store of a real broker: one per task, complete or not at all, for any client."""

from __future__ import annotations

import asyncio
import base64
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nats.js
import pytest

from podium.local.nats_server import Broker, bootstrap
from podium.security.key_files import make_users
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.credentials import trainer
from shared.errors import BusTimeoutError
from shared.files import folder_digest
from shared.messages.hardware import Hardware
from shared.messages.jobs import Job
from shared.messages.offers import Decision, Offer, TaskType
from shared.settings import Settings
from trainer_node.artifacts.interface import NotTakenError, Stored, StoreError
from trainer_node.artifacts.object_store import CHUNK_BYTES, ObjectStore
from trainer_node.artifacts.publisher import Export, Submissions
from trainer_node.context import NodeContext
from trainer_node.lease import LeaseLostError, SlotLease
from trainer_node.worker.supervisor import Supervisor

SIZE = 3 * CHUNK_BYTES + 17
BUCKET = 4 << 20
CPU = Hardware(device="cpu", count=1, memory_bytes=2**30)
OFFER = Offer(task_id="t", task_type=TaskType.INSTRUCT, model="m", hours_to_complete=1, dataset="d")


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings(artifacts_kind="object", artifacts_bucket_max_bytes=BUCKET)


@pytest.fixture
def store(bus: Bus, settings: Settings) -> ObjectStore:
    return ObjectStore(settings, bus)


def job(task: str = "t1") -> Job:
    return Job(
        record_id="j",
        task_id=task,
        task=task,
        slot="a",
        gateway="g",
        offer=OFFER,
        decision=Decision(task_id=task, task=task, accepted=True, reason=""),
        received_at=0,
        deadline_at=0,
    )


def make_export(folder: Path, text: str = "w", size: int = SIZE) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "deep" / "weights").write_text(text * (size // len(text)))
    return folder


async def put(store: ObjectStore, folder: Path, task: str = "t1", **options: Any) -> Stored:
    known: dict[str, Any] = {"must_hold": lambda: None, "limit_s": 60}
    return await store.store(job(task), folder, folder_digest(folder), **(known | options))


async def objects(bus: Bus) -> dict[str, bytes]:
    """What NATS's own client finds in the bucket."""
    bucket = await nats.js.JetStreamContext(bus.client).object_store("artifacts-a")
    try:
        return {info.name: (await bucket.get(info.name)).data for info in await bucket.list()}
    except nats.js.errors.NotFoundError:  # how it says that there is none
        return {}


async def test_a_submission_is_one_object_that_every_client_can_fetch(
    bus: Bus, store: ObjectStore, tmp_path: Path
) -> None:
    export = make_export(tmp_path / "export")
    assert await store.find(job()) is None
    stored = await put(store, export)
    name = f"t1/{folder_digest(export)}"
    assert stored == Stored(folder_digest(export), f"nats://artifacts-a/{name}") == await store.find(job())
    found = await objects(bus)
    assert list(found) == [name]
    with tarfile.open(fileobj=io.BytesIO(found[name])) as tar:
        # Debian 12 has Python 3.11.2, whose tarfile knows no filters.
        safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(tmp_path / "fetched", **safely)
    assert folder_digest(tmp_path / "fetched") == stored.digest
    assert await store.find(job("t")) is None  # another task whose name begins the same way


async def test_of_many_at_once_the_first_complete_one_wins_and_all_name_it(
    bus: Bus, store: ObjectStore, tmp_path: Path
) -> None:
    exports = [make_export(tmp_path / str(number), str(number)) for number in range(6)]
    others = [put(store, exports[0], f"other{number}") for number in range(3)]
    results = await asyncio.gather(*(put(store, export) for export in exports), *others)
    assert len(set(results[:6])) == 1
    assert sorted(name.partition("/")[0] for name in await objects(bus)) == [
        "other0",
        "other1",
        "other2",
        "t1",
    ]


async def test_an_upload_that_was_cut_short_is_nothing(
    bus: Bus, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, seen = bus.append, 0

    async def killed(*arguments: Any, **options: Any) -> int:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise BusTimeoutError("killed")
        return await append(*arguments, **options)

    monkeypatch.setattr(bus, "append", killed)
    with pytest.raises(BusTimeoutError):
        await put(store, make_export(tmp_path / "first", "1"))
    assert await store.find(job()) is None
    second = make_export(tmp_path / "second", "2")
    assert (await put(store, second)).digest == folder_digest(second)
    assert list(await objects(bus)) == [f"t1/{folder_digest(second)}"]


async def test_an_object_whose_answer_was_lost_is_known_again(
    bus: Bus, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = bus.append

    async def unheard(stream: str, subject: str, *arguments: Any, **options: Any) -> int:
        sequence = await append(stream, subject, *arguments, **options)
        if ".M." in subject:
            raise BusTimeoutError("the answer was lost")
        return sequence

    monkeypatch.setattr(bus, "append", unheard)
    export = make_export(tmp_path / "export")
    assert (await put(store, export)).digest == folder_digest(export)
    assert len(await objects(bus)) == 1


async def test_a_node_that_lost_the_slot_writes_no_object(store: ObjectStore, tmp_path: Path) -> None:
    def must_hold() -> None:
        raise LeaseLostError("lost")

    with pytest.raises(LeaseLostError):
        await put(store, make_export(tmp_path / "export"), must_hold=must_hold)
    assert await store.find(job()) is None


async def test_an_object_that_was_deleted_or_is_none_is_not_in_the_way(
    bus: Bus, store: ObjectStore, tmp_path: Path
) -> None:
    context = nats.js.JetStreamContext(bus.client)
    first = await put(store, make_export(tmp_path / "first", "1"))
    bucket = await context.object_store("artifacts-a")
    await bucket.delete(f"t1/{first.digest}")
    name = base64.urlsafe_b64encode(b"t1/nonsense").decode()
    await bus.append("OBJ_artifacts-a", f"$O.artifacts-a.M.{name}", b"nonsense")
    assert await store.find(job()) is None
    second = make_export(tmp_path / "second", "2")
    assert (await put(store, second)).digest == folder_digest(second)


async def test_a_damaged_object_is_not_named(bus: Bus, store: ObjectStore, tmp_path: Path) -> None:
    await put(store, make_export(tmp_path / "export"))
    await nats.js.JetStreamContext(bus.client).purge_stream("OBJ_artifacts-a", subject="$O.artifacts-a.C.>")
    with pytest.raises(StoreError, match="is damaged"):
        await store.find(job())


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"artifacts_object_max_bytes": 300_000}, "more than artifacts_object_max_bytes (300,000)"),
        ({}, "object store artifacts-a is full"),
    ],
)
async def test_what_the_store_does_not_take_stays_on_disk(
    bus: Bus, make_settings: Callable[..., Settings], tmp_path: Path, limits: dict[str, int], says: str
) -> None:
    settings = make_settings(artifacts_kind="object", **limits)
    export = make_export(tmp_path / "export", size=BUCKET + 1)
    with pytest.raises(NotTakenError):
        await put(ObjectStore(settings, bus), export)
    lease = SlotLease(bus, settings, "one", CPU)
    await lease.turn()
    context = NodeContext(
        settings, bus, lease, Supervisor(settings, 1), "one", CPU, asyncio.Event(), asyncio.Event()
    )
    submissions = Submissions(context)
    stored = await submissions.put(job(), Export(export, folder_digest(export)))
    assert says in stored.remark
    assert folder_digest(Path(stored.artifact)) == stored.digest
    assert await objects(bus) == {}
    assert await submissions.is_there(job())
    assert await submissions.put(job(), None) == stored


async def test_the_trainers_own_account_is_enough(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    make_users(tmp_path / "keys", ("a", "b"))
    broker = Broker(tmp_path / "secured", keys=tmp_path / "keys")
    await broker.start()
    settings = make_settings(
        artifacts_kind="object", nats_url=broker.url, nats_nkey_seed_file=str(tmp_path / "keys")
    )
    await bootstrap(settings)
    bus = await connect(settings, name="test", user=trainer("a"))
    store = ObjectStore(settings, bus)
    assert await store.find(job()) is None
    assert await put(store, make_export(tmp_path / "export")) == await store.find(job())
    assert not bus.denied
    await bus.close()
    await broker.stop(kill=True)
