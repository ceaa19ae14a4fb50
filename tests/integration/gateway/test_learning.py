"""Scores and results at real gateways on a real nats-server: stored once, seen by all, now and later."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.server import running
from podium.__main__ import main
from podium.local.nats_server import Broker
from shared import subjects
from shared.broker.bus import Bus
from shared.errors import SettingsError
from shared.messages.encoding import encode
from shared.messages.jobs import Result, ResultStatus, decode_score

MakeOffer = Callable[..., dict[str, Any]]
SCORES = subjects.SCORES_STREAM


async def post(api: Any, body: Any, **arguments: Any) -> tuple[int, dict[str, Any]]:
    arguments = arguments or {"json": body}
    async with api.client.post("/v1/scores", **arguments) as response:
        return response.status, await response.json(content_type=None)


async def rate(api: Any, table: str, key: str) -> dict[str, Any]:
    status, body = await api.get("/v1/tables")
    assert status == 200
    rate: dict[str, Any] = body["tables"][table]["rates"][key]
    return rate


async def end(bus: Bus, slot: str, task: str, status: ResultStatus) -> None:
    result = Result(record_id="r", task=task, task_id=task, slot=slot, status=status, at=time.time())
    await bus.append(subjects.state_stream(slot), subjects.state(slot, task), encode(result))


def score(task: str, quality: float, **fields: Any) -> dict[str, Any]:
    return {"task_id": task, "quality_score": quality, "test_loss": 1.5, "synth_loss": 1.6} | fields


async def test_results_and_scores_change_the_terms_of_the_next_decision(
    api: Any, bus: Bus, make_offer: MakeOffer
) -> None:
    await api.offer(make_offer("one"))
    await end(bus, "a", "one", ResultStatus.SUBMITTED)
    assert await post(api, score("one", 3)) == (200, {"stored": ["one"], "known": [], "refused": []})
    _, decision = await api.offer(make_offer("two"))
    terms = decision["terms"]
    assert terms["task_weight"]["value"] == pytest.approx(3.5 / 11, abs=1e-5)
    assert terms["model_performance"]["value"] == pytest.approx(8.5 / 11, abs=1e-5)
    assert terms["task_success"]["value"] == pytest.approx(10 / 11, abs=1e-5)
    assert terms["model_performance"]["cause"] == (
        "1.0 of 1.0 among the first four (evidence halves every 30 days), prior 7.5 of 10"
    )
    status, tables = await api.get("/v1/tables/")
    assert status == 200
    assert {name: tables[name] for name in tables if name != "tables"} == {
        "policy": "maximum_accuracy",
        "prior_strength": 10.0,
        "half_life_days": 30.0,
        "results": 1,
        "unused_results": 0,
        "scores": 1,
    }
    assert set(tables["tables"]["model_performance"]["rates"]) == {"smollm"}


async def test_the_same_score_again_changes_nothing_and_another_one_replaces_it(
    api: Any, bus: Bus, make_offer: MakeOffer
) -> None:
    await api.offer(make_offer("one"))
    await post(api, score("one", 0))
    (before,) = await bus.read(SCORES, 0)
    assert before.subject == "podium.scores.one"
    assert (await post(api, [score("one", 0), score("one", 0)]))[1]["known"] == ["one", "one"]
    assert await bus.read(SCORES, 0) == [before]
    assert (await post(api, score("one", -1, synth_loss=None)))[1]["stored"] == ["one"]
    (after,) = await bus.read(SCORES, 0)
    assert decode_score(after.data).quality_score == -1
    assert (await rate(api, "task_weight", "InstructTextTask"))["trials"] == pytest.approx(1, abs=1e-5)


async def test_of_many_that_send_the_same_score_at_once_one_stores_it(
    api: Any, bus: Bus, make_offer: MakeOffer
) -> None:
    await api.offer(make_offer("one"))
    answers = await asyncio.gather(*(post(api, score("one", 3)) for _ in range(8)))
    assert sorted(len(body["stored"]) for _, body in answers) == [0] * 7 + [1]
    assert len(await bus.read(SCORES, 0)) == 1


async def test_every_gateway_and_every_later_one_sees_a_score(
    bus: Bus, start_gateway: Any, heartbeats: Callable[..., None], make_offer: MakeOffer
) -> None:
    heartbeats("a", "b")
    other = {"task_type": "DpoTask", "model": "org/Qwen-7B"}
    async with start_gateway("first") as first, start_gateway("second") as second:
        await first.until_ready()
        await second.until_ready()
        await post(first, score("elsewhere", 3, **other))
        await second.until("/v1/tables", lambda body: body["scores"] == 1)
        learned = await rate(second, "model_performance", "qwen")
    async with start_gateway("third") as third:
        await third.until_ready()
        again = await rate(third, "model_performance", "qwen")
        assert again["value"] == pytest.approx(learned["value"], abs=1e-5)
        assert (await rate(third, "task_weight", "DpoTask"))["value"] == pytest.approx(3.5 / 11, abs=1e-5)


async def test_what_can_not_be_counted_is_refused_and_says_why(
    api: Any, bus: Bus, make_offer: MakeOffer
) -> None:
    status, problem = await post(api, score("never", 3))
    assert (status, problem["type"]) == (404, "urn:podium:problem:unknown-task")
    assert "must give task_type and model" in problem["detail"]
    status, problem = await post(api, [{"task_id": "x"}])
    assert (status, problem["type"]) == (400, "urn:podium:problem:malformed-score")
    assert (await post(api, None, data=b"{}"))[0] == 415
    assert await bus.read(SCORES, 0) == []
    await api.offer(make_offer("one"))
    status, taken = await post(api, [score("never", 3), score("one", 3)])
    assert (status, taken["stored"]) == (200, ["one"])
    assert [each["task_id"] for each in taken["refused"]] == ["never"]
    status, taken = await post(api, [score("never", 3)])
    assert (status, len(taken["refused"])) == (200, 1)


async def test_losses_that_are_no_numbers_are_stored_as_not_measured(
    api: Any, bus: Bus, make_offer: MakeOffer
) -> None:
    await api.offer(make_offer("one"))
    body = b'{"task_id": "one", "quality_score": -1, "test_loss": NaN, "synth_loss": Infinity}'
    status, _ = await post(api, None, data=body, headers={"Content-Type": "application/json"})
    assert status == 200
    (record,) = await bus.read(SCORES, 0)
    assert (decode_score(record.data).test_loss, decode_score(record.data).synth_loss) == (None, None)


async def test_a_stream_that_was_begun_anew_is_read_anew_and_ends_nobody(
    api: Any, bus: Bus, make_offer: MakeOffer, broker: Broker
) -> None:
    """Nor is it a reason to end what the stream drops by itself: only the logs must lose nothing."""
    await api.offer(make_offer("one"))
    await post(api, score("one", 3))
    await post(api, score("gone", -1, task_type="ChatTask", model="org/llama"))
    await bus.append(SCORES, subjects.score("odd"), b"not a score")
    config = json.loads((await bus.request(f"$JS.API.STREAM.INFO.{SCORES}")).data)["config"]
    await bus.request(f"$JS.API.STREAM.DELETE.{SCORES}")
    assert (await api.offer(make_offer("two")))[1]["accepted"] is True
    await bus.request(f"$JS.API.STREAM.CREATE.{SCORES}", json.dumps(config).encode())
    await broker.stop(kill=True)
    await broker.start()
    await api.until("/v1/tables", lambda body: body["scores"] == 0, timeout_s=30)
    await api.until_ready()
    assert (await post(api, score("one", 0)))[1]["stored"] == ["one"]
    assert (await rate(api, "task_weight", "InstructTextTask"))["trials"] == pytest.approx(1, abs=1e-5)
    assert (await rate(api, "task_weight", "ChatTask"))["trials"] == 0


@pytest.mark.parametrize(
    ("policy", "accepted", "reason"),
    [
        ("expected_value", False, "Too little to win: 1.84 points expected"),
        ("first_come", True, "Accepted: fits cpu"),
    ],
)
async def test_the_setting_names_the_policy(
    bus: Bus,
    start_gateway: Any,
    heartbeats: Callable[..., None],
    make_offer: MakeOffer,
    policy: str,
    accepted: bool,
    reason: str,
) -> None:
    heartbeats("a", "b")
    async with start_gateway(policy=policy, min_points_per_hour=1.0) as api:
        await api.until_ready()
        await api.until_live("a", "b")
        _, decision = await api.offer(make_offer("one", hours_to_complete=0.5))
        _, decision = await api.offer(make_offer("two", hours_to_complete=2))
    assert (decision["accepted"], decision["policy"]) == (accepted, policy)
    assert decision["reason"].startswith(reason)


async def test_a_wrong_policy_is_a_settings_error_at_start(gateway_settings: Any) -> None:
    settings = gateway_settings(policy="greedy")
    with pytest.raises(SettingsError, match="unknown policy 'greedy'"):
        async with running(settings, None):  # type: ignore[arg-type]
            pass


async def test_a_local_copy_tells_the_family(
    bus: Bus,
    start_gateway: Any,
    heartbeats: Callable[..., None],
    make_offer: MakeOffer,
    tmp_path: Path,
) -> None:
    heartbeats("a", "b")
    copy = tmp_path / "models" / "someone--dolphin"
    copy.mkdir(parents=True)
    (copy / "config.json").write_text('{"model_type": "qwen2"}')
    async with start_gateway(models_dir=str(tmp_path / "models")) as api:
        await api.until_ready()
        await api.until_live("a", "b")
        _, decision = await api.offer(make_offer("one", model="someone/dolphin"))
    assert decision["terms"]["model_performance"]["cause"] == "house value for qwen"


async def test_the_command_imports_what_upstream_tells_and_shows_what_was_learned(
    api: Any, make_offer: MakeOffer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await api.offer(make_offer("one"))
    url = str(api.client._base_url)
    file = tmp_path / "breakdowns.jsonl"
    results = [
        {"hotkey": "5Other", "quality_score": 3.0, "test_loss": 1.0, "synth_loss": 1.0, "score_reason": None},
        {"hotkey": "5Me", "quality_score": 0.0, "test_loss": 1.2, "synth_loss": float("nan")},
    ]
    lines = [{"id": task, "miner_results": results} for task in ("one", "never")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(["scores", *arguments, "--url", url])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    def use() -> None:
        imported = ("import", str(file), "--hotkey", "5Me")
        code, out, error = command(*imported)
        assert (code, out.splitlines()[-1]) == (1, "1 stored, 0 already known, 1 refused, 0 left out")
        assert "'never' was never accepted" in error
        code, out, _ = command(*imported, "--json")
        assert (code, json.loads(out)["known"], len(json.loads(out)["refused"])) == (1, 1, 1)
        file.write_text(json.dumps(lines[0]))
        assert command(*imported)[0] == 0
        code, out, _ = command("show")
        assert code == 0
        for said in (
            "task_weight (first places)",
            "0.0 of 1.0 first places",
            "smollm",
            "house value for",
        ):
            assert said in out
        code, out, _ = command("show", "--json")
        assert (code, json.loads(out)["scores"]) == (0, 1)

    await asyncio.to_thread(use)
