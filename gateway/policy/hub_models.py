"""What the hub says about models that have no copy here: each one's config, asked for until it is there."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from math import inf
from typing import Any, Final

import msgspec
from msgspec import Struct

from shared.logs import get_logger
from shared.planning.architectures import LARGEST_CONFIG, ModelFacts, facts_from_config
from shared.settings import Settings

MOST_KNOWN: Final = 4096
SILENT_S: Final = 300.0  # until a silent hub, or a model that it didn't show, is asked again
AT_ONCE: Final = 4
NO_CONFIG: Final = (
    "its repository has no config.json: it holds an adapter, GGUF files or another kind of model"
)
NOT_NOW: Final = {
    HTTPStatus.PROXY_AUTHENTICATION_REQUIRED,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
}
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

log = get_logger()


class Answer(Struct, frozen=True):
    """What the hub said about a model; a config stays as it is, one that isn't there yet may come."""

    facts: ModelFacts | None  # None: the hub doesn't show it to us
    asks_again_at: float


class HubModels:
    """Configs of a hub's public models. A hub that can't be reached delays one offer in five minutes."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = settings.hub_url.rstrip("/")
        self._wait_s = settings.hub_look_s
        self._clock = clock
        self._known: dict[str, Answer] = {}
        self._asks_again_at = 0.0
        self._few = asyncio.Semaphore(AT_ONCE)

    def facts(self, model: str) -> ModelFacts | None:
        """Return what the hub said about a model; None if it wasn't asked, or didn't say."""
        known = self._known.get(model)
        return known.facts if known is not None else None

    async def look(self, model: str) -> None:
        """Ask for a model's config, unless that was done; ends in time and never raises."""
        if not self._is_asked(model):
            return
        waited = self._few.locked()
        try:
            async with asyncio.timeout(self._wait_s), self._few:
                if self._is_asked(model):  # not yet by an offer that came before
                    await self._ask(model)
        except TimeoutError:
            if not waited:  # else the time was spent on others' requests, which say themselves what they got
                self._silent(model, f"no answer within {self._wait_s:g} s")

    def _is_asked(self, model: str) -> bool:
        known = self._known.get(model)
        return (
            self._wait_s > 0
            and (known is None or self._clock() >= known.asks_again_at)
            and self._clock() >= self._asks_again_at
            and _ID.fullmatch(model) is not None
            and ".." not in model
        )

    async def _ask(self, model: str) -> None:
        import aiohttp  # a command that only names a policy asks no hub

        try:
            async with (
                aiohttp.ClientSession(trust_env=True) as session,
                session.get(f"{self._url}/{model}/resolve/main/config.json") as response,
            ):
                if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR or response.status in NOT_NOW:
                    self._silent(model, f"status {response.status}")
                    return
                content = await response.content.read(LARGEST_CONFIG) if response.ok else b""
                while response.ok and (piece := await response.content.read(LARGEST_CONFIG - len(content))):
                    content += piece
                self._note(model, facts_of_answer(response.status, response.headers, content))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._silent(model, str(error) or type(error).__name__)

    def _note(self, model: str, facts: ModelFacts | None) -> None:
        self._known.pop(model, None)
        if len(self._known) >= MOST_KNOWN:
            del self._known[next(iter(self._known))]
        may_come = facts is None or facts.refusal == NO_CONFIG
        self._known[model] = Answer(facts, self._clock() + SILENT_S if may_come else inf)

    def _silent(self, model: str, cause: str) -> None:
        self._asks_again_at = self._clock() + SILENT_S
        log.warning(
            "can't look at a model's config; its name decides",
            model=model,
            hub=self._url,
            cause=cause,
            asks_again_in_s=SILENT_S,
        )


def facts_of_answer(status: int, headers: Mapping[str, str], content: bytes) -> ModelFacts | None:
    """Return what a hub's answer to a request for `config.json` says about the model; None if nothing."""
    if status == HTTPStatus.NOT_FOUND and headers.get("X-Error-Code") == "EntryNotFound":
        return ModelFacts(NO_CONFIG)
    if status != HTTPStatus.OK:
        return None  # gated, private, or not there: a node may have a token, or a copy
    try:
        return facts_from_config(msgspec.json.decode(content, type=dict[str, Any]))
    except (ValueError, RecursionError):
        return None
