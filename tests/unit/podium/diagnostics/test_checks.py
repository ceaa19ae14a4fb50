"""What doctor makes of what it sees: a healthy world is fine, and each break of it is named."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from gateway.state.ledger import ChainRecord, TaskHistory, TaskState
from gateway.views.build import agreed_settings
from gateway.views.schemas import GatewayInfo, MirrorInfo
from podium.diagnostics.checks import examine
from podium.diagnostics.findings import Severity
from podium.diagnostics.monitor import Monitor
from podium.diagnostics.probe import (
    Folder,
    GatewayVitals,
    OpenJob,
    ReceivedHeartbeat,
    StreamVitals,
    Vitals,
)
from shared.broker.stream_requests import StreamInfo
from shared.broker.stream_specs import stream_specs
from shared.messages.hardware import GpuStatus, Hardware
from shared.messages.jobs import Claimed, Job, StateRecord, Submitting
from shared.messages.offers import Decision, Offer, TaskType
from shared.messages.slots import Heartbeat, Lease
from shared.settings import Settings

NOW = 1_000_000.0
SETTINGS = Settings(expected_hardware="cpu")
CPU = Hardware(device="cpu", count=1, memory_bytes=1 << 30)
INFO = GatewayInfo(
    gateway="g",
    version="1",
    now=NOW,
    not_ready=None,
    settings=agreed_settings(SETTINGS),
    folded={},
    malformed_records=0,
    malformed_messages=0,
    lost_decisions=0,
    denied=[],
    mirror=MirrorInfo("1.jsonl", {}, False),
)


def beat(slot: str, *, off_s: float = 0.0, uuids: tuple[str, ...] = (), **fields: Any) -> ReceivedHeartbeat:
    gpus = [GpuStatus(index=0, name="H100", memory_total=1, memory_used=0, uuid=uuid) for uuid in uuids]
    values: dict[str, Any] = {
        "node": f"node-{slot}",
        "epoch": 5,
        "hardware": CPU,
        "version": "1",
        "gpus": gpus,
    }
    return ReceivedHeartbeat(Heartbeat(slot=slot, at=NOW + off_s, **(values | fields)), NOW)


def stream(number: int, **config: Any) -> StreamVitals:
    spec = stream_specs(SETTINGS)[number]
    found = StreamInfo(config=spec.config | config, created="", now="", messages=1, bytes=1, first=1, last=1)
    return StreamVitals(spec=spec, found=found)


HEALTHY = Vitals(
    now=NOW,
    version="1",
    settings=SETTINGS,
    broker_version="<nats server v2.15.1>",
    broker_skew_s=0.01,
    appended=True,
    streams=tuple(stream(number) for number in range(len(stream_specs(SETTINGS)))),
    heartbeats=(beat("a"), beat("b")),
    leases={slot: Lease(slot=slot, node="n", epoch=5, hardware=CPU) for slot in "ab"},
    monitor=Monitor(url="m", health="ok", sync_always=True, store_bytes=1, store_limit=100),
    gateway=GatewayVitals(url="g", info=INFO, skew_s=-0.1),
    folders=(Folder("/data", 1 << 40, 1 << 39),),
)


def open_job(*chain: StateRecord, state: TaskState = TaskState.RUNNING, **fields: Any) -> OpenJob:
    offer = Offer(task_id="t", task_type=TaskType.INSTRUCT, model="m", hours_to_complete=1, dataset="d")
    job = Job(
        record_id="j",
        task_id="t",
        task="t",
        slot="a",
        gateway="g",
        offer=offer,
        decision=Decision(task_id="t", task="t", accepted=True, reason=""),
        received_at=fields.pop("received_at", NOW - 2000),
        deadline_at=fields.pop("deadline_at", NOW + 2000),
    )
    records = [ChainRecord(number, "", record) for number, record in enumerate(chain, 1)]
    chain_of = TaskHistory(records=records, damaged=fields.pop("damaged", None))
    return OpenJob(job=job, state=state, chain=chain_of, **fields)


def claimed(ago_s: float) -> Claimed:
    return Claimed(record_id="c", task="t", slot="a", node="n", epoch=5, attempt=1, at=NOW - ago_s)


def submitting(ago_s: float) -> Submitting:
    return Submitting(record_id="s", task="t", slot="a", node="n", epoch=5, digest="d", at=NOW - ago_s)


def with_job(job: OpenJob, task: str | None = "t") -> dict[str, Any]:
    return {"jobs": (job,), "heartbeats": (beat("a", task=task), beat("b"))}


def test_a_healthy_world_is_fine() -> None:
    findings = examine(HEALTHY)
    assert {finding.severity for finding in findings} == {Severity.OK}
    assert len(findings) == 20


@pytest.mark.parametrize(
    ("change", "check", "severity", "said"),
    [
        ({"broker_error": "no NATS server answers"}, "broker", "error", "no NATS server answers"),
        ({"broker_version": "<nats server v2.9.10>"}, "broker", "warning", "nats-server 2.9"),
        ({"read_error": "no answer within 5 s"}, "store", "error", "doesn't read: no answer"),
        ({"append_error": "no answer within 5 s"}, "store", "error", "doesn't store: no answer"),
        ({"monitor": Monitor(url="m", error="refused")}, "store", "note", "m can't be reached (refused)"),
        (
            {"monitor": Monitor(url="m", error="x"), "appended": False},
            "store",
            "note",
            "may not store a test record",
        ),
        (
            {"monitor": Monitor(url="m", health="write error: no space left", sync_always=True)},
            "store",
            "error",
            "write error",
        ),
        ({"monitor": Monitor(url="m", health="ok", sync_always=False)}, "store", "error", "power cut"),
        (
            {"monitor": Monitor(url="m", health="ok", sync_always=True, store_bytes=81, store_limit=100)},
            "store",
            "warning",
            "81% full",
        ),
        (
            {"leases": {"b": HEALTHY.leases["b"]}},
            "store",
            "warning",
            "slot a sends heartbeats, but holds no lease",
        ),
        (
            {"leases": {"b": HEALTHY.leases["b"]}, "unread_leases": {"a": "JSON is malformed"}},
            "store",
            "error",
            "the lease of slot a can't be read, and no node can take it: JSON is malformed",
        ),
        ({"streams": (stream(0, discard="old"),)}, "streams", "error", "JOBS has discard='old'"),
        ({"streams": (stream(0, deny_delete=False),)}, "streams", "warning", "JOBS has deny_delete=False"),
        ({"streams": (stream(1, max_bytes=2),)}, "streams", "warning", "STATE-a has max_bytes=2"),
        ({"streams": (stream(1, max_bytes=1),)}, "streams", "error", "STATE-a is 100% full"),
        ({"streams": (stream(2, max_bytes=1),)}, "streams", "error", "STATE-b is 100% full"),
        ({"streams": (replace(stream(0), found=None),)}, "streams", "error", "JOBS does not exist"),
        ({"streams": (stream(1, max_bytes=1),)}, "streams", "error", "nothing more is accepted for slot a,"),
        ({"unread": ("STATE-c",)}, "streams", "error", "STATE-c holds the chains of slot c"),
        ({"old_log": True}, "streams", "warning", "the upgrade from one log of states isn't finished"),
        ({"malformed": 3}, "streams", "warning", "3 stored records"),
        ({"denied": ("user a may not",)}, "permissions", "error", "user a may not"),
        ({"gateway": GatewayVitals(url="g", error="nobody")}, "gateway", "error", "nobody"),
        (
            {"gateway": GatewayVitals(url="g", info=replace(INFO, not_ready="not connected"))},
            "gateway",
            "error",
            "not connected",
        ),
        (
            {"gateway": GatewayVitals(url="g", info=replace(INFO, mirror=MirrorInfo("p", {}, True, "full")))},
            "gateway",
            "error",
            "the mirror can't be written: full",
        ),
        (
            {
                "gateway": GatewayVitals(url="g", info=replace(INFO, settings={"max_hours": 12.0})),
                "chosen": frozenset({"max_hours"}),
            },
            "gateway",
            "warning",
            "PODIUM_MAX_HOURS is 12.0 for the gateway and 96.0",
        ),
        (
            {
                "settings": replace(SETTINGS, artifacts_kind="hub", hub_namespace="me"),
                "gateway": GatewayVitals(url="g", info=INFO),
                "chosen": frozenset({"artifacts_kind"}),
            },
            "gateway",
            "warning",
            "PODIUM_ARTIFACTS_KIND is 'disk' for the gateway and 'hub'",
        ),
        ({"heartbeats": (beat("a"),)}, "nodes", "error", "no live node holds slot b"),
        ({"heartbeats": (beat("a"), beat("b", epoch=0))}, "nodes", "error", "no live node holds slot b"),
        ({"heartbeats": (*HEALTHY.heartbeats, beat("c"))}, "nodes", "warning", "a node serves slot c"),
        (
            {
                "heartbeats": (
                    beat("a", hardware=Hardware(device="H100", count=3, memory_bytes=80 << 30)),
                    beat("b"),
                )
            },
            "nodes",
            "warning",
            "slot a has 3xH100-80GB instead of cpu",
        ),
        (
            {"heartbeats": (beat("a", uuids=("x", "y")), beat("b", uuids=("y",)))},
            "gpus",
            "error",
            "slots a and b",
        ),
        (
            {"heartbeats": (beat("a", faults=["kernels: wrong"]), beat("b"))},
            "self-tests",
            "error",
            "slot a failed its self-test and is offered no job: kernels: wrong",
        ),
        (
            {"heartbeats": (beat("a", warnings=["kernels: training is slower"]), beat("b"))},
            "self-tests",
            "warning",
            "slot a: kernels: training is slower",
        ),
        ({"heartbeats": (beat("a", off_s=3.0), beat("b"))}, "clocks", "warning", "node-a is 3.0 s ahead"),
        ({"broker_skew_s": -60.0}, "clocks", "error", "the broker is 60.0 s behind"),
        ({"folders": (Folder("/d", 1 << 40, 1 << 30),)}, "disks", "error", "1.0 GiB of 1024"),
        ({"folders": (Folder("/d", 1 << 40, 10 << 30),)}, "disks", "warning", "10.0 GiB"),
        (
            {"folders": (Folder("/d", 0, 0, "Stale file handle"),)},
            "disks",
            "error",
            "/d can't be read",
        ),
        ({"version": "2"}, "versions", "note", "the gateway runs 1, this command 2"),
        # jobs
        (
            with_job(open_job(state=TaskState.QUEUED), task=None),
            "jobs",
            "error",
            "has not claimed it for 2000 s",
        ),
        (with_job(open_job(claimed(500))), "jobs", "warning", "no progress for 500 s"),
        (
            with_job(open_job(claimed(1900), progress_at=NOW - 1000)),
            "jobs",
            "error",
            "no progress for 1000 s",
        ),
        (
            with_job(open_job(claimed(9), damaged="JSON is malformed")),
            "jobs",
            "error",
            "the newest record of its states can't be read: JSON is malformed",
        ),
        (
            with_job(open_job(claimed(1900), unread="JSON is malformed")),
            "jobs",
            "warning",
            "its newest progress can't be read: JSON is malformed",
        ),
        (with_job(open_job(claimed(9)), task="other"), "jobs", "warning", "its node works on other"),
        (with_job(open_job(claimed(9), deadline_at=NOW - 5)), "jobs", "warning", "deadline passed 5 s ago"),
        (
            with_job(open_job(claimed(9), deadline_at=NOW - 5000)),
            "jobs",
            "error",
            "no gateway has expired it",
        ),
        (
            with_job(open_job(claimed(900), submitting(700), state=TaskState.SUBMITTING)),
            "jobs",
            "warning",
            "submitting for 700 s",
        ),
        (
            {"jobs": (open_job(claimed(9)),), "heartbeats": (beat("b"),)},
            "jobs",
            "error",
            "no node of its slot",
        ),
    ],
)
def test_each_break_is_named_with_what_to_do(
    change: dict[str, Any], check: str, severity: str, said: str
) -> None:
    findings = examine(replace(HEALTHY, **change))
    found = [each for each in findings if each.check == check and said in each.what + each.do]
    assert [each.severity for each in found] == [Severity(severity)], findings
    assert found[0].do or severity == "note" or check == "permissions"


@pytest.mark.parametrize(
    "job",
    [
        open_job(claimed(9)),
        open_job(claimed(1900), progress_at=NOW - 2),
        open_job(state=TaskState.QUEUED, received_at=NOW - 2),
        open_job(claimed(900), submitting(2), state=TaskState.SUBMITTING),
    ],
)
def test_a_job_that_goes_on_is_left_alone(job: OpenJob) -> None:
    findings = examine(replace(HEALTHY, **with_job(job)))
    assert {finding.severity for finding in findings} == {Severity.OK}


def test_without_a_broker_what_it_would_tell_is_not_judged() -> None:
    blind = replace(HEALTHY, broker_error="gone", streams=(), heartbeats=(), leases={}, broker_skew_s=None)
    findings = examine(blind)
    assert [each.check for each in findings if each.severity is Severity.ERROR] == ["broker"]
    assert not {each.check for each in findings} & {"streams", "nodes", "jobs", "store"}


@pytest.mark.parametrize(
    ("variables", "passed", "noted"),
    [({"PATH"}, (), False), ({"HF_TOKEN"}, (), True), ({"HF_TOKEN"}, ("HF_TOKEN",), False)],
)
def test_a_token_that_workers_do_not_get_is_a_note(
    variables: set[str], passed: tuple[str, ...], noted: bool
) -> None:
    settings = replace(SETTINGS, worker_environment=passed)
    vitals = replace(HEALTHY, variables=frozenset(variables), settings=settings)
    (found,) = [each for each in examine(vitals) if each.check == "workers"]
    assert found.severity is (Severity.NOTE if noted else Severity.OK)
    assert ("PODIUM_WORKER_ENVIRONMENT=HF_TOKEN" in found.do) is noted


@pytest.mark.parametrize("old_log", [True, False])  # of which not every user may know
def test_an_upgrade_that_is_not_finished_is_all_that_is_said_of_its_logs(old_log: bool) -> None:
    copy = stream(1, mirror={"name": "STATE"}, subjects=None, allow_direct=False)
    absent = replace(stream(2), found=None)
    vitals = replace(HEALTHY, streams=(copy, absent), unread=("STATE-a", "STATE-b"), old_log=old_log)
    (finding,) = [each for each in examine(vitals) if each.check == "streams"]
    assert finding.what == "the upgrade from one log of states isn't finished"
    assert finding.do.startswith("run `podium bootstrap`")


def test_a_missing_log_of_a_slot_is_named_once() -> None:
    absent = replace(stream(1), found=None)
    vitals = replace(HEALTHY, streams=(absent,), unread=("STATE-a",))
    assert [each.what for each in examine(vitals) if each.check == "streams"] == ["STATE-a does not exist"]
