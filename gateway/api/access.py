"""Who may use what of the HTTP side: the rules, as pure functions of a request's headers.

With tokens: anyone who sends one. Without, this machine only: then the socket is on loopback, and what a web
page could have sent through a browser, or a proxy from elsewhere, is refused.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from enum import Enum
from typing import Final

from gateway.api.tokens import LOOK_S, Tokens, token_file
from gateway.errors import ForeignRequestError, UnauthorizedError
from gateway.http_request import why_foreign
from shared.errors import SettingsError
from shared.net import is_loopback
from shared.settings import Settings

SCHEME: Final = "bearer "
NEED_A_TOKEN: Final = (
    "send `Authorization: Bearer TOKEN` with a token of the gateway's api_token_file; the podium command "
    "takes it from PODIUM_API_TOKEN_FILE"
)


class Access(Enum):
    """What a route asks of those who use it."""

    OPEN = "open"  # nothing: it reveals nothing
    METRICS = "metrics"  # a token, or this machine; with `metrics_open` nothing
    TOKEN = "token"


class Guard:
    """Lets in who may ask."""

    def __init__(self, tokens: Tokens | None, *, loopback: bool, metrics_open: bool) -> None:
        self.tokens = tokens
        self._loopback = loopback
        self._metrics_open = metrics_open

    async def follow(self) -> None:
        """Keep the tokens as their file is; runs until cancelled, also without tokens."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self.tokens is not None:
                await self.tokens.look()

    def admit(self, access: Access, headers: Mapping[str, str]) -> str:
        """The name of the token's owner, if it has one; raises UnauthorizedError or ForeignRequestError."""
        if access is Access.OPEN or (access is Access.METRICS and self._metrics_open):
            return ""
        if self.tokens is None:
            if why := why_foreign(headers):
                raise ForeignRequestError(
                    f"{why}; without api_token_file a gateway answers this machine only; "
                    "`podium keys DIR` makes one"
                )
            return ""
        given = headers.get("Authorization", "")
        if given[: len(SCHEME)].lower() == SCHEME:
            owner = self.tokens.owner(given[len(SCHEME) :].strip())
            if owner is not None:
                return owner
        elif access is Access.METRICS and self._loopback and why_foreign(headers) is None:
            return ""
        raise UnauthorizedError(
            ("this token is not known: " if given else "this needs a token: ") + NEED_A_TOKEN
        )


def guard_of(settings: Settings, listening: socket.socket) -> Guard:
    """The guard that the settings ask for; SettingsError if anybody could come in. Blocks."""
    file, loopback = token_file(settings), is_loopback(str(listening.getsockname()[0]))
    if file is None and not loopback:
        address = listening.getsockname()[0]
        raise SettingsError(
            f"the gateway would listen on {address} with /v1 open to anybody: make a token "
            "with `podium keys DIR` and set PODIUM_API_TOKEN_FILE=DIR, or set PODIUM_GATEWAY_HOST=127.0.0.1"
        )
    return Guard(Tokens(file) if file else None, loopback=loopback, metrics_open=settings.metrics_open)
