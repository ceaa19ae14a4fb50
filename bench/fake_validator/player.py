"""Play a trace of offers against live gateways as upstream would: offer, start, read the submission."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct

from bench.fake_validator import requests
from bench.fake_validator.trace import HOUR_S, Event
from bench.fake_validator.validator import (
    SIGNATURE,
    Keys,
    Reply,
    Validator,
    accepted,
    new_nonce,
    signed_headers,
)

STALE_S = 600
NO_REPLY = Reply(0, None, 0.0)
MOST_LOOKS = 4  # at a submission, as upstream evaluates at most four times


class Played(Struct, kw_only=True):
    """The responses to one offer."""

    event: Event
    offered: Reply
    started: Reply | None = None  # None: it was not accepted, or upstream never started it
    submission: Reply | None = None
    repo: str | None = None

    @property
    def accepted(self) -> bool:
        """Return whether the offer was accepted."""
        return accepted(self.offered)

    @property
    def task_id(self) -> str:
        """Return the task's id."""
        task_id: str = self.event.offer["task_id"]
        return task_id


class Player:
    """One validator, some gateways, and a clock that runs faster.

    `scale` is how many real seconds a simulated one takes; `dataset` names the data of an event's task.
    """

    def __init__(
        self,
        urls: list[str],
        keys: Keys | None,
        miner: str,
        *,
        scale: float,
        dataset: Callable[[Event], str],
        evaluation_h: float = 0.5,
    ) -> None:
        self.urls = urls
        self.keys = keys
        self.miner = miner
        self.scale = scale
        self.dataset = dataset
        self.evaluation_h = evaluation_h
        self.played: list[Played] = []
        self._taken: set[str] = set()
        self._calls = 0

    async def play(self, events: list[Event]) -> list[Played]:
        """Play all events at their times; return when the last submission was asked for."""
        began = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=10.0)
        connector = aiohttp.TCPConnector(limit=500)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            for event in events:
                await asyncio.sleep(max(0.0, began + event.at * self.scale - time.monotonic()))
                group.create_task(self._one(session, event))
        return self.played

    async def _one(self, session: aiohttp.ClientSession, event: Event) -> None:
        if event.attempt > 1 and event.offer["task_id"] in self._taken:
            return  # upstream offers again only what nobody took
        played = Played(event=event, offered=await self._offer(session, event))
        self.played.append(played)
        if not played.accepted:
            return
        self._taken.add(played.task_id)
        if event.start_after_s is None:
            return
        await asyncio.sleep(event.start_after_s * self.scale)
        played.repo = str(uuid.uuid4())
        played.started = await self._start(session, event, played.repo)
        await asyncio.sleep((event.offer["hours_to_complete"] + self.evaluation_h) * HOUR_S * self.scale)
        for _ in range(MOST_LOOKS):
            played.submission = await self._call(
                session, "GET", f"/get_latest_model_submission/{played.task_id}"
            )
            if played.submission.status == 200:
                return
            await asyncio.sleep(self.evaluation_h * HOUR_S * self.scale)

    async def _offer(self, session: aiohttp.ClientSession, event: Event) -> Reply:
        path = requests.OFFER_PATHS[event.kind]
        return await self._call(session, "POST", path, event.offer, fault=event.fault)

    async def _start(self, session: aiohttp.ClientSession, event: Event, repo: str) -> Reply:
        """Sent once: upstream neither looks at the answer nor tries again."""
        fields = {name: event.offer[name] for name in ("model", "hours_to_complete")}
        if event.image_model:
            fields["model_type"] = event.image_model
        data = self.dataset(event)
        body = requests.start(event.kind, event.offer["task_id"], repo, data, **fields)
        return await self._call(session, "POST", requests.START_PATHS[event.kind], body)

    async def _call(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        payload: dict[str, Any] | None = None,
        *,
        fault: str | None = None,
    ) -> Reply:
        """Send one request to one of the gateways; return NO_REPLY if no answer came."""
        body = None if payload is None else msgspec.json.encode(payload)
        self._calls += 1
        url = self.urls[self._calls % len(self.urls)]
        client = Validator(session, self.keys, self.miner)
        try:
            return await client.send(method, url + path, self._headers(body, fault), body)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return NO_REPLY

    def _headers(self, body: bytes | None, fault: str | None) -> dict[str, str]:
        if self.keys is None:
            return {"Content-Type": "application/json"}
        nonce = new_nonce(time.time_ns() - STALE_S * 10**9) if fault == "stale nonce" else None
        headers = signed_headers(self.keys, self.miner, body, nonce)
        if fault == "bad signature":
            headers[SIGNATURE] = "0x" + "00" * 64
        return headers
