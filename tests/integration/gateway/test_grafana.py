"""The Grafana dashboard asks for what a gateway exports, also by a real Prometheus where there is one."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from podium.security.key_files import API, METRICS, METRICS_TOKEN, make_api_token
from shared import subjects
from shared.broker.bus import Bus
from shared.messages.encoding import encode
from shared.messages.hardware import GpuStatus
from shared.messages.jobs import Claimed
from shared.messages.runs import Phase, Progress
from shared.messages.slots import Heartbeat
from shared.net import free_port
from tests.integration.gateway.conftest import CPU, Api

DEPLOY = Path(__file__).parents[3] / "deploy"
PANELS = json.loads((DEPLOY / "grafana" / "podium.json").read_text())["panels"]
TARGETS = [
    (f"{panel['title']}: {target['legendFormat']}", target["expr"], target["legendFormat"])
    for panel in PANELS
    for target in panel.get("targets", ())
]
ALERTS = re.findall(r"(?m)^        expr: (.+)$", (DEPLOY / "prometheus" / "alerts.yml").read_text())
OF_PROMETHEUS = {"instance", "job"}  # labels that it adds to each target
NOTHING_YET = ("> 0", "[1d]")  # rates of what has not happened
MOST_S = 60.0


@pytest.fixture
async def busy(api: Api, bus: Bus, make_offer: Any) -> AsyncIterator[Api]:
    """A gateway with all there is to show: a GPU, a job that trains, decisions."""
    await api.offer(make_offer("one"))
    await api.offer(make_offer("image", task_type="ImageTask"))
    claimed = Claimed(record_id="r", task="one", slot="a", node="node-a", epoch=1, attempt=1)
    await bus.append(subjects.state_stream("a"), subjects.state("a", "one"), encode(claimed))
    gpu = GpuStatus(index=0, name="H100", memory_total=80 << 30, memory_used=40 << 30, utilization=0.9)

    async def live() -> None:
        while True:
            now = time.time()
            beat = Heartbeat(slot="a", node="gpu", epoch=2, hardware=CPU, gpus=[gpu], task="one", at=now)
            await bus.publish(subjects.heartbeat("a"), encode(beat))
            progress = Progress(
                task="one",
                slot="a",
                phase=Phase.TRAIN,
                step=12,
                progress=0.25,
                tokens=900,
                loss=1.5,
                lr=2e-4,
                tokens_per_s=321.0,
                base_loss=2.0,
                dev_loss=1.6,
                at=now,
            )
            await bus.publish(subjects.progress("a", "one"), encode(progress))
            await asyncio.sleep(0.2)

    task = asyncio.create_task(live())
    await api.until("/v1/tasks/one", lambda view: view["progress"] is not None)
    yield api
    task.cancel()


async def exported(api: Api) -> dict[str, set[str]]:
    """The labels of each sample's name."""
    async with api.client.get("/metrics") as response:
        text = await response.text()
    found = defaultdict[str, set[str]](set)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] |= set(sample.labels)
    return found


async def test_panels_and_alerts_ask_for_names_and_labels_that_are_exported(busy: Api) -> None:
    found = await exported(busy)
    for expression, legend in [(expression, legend) for _, expression, legend in TARGETS] + [
        (expression, "") for expression in ALERTS
    ]:
        names = set(re.findall(r"\b(?:podium|process)_\w+", expression))
        assert names <= set(found), expression
        known = OF_PROMETHEUS.union(*(found[name] for name in names))
        named = re.findall(r"(?:by|on) \(([\w, ]+)\)|(\w+)=~?\"|(\w+)!=\"", expression)
        asked = {word for match in named for part in match for word in re.findall(r"\w+", part)}
        assert asked <= known, expression
        kept = re.search(r"by \(([\w, ]+)\)", expression)
        left = set(re.findall(r"\w+", kept[1])) if kept else known
        assert set(re.findall(r"{{(\w+)}}", legend)) <= left, (expression, legend)


needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed: apt-get install prometheus"
)


@pytest.mark.slow
@needs_prometheus
async def test_a_real_prometheus_answers_every_panel(busy: Api, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("not needed on loopback")
    async with prometheus(busy, token, tmp_path) as client:
        missing = [target[:2] for target in TARGETS if not any(rate in target[1] for rate in NOTHING_YET)]
        assert len(missing) > 25
        end = time.monotonic() + MOST_S
        while missing:
            missing = [each for each in missing if not await answer(client, each[1])]
            assert time.monotonic() < end, missing
            await asyncio.sleep(0.5)
        for _, expression, _ in TARGETS:
            await answer(client, expression)
        assert await answer(client, 'ALERTS{alertstate="firing"}') == []


@pytest.mark.slow
@needs_prometheus
async def test_a_real_prometheus_takes_a_rotated_token_by_itself(
    bus: Bus, start_gateway: Any, tmp_path: Path
) -> None:
    make_api_token(tmp_path)
    token, kept = tmp_path / METRICS / METRICS_TOKEN, tmp_path / "kept"
    async with (
        start_gateway(gateway_host="0.0.0.0", api_token_file=str(tmp_path)) as api,  # a token is needed
        prometheus(api, token, tmp_path) as client,
    ):
        await until_up(client, "1")
        make_api_token(tmp_path, rotate=[API])
        token.rename(kept)
        token.write_text("a token that is wrong")  # what is up at the end was scraped with the new one
        await until_up(client, "0")
        kept.replace(token)
        await until_up(client, "1")


@asynccontextmanager
async def prometheus(api: Api, token: Path, folder: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """A Prometheus with the configuration of compose that scrapes a gateway once a second."""
    port, text = free_port(), (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    for ours, theirs in (
        ("gateway:7999", str(api.client._base_url).removeprefix("http://").rstrip("/")),
        ("/etc/prometheus/alerts.yml", str(DEPLOY / "prometheus" / "alerts.yml")),
        ("/run/podium/podium.token", str(token)),
        ("scrape_interval: 5s", "scrape_interval: 1s"),
    ):
        assert ours in text
        text = text.replace(ours, theirs)
    (folder / "prometheus.yml").write_text(text)
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        stdout=sys.stderr,
        stderr=sys.stderr,
    )
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        process.kill()
        await process.wait()


async def until_up(client: aiohttp.ClientSession, value: str) -> None:
    """Wait until the last scrape worked ("1") or failed ("0")."""
    end = time.monotonic() + MOST_S
    while [each["value"][1] for each in await answer(client, "up")] != [value]:
        assert time.monotonic() < end
        await asyncio.sleep(0.2)


async def answer(client: aiohttp.ClientSession, query: str) -> list[Any]:
    """The series of a query, which must be valid; none while Prometheus starts."""
    try:
        async with client.get("/api/v1/query", params={"query": query}) as response:
            body = await response.json(content_type=None)
    except (aiohttp.ClientError, json.JSONDecodeError):
        return []
    if response.status == 503:
        return []
    assert body["status"] == "success", body
    result: list[Any] = body["data"]["result"]
    return result
