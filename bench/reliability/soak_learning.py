"""Check the rates that a fleet learns from a soak: post scores, kill the gateways, compare the rates.

Each submission's rank is drawn by its task's type, so that some rates must rise above their house values
and others fall below; a task without a submission gets upstream's penalty. The expected counts are computed
here independently, from the logs and the scores. A trial that is minutes old has weight .9998, so the
rates are compared with plain counts and means of Beta posteriors to within `NEAR`.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import aiohttp
from msgspec import Struct

from bench.harness.checker import Logs, read_logs
from bench.harness.fleet import GATEWAYS, Fleet
from bench.harness.signed_fleet import ready, until
from gateway.policy.model_family import model_family
from shared.broker.bus import Bus
from shared.messages.jobs import Job, Result, ResultStatus

HOUSE = {"task_weight": 0.25, "model_performance": 0.75, "task_success": 0.90}
STRENGTH = 10.0  # trials that a house value counts as
FIRST = {"InstructTextTask": 0.8}  # how often upstream ranks a submission of a type first; of others:
OTHERS_FIRST = 0.1
AMONG_FOUR = 0.5  # of those that aren't first
NOT_AMONG_FOUR = 1000.0
NEAR = 1e-3

Key = tuple[str, str]  # a table and what the rate is of


class Learned(Struct):
    """The learned rates compared with the expected ones."""

    results: int
    scores: int
    rates: int  # with evidence, at each gateway
    above_house: int
    below_house: int
    findings: list[str]


async def learn(fleet: Fleet, bus: Bus, chance: random.Random) -> Learned:
    """Post the scores, kill the gateways, and judge what their successors have learned."""
    logs = await read_logs(bus)
    scores = draw_scores(logs, chance)
    trials, successes = count(logs, scores)
    findings: list[str] = []
    async with aiohttp.ClientSession() as session:
        taken = await _post(session, fleet.url(GATEWAYS[0]), list(scores.values()))
        if len(taken.get("stored", [])) != len(scores):
            findings.append(f"of {len(scores)} scores these were taken: {taken}")
        for gateway in GATEWAYS:
            member = fleet.members[gateway]
            member.expected = True
            member.signal(signal.SIGKILL)
        for gateway in GATEWAYS:
            await until(f"{gateway} to be ready", partial(ready, session, fleet.url(gateway)))
            look = partial(_tables, session, fleet.url(gateway), len(logs.jobs), len(scores))
            view = await until(f"{gateway} to have read all results and scores", look)
            findings += [f"{gateway}: {wrong}" for wrong in compare(view, trials, successes)]
    means = {key: successes[key] / trials[key] - HOUSE[key[0]] for key in trials}
    return Learned(
        results=len(logs.jobs),
        scores=len(scores),
        rates=len(trials),
        above_house=sum(mean > 0 for mean in means.values()),
        below_house=sum(mean < 0 for mean in means.values()),
        findings=findings,
    )


def draw_scores(logs: Logs, chance: random.Random) -> dict[str, dict[str, Any]]:
    """Upstream's score of every job, by the job's token."""
    scores = {}
    for job in logs.jobs:
        quality, synthetic = 0.0, NOT_AMONG_FOUR
        if _status(logs, job) is not ResultStatus.SUBMITTED:
            quality = -1.0
        elif chance.random() < FIRST.get(job.offer.task_type, OTHERS_FIRST):
            quality, synthetic = 3.0, 1.2
        elif chance.random() < AMONG_FOUR:
            synthetic = 1.4
        scores[job.task] = {"task_id": job.task_id, "quality_score": quality, "synth_loss": synthetic}
    return scores


def count(logs: Logs, scores: dict[str, dict[str, Any]]) -> tuple[Counter[Key], Counter[Key]]:
    """Trials and successes of each rate."""
    trials: Counter[Key] = Counter()
    successes: Counter[Key] = Counter()
    for job in logs.jobs:
        score = scores[job.task]
        kind, family = str(job.offer.task_type), model_family(job.offer.model)
        found = {
            ("task_weight", kind): score["quality_score"] == 3.0,
            ("model_performance", family): score["synth_loss"] != NOT_AMONG_FOUR,
            ("task_success", kind): _status(logs, job) is ResultStatus.SUBMITTED,
        }
        trials.update(found.keys())
        successes.update(key for key, success in found.items() if success)
    return trials, successes


def compare(view: dict[str, Any], trials: Counter[Key], successes: Counter[Key]) -> Iterator[str]:
    """Yield a finding for each rate of `/v1/tables` that differs from the expected one."""
    for name, house in HOUSE.items():
        rates = view["tables"][name]["rates"]
        for key in sorted({key for table, key in trials if table == name} | set(rates)):
            tried, succeeded = trials[name, key], successes[name, key]
            expected = (STRENGTH * house + succeeded) / (STRENGTH + tried)
            rate = rates.get(key, {"value": -1.0, "successes": -1.0, "trials": -1.0})
            shown = (rate["value"], rate["successes"], rate["trials"])
            must = (expected, succeeded, tried)
            if any(abs(a - b) > NEAR * max(1, tried) for a, b in zip(shown, must, strict=True)):
                yield f"{name} of {key} is {shown}, must be {must}"


def _status(logs: Logs, job: Job) -> ResultStatus | None:
    ends = [record.status for record in logs.chains.get(job.task, []) if isinstance(record, Result)]
    return ends[0] if ends else None


async def _post(session: aiohttp.ClientSession, url: str, scores: list[dict[str, Any]]) -> dict[str, Any]:
    async with session.post(url + "/v1/scores", json=scores) as reply:
        taken: dict[str, Any] = await reply.json()
        return taken


async def _tables(
    session: aiohttp.ClientSession, url: str, results: int, scores: int
) -> dict[str, Any] | None:
    """Return a gateway's tables once they rest on so many results and scores."""
    async with session.get(url + "/v1/tables") as reply:
        view: dict[str, Any] = await reply.json()
        return view if (view["results"], view["scores"]) == (results, scores) else None
