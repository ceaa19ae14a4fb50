"""What the broker says of a stream: which one it is, how it is configured, what it holds."""

from __future__ import annotations

import json
from typing import Any

from msgspec import Struct

from shared.broker.bus import Bus
from shared.errors import BusUnavailableError

NOT_FOUND = 10059
INFO_TIMEOUT_S = 5.0


class StreamInfo(Struct, frozen=True, kw_only=True):
    """One stream at one moment."""

    config: dict[str, Any]
    created: str  # RFC 3339; a stream that is made anew under the same name has another
    now: str  # the broker's clock, RFC 3339
    messages: int
    bytes: int
    first: int  # sequence of the oldest message
    last: int  # sequence of the newest message there ever was


async def find_stream(bus: Bus, name: str, *, timeout_s: float = INFO_TIMEOUT_S) -> StreamInfo | None:
    """The stream of this name, or None. Raises BusError."""
    reply = json.loads((await bus.request(bus.info_subject(name), timeout_s=timeout_s)).data)
    if "error" in reply:
        if reply["error"].get("err_code") == NOT_FOUND:
            return None
        raise BusUnavailableError(f"stream {name}: {reply['error'].get('description')}")
    state = reply["state"]
    return StreamInfo(
        config=reply["config"],
        created=reply["created"],
        now=reply.get("ts", ""),
        messages=state["messages"],
        bytes=state["bytes"],
        first=state["first_seq"],
        last=state["last_seq"],
    )
