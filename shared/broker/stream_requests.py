"""What the admin asks the broker about its streams: what they hold; to make, change or delete one."""

from __future__ import annotations

import json
from typing import Any, Final

from msgspec import Struct

from shared.broker.bus import Bus
from shared.broker.jetstream import answer_of
from shared.errors import BusError, BusUnavailableError

STREAM_EXISTS: Final = 10058
NOT_FOUND: Final = 10059
INFO_TIMEOUT_S: Final = 5.0
CHANGE_TIMEOUT_S: Final = 5.0
WRITTEN: Final = {"podium.config-file": "written"}  # in a stream's metadata: an update has written its file


class StreamInfo(Struct, frozen=True, kw_only=True):
    """One stream at one moment."""

    config: dict[str, Any]
    created: str  # RFC 3339; a stream re-created under the same name has another
    now: str  # the broker's clock, RFC 3339
    messages: int
    bytes: int
    first: int  # sequence of the oldest message
    last: int  # sequence of the newest message there ever was


async def find_stream(bus: Bus, name: str, *, timeout_s: float = INFO_TIMEOUT_S) -> StreamInfo | None:
    """Return the stream of this name, or None. Raises BusError."""
    message = await bus.request(bus.info_subject(name), timeout_s=timeout_s)
    reply = answer_of(message, f"stream {name}")
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


async def subjects_in(bus: Bus, name: str) -> set[str]:
    """Return the subjects of all records of a stream. Raises BusError."""
    found: set[str] = set()
    while True:
        query = json.dumps({"subjects_filter": ">", "offset": len(found)}).encode()  # 100,000 at a time
        message = await bus.request(bus.info_subject(name), query, timeout_s=INFO_TIMEOUT_S)
        reply = answer_of(message, f"stream {name}")
        if "error" in reply:
            raise BusUnavailableError(f"stream {name}: {reply['error'].get('description')}")
        page = reply["state"].get("subjects") or {}
        found |= page.keys()
        if not page or len(found) >= reply.get("total", 0):
            return found


async def create_stream(bus: Bus, config: dict[str, Any]) -> dict[str, Any]:
    """Create a stream, unless another service was faster; return its configuration. Raises BusError.

    A broker that dies while it writes a stream's configuration starts without that stream ("checksums do
    not match" in its log). Its records are still on disk, and a stream that is created under the same name
    has them. But the broker leaves the broken file as it is, and would start without the stream again
    (seen on 2.15.1). An update writes the file again; if it gets lost, the next `bootstrap` sees that.
    """
    name = config["name"]
    reply = await _ask(bus, f"$JS.API.STREAM.CREATE.{name}", config)
    if "error" not in reply:
        return await write_file(bus, reply["config"])
    if reply["error"].get("err_code") == STREAM_EXISTS:  # another service created it first, with other limits
        found = await find_stream(bus, name)
        if found is not None:
            return found.config
    raise BusError(f"stream {name} can't be created: {reply['error'].get('description')}")


async def write_file(bus: Bus, config: dict[str, Any]) -> dict[str, Any]:
    """Have the broker write a stream's file once by an update; return its configuration. Raises BusError.

    A copy gets its update when it becomes a log.
    """
    written = WRITTEN.items() <= (config.get("metadata") or {}).items()
    if written or config["storage"] != "file" or config.get("mirror"):
        return config
    return await update_stream(bus, config)


async def update_stream(bus: Bus, config: dict[str, Any]) -> dict[str, Any]:
    """Give a stream another configuration; return it, with the mark of an update. Raises BusError."""
    name, marked = config["name"], config | {"metadata": (config.get("metadata") or {}) | WRITTEN}
    reply = await _ask(bus, f"$JS.API.STREAM.UPDATE.{name}", marked)
    if "error" in reply:
        why = f"stream {name} can't be changed: {reply['error'].get('description')}"
        # Another service has ended the upgrade: who looks again goes on.
        gone = reply["error"].get("err_code") == NOT_FOUND
        raise BusUnavailableError(why) if gone else BusError(why)
    return marked


async def delete_stream(bus: Bus, name: str) -> None:
    """Delete a stream with its records; nothing happens if there is none. Raises BusError."""
    reply = await _ask(bus, f"$JS.API.STREAM.DELETE.{name}", None)
    if "error" in reply and reply["error"].get("err_code") != NOT_FOUND:
        raise BusError(f"stream {name} can't be deleted: {reply['error'].get('description')}")


async def _ask(bus: Bus, subject: str, config: dict[str, Any] | None) -> dict[str, Any]:
    payload = b"" if config is None else json.dumps(config).encode()
    return answer_of(await bus.request(subject, payload, timeout_s=CHANGE_TIMEOUT_S), subject)
