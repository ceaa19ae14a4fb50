"""An upstream that offers every job to either gateway until one has accepted it."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import aiohttp
import msgspec
from msgspec import Struct

from bench.harness.fleet import GATEWAYS, Fleet
from shared.messages.encoding import encode
from shared.messages.offers import Decision, Offer

JSON = {"Content-Type": "application/json"}
ANSWER_S = 3.0  # upstream's own patience
TO_BOTH, AGAIN = 0.1, 0.1  # shares of offers that go to both gateways at once, and once more when accepted


class Responses(Struct):
    """The responses that clients received."""

    accepted: dict[str, Decision] = {}  # by task key
    counts: Counter[str] = msgspec.field(default_factory=Counter)
    findings: list[str] = []


class Upstream:
    """Several clients that offer one job after another."""

    def __init__(self, fleet: Fleet, templates: list[Offer], chance: random.Random) -> None:
        self.fleet = fleet
        self.templates = templates
        self.chance = chance
        self.responses = Responses()
        self.closing = False  # no new job; those begun are still offered until accepted
        self._number = 0

    async def run(self, clients: int) -> None:
        """Run until `closing` is set and each client's last job is accepted."""
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client(session))

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while not self.closing:
            self._number += 1
            offer = msgspec.structs.replace(
                self.chance.choice(self.templates), task_id=f"job-{self._number:05d}"
            )
            decision = await self._until_accepted(session, offer)
            if self.chance.random() < AGAIN:
                again = await self._until_accepted(session, offer)
                if again.slot != decision.slot or again.deadline_at != decision.deadline_at:
                    self.responses.findings.append(f"{offer.task_id}: accepted twice, differently")

    async def _until_accepted(self, session: aiohttp.ClientSession, offer: Offer) -> Decision:
        while True:
            gateways = self.chance.sample(GATEWAYS, 2)
            if self.chance.random() >= TO_BOTH:
                gateways = gateways[:1]
            answers = await asyncio.gather(*(self._offer(session, name, offer) for name in gateways))
            for answer in answers:
                if answer is not None and answer.accepted:
                    return answer
            await asyncio.sleep(self.chance.uniform(0.05, 0.3))

    async def _offer(self, session: aiohttp.ClientSession, gateway: str, offer: Offer) -> Decision | None:
        """Make one attempt; return None if no decision was received, whatever was stored."""
        counts, known = self.responses.counts, self.responses.accepted.get(offer.task_id)
        url = self.fleet.url(gateway) + "/v1/offers"
        try:
            async with session.post(url, data=encode(offer), headers=JSON) as reply:
                body = await reply.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            counts[type(error).__name__] += 1
            return None
        if reply.status != 200:
            counts[f"status {reply.status}"] += 1
            if reply.status != 503:
                self.responses.findings.append(
                    f"{offer.task_id}: {gateway} answered {reply.status}: {body[:200]!r}"
                )
            return None
        decision = msgspec.json.decode(body, type=Decision)
        counts["accepted" if decision.accepted else "rejected"] += 1
        if decision.accepted:
            self.responses.accepted.setdefault(decision.task, decision)
        elif known is not None:
            self.responses.findings.append(
                f"{offer.task_id}: accepted, then rejected by {gateway}: {decision.reason}"
            )
        return decision
