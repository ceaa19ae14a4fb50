"""Access control of the HTTP interface, as pure functions of a request's headers.

With API tokens, every request must carry one. Without, only direct local requests are allowed: the socket is
on loopback, and requests that a web page or a proxy could have sent are refused.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from enum import Enum
from typing import Final

from gateway.api.tokens import POLL_S, Tokens, token_file
from gateway.errors import ForeignRequestError, UnauthorizedError
from gateway.http_request import why_foreign
from shared.errors import SettingsError
from shared.net import is_loopback
from shared.settings import Settings

SCHEME: Final = "bearer "
NEED_A_TOKEN: Final = (
    "send `Authorization: Bearer TOKEN` with a token from the gateway's api_token_file; the podium command "
    "reads it from PODIUM_API_TOKEN_FILE"
)


class Access(Enum):
    """What a route requires of a request."""

    OPEN = "open"  # nothing; it reveals nothing
    METRICS = "metrics"  # a token or a local request; nothing with `metrics_open`
    TOKEN = "token"


class Guard:
    """Admits or refuses requests."""

    def __init__(self, tokens: Tokens | None, *, loopback: bool, metrics_open: bool) -> None:
        self.tokens = tokens
        self._loopback = loopback
        self._metrics_open = metrics_open

    async def follow(self) -> None:
        """Reload the tokens when their file changes; runs until cancelled, also without tokens."""
        while True:
            await asyncio.sleep(POLL_S)
            if self.tokens is not None:
                await self.tokens.refresh()

    def admit(self, access: Access, headers: Mapping[str, str]) -> str:
        """Return the name of the token, if it has one. Raises UnauthorizedError or ForeignRequestError."""
        if access is Access.OPEN or (access is Access.METRICS and self._metrics_open):
            return ""
        if self.tokens is None:
            if why := why_foreign(headers):
                raise ForeignRequestError(
                    f"{why}; without api_token_file the gateway accepts only direct local requests; "
                    "`podium keys DIR` makes a token file"
                )
            return ""
        given = headers.get("Authorization", "")
        if given[: len(SCHEME)].lower() == SCHEME:
            owner = self.tokens.owner(given[len(SCHEME) :].strip())
            if owner is not None:
                return owner
        elif access is Access.METRICS and self._loopback and why_foreign(headers) is None:
            return ""
        raise UnauthorizedError(("unknown token: " if given else "a token is required: ") + NEED_A_TOKEN)


def guard_of(settings: Settings, listening: socket.socket) -> Guard:
    """Make the guard of the settings. Raises SettingsError if /v1 would be open to everyone. Blocks."""
    file, loopback = token_file(settings), is_loopback(str(listening.getsockname()[0]))
    if file is None and not loopback:
        address = listening.getsockname()[0]
        raise SettingsError(
            f"the gateway would listen on {address} with /v1 open to everyone: make a token "
            "with `podium keys DIR` and set PODIUM_API_TOKEN_FILE=DIR, or set PODIUM_GATEWAY_HOST=127.0.0.1"
        )
    return Guard(Tokens(file) if file else None, loopback=loopback, metrics_open=settings.metrics_open)
