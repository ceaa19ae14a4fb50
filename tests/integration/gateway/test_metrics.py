"""`/metrics` of a live gateway, as Prometheus' own parser reads it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.api.metrics import CONTENT_TYPE
from gateway.telemetry.counters import DECISIONS
from shared import subjects
from shared.broker.bus import Bus
from shared.messages.encoding import encode
from shared.messages.hardware import GpuStatus, Hardware
from shared.messages.jobs import Claimed
from shared.messages.runs import Phase, Progress
from shared.messages.slots import Heartbeat
from tests.integration.gateway.test_gateway_api import result_of

MakeOffer = Callable[..., dict[str, Any]]
Samples = dict[str, dict[tuple[str, ...], float]]


async def scrape(api: Any) -> Samples:
    """Samples by name and label values, which stand in the order of the labels' names."""
    async with api.client.get("/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == CONTENT_TYPE
        text = await response.text()
    found: Samples = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = tuple(sample.labels.values())
            assert labels not in found[sample.name], sample
            found[sample.name][labels] = sample.value
    return found


async def until(api: Any, holds: Callable[[Samples], bool]) -> Samples:
    async with asyncio.timeout(20):
        while not holds(found := await scrape(api)):
            await asyncio.sleep(0.05)
    return found


async def test_offers_are_counted_by_what_decided(api: Any, bus: Bus, make_offer: MakeOffer) -> None:
    before = await scrape(api)
    assert set(before["podium_decisions_total"].values()) == {0.0}
    assert "podium_decision_term" not in before
    await api.offer(make_offer("one"))
    await api.offer(make_offer("one"))
    await api.offer(make_offer("long", hours_to_complete=97))
    await api.offer(make_offer("image", task_type="ImageTask"))
    await api.offer({"task_id": "x"})
    await bus.request(subjects.OFFERS, b"[]")
    found = await scrape(api)
    counted = {labels: value for labels, value in found["podium_decisions_total"].items() if value}
    assert counted == {
        ("accepted", "accepted"): 1,
        ("accepted", "again"): 1,
        ("rejected", "too_long"): 1,
        ("rejected", "plan"): 1,
    }
    assert len(found["podium_decisions_total"]) == len(DECISIONS)
    assert found["podium_decision_term"]["maximum_accuracy_bonus",] == 0.0
    assert found["podium_decision_priority"][()] == pytest.approx(0.635)
    assert found["podium_malformed_offers_total"] == {("http",): 1, ("nats",): 1}
    requests = found["podium_http_request_seconds_count"]
    assert requests["/v1/offers", "200"] == 4
    assert requests["/v1/offers", "400"] == 1
    assert found["podium_http_request_seconds_bucket"]["+Inf", "/v1/offers", "200"] == 4
    assert 0 < found["podium_http_request_seconds_sum"]["/v1/offers", "200"] < 60


async def test_a_run_is_shown_by_its_slot(api: Any, bus: Bus, make_offer: MakeOffer) -> None:
    await api.offer(make_offer("one"))
    found = await scrape(api)
    assert found["podium_slot_state"]["a", "busy"] == 1
    assert found["podium_slot_state"]["b", "free"] == 1
    assert found["podium_job_state"]["a", "queued"] == 1
    assert found["podium_job_deadline_seconds"]["a",] == pytest.approx(2 * 3600 - 150, abs=60)
    claimed = Claimed(record_id="r", task="one", slot="a", node="n", epoch=1, attempt=2)
    last = await bus.append(subjects.state_stream("a"), subjects.state("a", "one"), encode(claimed))
    progress = Progress(
        task="one", slot="a", phase=Phase.TRAIN, step=12, progress=0.25, tokens=900, loss=1.5, lr=2e-4,
        tokens_per_s=321.0,
    )  # fmt: skip
    await bus.publish(subjects.progress("a", "one"), encode(progress))
    await until(api, lambda seen: seen["podium_job_attempts"]["a",] == 2)
    found = await until(api, lambda seen: bool(seen["podium_job_phase"]))
    assert found["podium_job_phase"]["train", "a"] == 1
    assert sum(found["podium_job_phase"].values()) == 1
    said = {
        "podium_job_step": 12, "podium_job_progress_ratio": 0.25, "podium_job_tokens": 900,
        "podium_job_loss": 1.5, "podium_job_learning_rate": 2e-4, "podium_job_tokens_per_second": 321,
        "podium_job_attempts": 2,
    }  # fmt: skip
    assert {name: found[name]["a",] for name in said} == said
    assert "podium_job_dev_loss" not in found
    await result_of(bus, "a", "one", last)
    found = await until(api, lambda seen: seen["podium_results_total"]["submitted",] == 1)
    assert found["podium_results_total"] == {
        ("submitted",): 1, ("failed",): 0, ("expired",): 0, ("cancelled",): 0,
    }  # fmt: skip
    assert not found["podium_job_step"]
    assert found["podium_slot_state"]["a", "free"] == 1


async def test_gateways_agree_on_results_also_after_a_start(
    api: Any, bus: Bus, start_gateway: Any, make_offer: MakeOffer
) -> None:
    await api.offer(make_offer("one"))
    await result_of(bus, "a", "one")
    await until(api, lambda seen: seen["podium_results_total"]["submitted",] == 1)
    async with start_gateway("second") as second:
        await second.until_ready()
        found = await scrape(second)
        assert found["podium_results_total"]["submitted",] == 1
        assert found["podium_events_total"].get(("task",), 0) == 0  # what the logs held is no news
        assert found["podium_log_folded_sequence"] == {("JOBS",): 1, ("STATE-a",): 1, ("STATE-b",): 0}
        assert found["podium_log_full"] == {("JOBS",): 0, ("STATE-a",): 0, ("STATE-b",): 0}
        await until(second, lambda seen: not any(seen["podium_mirror_behind_records"].values()))
        assert found["podium_nats_connected"][()] == 1
        assert found["podium_ready"][()] == 1
        assert 0 <= found["podium_log_age_seconds"][()] < 60


async def test_starts_in_time_late_and_refused(
    bus: Bus, start_gateway: Any, heartbeats: Callable[..., None], make_offer: MakeOffer
) -> None:
    heartbeats("a", "b")
    headers = {"validator-hotkey": "x"}
    async with start_gateway(upstream_auth="off", reservation_s=1.0) as api:
        await api.until_live("a", "b")

        async def post(path: str, message: Any) -> int:
            async with api.client.post(path, json=message, headers=headers) as response:
                return int(response.status)

        def start(task: str) -> dict[str, Any]:
            return make_offer(task, expected_repo_name="r", file_format="s3", dataset="https://a.example/x")

        bare = make_offer("one")
        for field in ("dataset", "file_format", "dataset_type"):
            del bare[field]
        for task in ("one", "two"):
            assert await post("/task_offer/", bare | {"task_id": task}) == 200
        assert await post("/start_training/", start("one")) == 200
        assert await post("/start_training/", start("one")) == 200
        await asyncio.sleep(1.1)
        assert await post("/start_training/", start("two")) == 200
        assert await post("/start_training/", start("three")) == 404
        found = await scrape(api)
    assert found["podium_starts_total"] == {
        ("in_time",): 1,
        ("late",): 1,
        ("refused",): 1,
        ("mismatch",): 0,
    }


async def test_gpus_are_shown_and_what_is_asked_for_makes_no_series(
    bus: Bus, start_gateway: Any, make_offer: MakeOffer
) -> None:
    gpu = GpuStatus(index=3, name="H100", memory_total=80, memory_used=7, utilization=0.5)
    hardware = Hardware(device="H100", count=4, memory_bytes=80 << 30)
    beat = Heartbeat(slot="a", node="n", epoch=1, hardware=hardware, gpus=[gpu], at=time.time())
    async with start_gateway() as api:
        await api.until_ready()
        await bus.publish(subjects.heartbeat("a"), encode(beat))
        found = await until(api, lambda seen: bool(seen["podium_gpu_memory_used_bytes"]))
        assert found["podium_gpu_memory_used_bytes"] == {("3", "a"): 7}
        assert found["podium_gpu_utilization_ratio"] == {("3", "a"): 0.5}
        series = sum(map(len, (await scrape(api)).values()))
        for number in range(20):
            await api.get(f"/v1/tasks/t{number}")
            await api.get(f"/nothing/{number}")
            async with api.client.request(("PUT", "DELETE", "PATCH")[number % 3], "/v1/slots") as response:
                assert response.status == 405
            await api.offer(make_offer(f"t{number}", hours_to_complete=97 + number))
        after = await scrape(api)
        routes = {labels for labels in after["podium_http_request_seconds_count"] if labels[1] != "200"}
        assert routes - {("/readyz", "503")} == {
            ("/v1/tasks/{task_id}", "404"),
            ("none", "404"),
            ("none", "405"),
        }
        assert sum(map(len, after.values())) - series < 120  # three routes' buckets, the newest decision
        assert "t7" not in json.dumps([list(labels) for name in after.values() for labels in name])
