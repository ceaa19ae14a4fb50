"""A gateway looks at a model's config on the hub before it accepts, within the time of an answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from bench.harness.fake_hub import FakeHub
from gateway.policy.hub_models import AT_ONCE, HubModels, facts_of_answer
from shared.broker.bus import Bus
from shared.messages.hardware import Hardware
from shared.planning.architectures import LARGEST_CONFIG
from shared.settings_sources import load_settings

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 1000,
}
QUANTISED = LLAMA | {"quantization_config": {"quant_method": "mxfp4"}}


def publish(hub: FakeHub, repo: str, config: dict[str, Any] | None) -> str:
    """A public repository with this config, or with an adapter alone."""
    hub.repos[repo] = []
    hub.public.add(repo)
    path = "adapter_config.json" if config is None else "config.json"
    hub.commit(repo, "weights", {path: json.dumps(config or {}).encode()})
    return repo


def models_of(hub: FakeHub, **fields: Any) -> HubModels:
    return HubModels(load_settings({}, hub_url=hub.url, **fields))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (QUANTISED, "its weights are quantised (mxfp4)"),
        ({"model_type": "mistral3"}, "not known to train models of type 'mistral3'"),
        (None, "its repository has no config.json"),
    ],
)
async def test_an_offer_of_a_model_that_can_not_be_trained_is_refused_by_its_config(
    bus: Bus,
    start_gateway: Any,
    heartbeats: Callable[..., None],
    make_offer: Callable[..., dict[str, Any]],
    hub: FakeHub,
    config: dict[str, Any] | None,
    reason: str,
) -> None:
    heartbeats("a", "b")
    publish(hub, "me/right", LLAMA)
    model = publish(hub, "me/harmless-7b", config)
    async with start_gateway(hub_url=hub.url, hub_look_s=1.0) as api:
        await api.until_ready()
        await api.until_live("a", "b")
        _, decision = await api.offer(make_offer("one", model=model))
        assert not decision["accepted"]
        assert decision["kind"] == "plan"
        assert reason in decision["reason"]
        _, decision = await api.offer(make_offer("two", model=model))  # known now: not asked again
        assert not decision["accepted"]
        assert hub.seen == ["resolve"]
        _, decision = await api.offer(make_offer("three", model="me/right"))
        assert decision["accepted"]


async def test_a_hub_that_is_silent_delays_one_offer_and_names_decide(
    bus: Bus,
    start_gateway: Any,
    heartbeats: Callable[..., None],
    make_offer: Callable[..., dict[str, Any]],
    hub: FakeHub,
) -> None:
    heartbeats("a", "b")
    model = publish(hub, "me/harmless-7b", QUANTISED)
    hub.fault("resolve", "hang")
    async with start_gateway(hub_url=hub.url, hub_look_s=0.3) as api:
        await api.until_ready()
        await api.until_live("a", "b")
        started = time.monotonic()
        _, decision = await api.offer(make_offer("one", model=model))
        assert decision["accepted"]
        assert 0.3 <= time.monotonic() - started < 2.0
        _, decision = await api.offer(make_offer("two", model="me/another-7b"))
        assert decision["accepted"]
        assert hub.seen == ["resolve"]


@pytest.mark.parametrize(
    ("setting", "measured", "accepted"),
    [
        (100e6, {}, True),
        (3e6, {}, False),  # 14 GB take 4,667 of 3,600 s
        (100e6, {"a": 3e6}, False),  # slot a gets the job
        (3e6, {"a": 200e6}, True),
        (100e6, {"a": 200e6, "b": 3e6}, True),
        (3e6, {"b": 200e6}, True),  # better than the setting: both are on one machine
        (100e6, {"b": 3e6}, False),
    ],
)
async def test_a_models_download_takes_as_long_as_nodes_measured(
    bus: Bus,
    start_gateway: Any,
    heartbeats: Callable[..., None],
    make_offer: Callable[..., dict[str, Any]],
    setting: float,
    measured: dict[str, float],
    accepted: bool,
) -> None:
    for slot in ("a", "b"):
        rate = {"download_bytes_per_s": measured[slot]} if slot in measured else {}
        heartbeats(slot, **rate)
    async with start_gateway(hub_look_s=0.0, hub_download_bytes_per_s=setting) as api:
        await api.until_ready()
        await api.until_live("a", "b")
        asked = {"model": "me/harmless-7b", "model_params_count": 7_000_000_000, "hours_to_complete": 1}
        _, decision = await api.offer(make_offer("one", **asked))
        assert decision["accepted"] is accepted
        assert accepted or "the model's download takes 4667 s" in decision["reason"]


@pytest.mark.parametrize(("a", "b", "accepted"), [(3e6, 200e6, True), (200e6, 3e6, False)])
async def test_the_slot_that_gets_the_job_says_how_fast_models_come(
    bus: Bus,
    start_gateway: Any,
    heartbeats: Callable[..., None],
    make_offer: Callable[..., dict[str, Any]],
    a: float,
    b: float,
    accepted: bool,
) -> None:
    """Slot a is free and live, but of other hardware than expected: it gets none."""
    other = Hardware(device="H100", count=1, memory_bytes=80 << 30)
    heartbeats("a", hardware=other, download_bytes_per_s=a)
    heartbeats("b", download_bytes_per_s=b)
    async with start_gateway(hub_look_s=0.0) as api:
        await api.until_ready()
        await api.until_live("a", "b")
        asked = {"model": "me/harmless-7b", "model_params_count": 7_000_000_000, "hours_to_complete": 1}
        _, decision = await api.offer(make_offer("one", **asked))
        assert (decision["accepted"], decision["slot"]) == (accepted, "b" if accepted else None)
        assert accepted or "the model's download takes 4667 s" in decision["reason"]


async def test_a_hub_that_was_silent_is_asked_again_later(hub: FakeHub) -> None:
    now = 0.0
    models = HubModels(load_settings({}, hub_url=hub.url), clock=lambda: now)
    model = publish(hub, "me/one", QUANTISED)
    hub.fault("resolve", 503)
    await models.look(model)
    await models.look(model)
    assert (models.facts(model), hub.seen) == (None, ["resolve"])
    now = 301.0
    await models.look(model)
    found = models.facts(model)
    assert found is not None
    assert "mxfp4" in found.refusal


@pytest.mark.parametrize("status", [407, 408, 429, 500])
async def test_a_hub_that_refuses_for_now_is_asked_again_later(hub: FakeHub, status: int) -> None:
    now = 0.0
    models = HubModels(load_settings({}, hub_url=hub.url), clock=lambda: now)
    one, two = publish(hub, "me/one", QUANTISED), publish(hub, "me/two", QUANTISED)
    hub.fault("resolve", status)
    await models.look(one)
    await models.look(two)  # a hub that limits our requests gets no more of them
    assert hub.seen == ["resolve"]
    now = 301.0
    await models.look(one)
    assert (found := models.facts(one)) is not None
    assert "mxfp4" in found.refusal


async def test_a_repository_that_is_still_filled_is_looked_at_again(hub: FakeHub) -> None:
    now = 0.0
    models = HubModels(load_settings({}, hub_url=hub.url), clock=lambda: now)
    model = publish(hub, "me/new", None)
    await models.look(model)
    assert (found := models.facts(model)) is not None
    assert "no config.json" in found.refusal
    hub.commit(model, "weights", {"config.json": json.dumps(LLAMA).encode()})
    now = 299.0
    await models.look(model)
    assert models.facts(model) == found
    now = 301.0
    await models.look(model)
    assert (found := models.facts(model)) is not None
    assert not found.refusal
    now = 9999.0
    await models.look(model)
    assert hub.seen == ["resolve", "resolve"]  # a config is kept


async def test_a_model_that_was_not_there_is_looked_at_again(hub: FakeHub) -> None:
    now = 0.0
    models = HubModels(load_settings({}, hub_url=hub.url), clock=lambda: now)
    await models.look("me/late")
    model = publish(hub, "me/late", QUANTISED)
    now = 301.0
    await models.look(model)
    assert models.facts(model) is not None


async def test_a_look_that_waits_for_others_takes_no_longer(hub: FakeHub) -> None:
    """Four at once, answered after .45 s; the fifth had .6 s of its own from there on."""
    models = models_of(hub, hub_look_s=0.6)
    names = [publish(hub, f"me/m{number}", LLAMA) for number in range(AT_ONCE + 1)]
    holds = [hub.hold("resolve") for _ in range(AT_ONCE)]
    hub.fault("resolve", "hang")
    first = [asyncio.create_task(models.look(name)) for name in names[:-1]]
    await asyncio.sleep(0)
    started = time.monotonic()
    last = asyncio.create_task(models.look(names[-1]))
    await asyncio.sleep(0.45)
    for hold in holds:
        hold.released.set()
    await last
    assert time.monotonic() - started < 0.9
    await asyncio.gather(*first)
    assert all(models.facts(name) is not None for name in names[:-1])
    assert models.facts(names[-1]) is None
    await models.look(names[-1])  # it had little time for its request: that is no sign of a silent hub
    assert models.facts(names[-1]) is not None


@pytest.mark.parametrize("model", ["gpt2", "/models/x", "../../etc/passwd", "a/../b", "a/b/c", "a/b?c=d", ""])
async def test_only_names_of_repositories_are_asked_for(hub: FakeHub, model: str) -> None:
    await models_of(hub).look(model)
    assert hub.seen == []


async def test_no_hub_is_asked_where_the_setting_says_so(hub: FakeHub) -> None:
    models = models_of(hub, hub_look_s=0.0)
    await models.look(publish(hub, "me/one", QUANTISED))
    assert hub.seen == []


async def test_a_model_that_the_hub_does_not_show_is_judged_by_its_name(hub: FakeHub) -> None:
    models = models_of(hub)
    hub.repos["me/private"] = []
    await models.look("me/private")
    await models.look("me/absent")
    await models.look("me/private")
    assert hub.seen == ["resolve", "resolve"]  # refused once each, and remembered
    assert models.facts("me/private") is None
    assert models.facts("me/absent") is None


@pytest.mark.parametrize("content", [b"<html>", b"[]", b"[" * 100_000, b"\xff", b"{" + b" " * LARGEST_CONFIG])
def test_what_is_no_config_says_nothing(content: bytes) -> None:
    assert facts_of_answer(200, {}, content) is None


def test_a_page_that_is_not_there_says_nothing_unless_the_repository_is() -> None:
    assert facts_of_answer(404, {}, b"") is None
    assert facts_of_answer(404, {"X-Error-Code": "RepoNotFound"}, b"") is None
    assert facts_of_answer(401, {"X-Error-Code": "GatedRepo"}, b"") is None
