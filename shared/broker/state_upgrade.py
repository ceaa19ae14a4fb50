"""The upgrade of a broker with one log of all states, STATE, to a log for each slot.

The broker copies: a slot's log begins as a mirror of STATE, which keeps sequences and times. When it has all
of its slot's records it becomes a log of its own, and in the end STATE is deleted. Each step goes on from
what an interrupted upgrade left, and several services may take it at the same time.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from shared import subjects
from shared.broker.bus import Bus
from shared.broker.jetstream import Record, answer_of
from shared.broker.stream_requests import (
    StreamInfo,
    create_stream,
    delete_stream,
    find_stream,
    subjects_in,
    update_stream,
    write_file,
)
from shared.broker.stream_specs import StreamSpec, state_log
from shared.errors import BusError, BusUnavailableError, IncompatibleStreamError
from shared.logs import get_logger
from shared.settings import Settings

OLD: Final = subjects.OLD_STATE_STREAM
FROZEN: Final = "podium.frozen.state"  # nobody publishes there
STILL_S: Final = 10.0  # a copy that doesn't grow for this long is reported; the next bootstrap goes on
LOOK_S: Final = 0.05
NO_MESSAGE: Final = 10037

log = get_logger()


async def split_states(bus: Bus, settings: Settings) -> list[str]:
    """Bring the records of STATE into the slots' logs; return the names of those that were made.

    Nothing happens without STATE. Raises BusError; the next call then goes on.
    """
    old = await find_stream(bus, OLD) or await _found_again(bus, settings)
    if old is None:
        return []
    try:
        return await _split(bus, settings, old)
    except BusUnavailableError:
        if await find_stream(bus, OLD) is not None:
            raise
        return []  # another service was faster, and STATE went while it was read here


async def _found_again(bus: Bus, settings: Settings) -> StreamInfo | None:
    """Return STATE if the broker died while it was frozen, and so started without it (see `create_stream`).

    So it is looked for where there are jobs, and none of the settings' slots has a log of states. A box whose
    only slot has lost its log looks alike: then STATE is empty, and the copy of it keeps its own records.
    """
    jobs = await find_stream(bus, subjects.JOBS_STREAM)
    if jobs is None or jobs.messages == 0:
        return None
    for slot in settings.slots:
        if await find_stream(bus, subjects.state_stream(slot)) is not None:
            return None
    config = state_log(settings, settings.slots[0]).config
    await create_stream(bus, config | {"name": OLD, "subjects": [FROZEN], "allow_direct": False})
    log.warning("looking for the states of an interrupted upgrade", stream=OLD)
    return await find_stream(bus, OLD)


async def _split(bus: Bus, settings: Settings, old: StreamInfo) -> list[str]:
    await _freeze(bus, old)
    frozen = await _still(bus)
    slots, strays = await _slots(bus, settings)
    made = [await _begin_copy(bus, settings, slot, old) for slot in slots]
    for slot in slots:
        await _await_copy(bus, slot)
    await _still(bus, frozen)
    for slot in reversed(slots):  # services wait for the settings' slots, which come first
        copy = await find_stream(bus, subjects.state_stream(slot))
        if copy is not None and copy.config.get("mirror"):
            await end_copy(bus, state_log(settings, slot), copy.config)
    await _still(bus, frozen)
    if strays:
        log.warning("STATE stays: some of its records are of no slot", subjects=sorted(strays)[:5])
    else:
        await delete_stream(bus, OLD)
        log.info("each slot has its own log of states now", slots=slots, records=old.messages)
    return [name for name in made if name is not None]


async def _still(bus: Bus, last: int | None = None) -> int:
    """Return the sequence of STATE's newest record. Raises BusUnavailableError if it isn't `last`.

    The broker may store what it took before STATE was frozen: then the next bootstrap goes on.
    """
    found = await find_stream(bus, OLD)
    if found is None or last not in (None, found.last):
        raise BusUnavailableError(f"{OLD} has changed while it was copied: nothing was deleted")
    return found.last


async def end_copy(bus: Bus, spec: StreamSpec, copy: dict[str, Any]) -> dict[str, Any]:
    """Make a copy of STATE a log of its own; return its configuration. Raises BusError.

    The copy must have all of its records, or STATE must be gone: STATE is deleted only after all of its
    records were found in the slots' own logs. A copy that was begun after that has nothing to copy.
    """
    kept = {field: value for field, value in copy.items() if field != "mirror"}
    own = kept | {"subjects": spec.config["subjects"], "allow_direct": True, "mirror_direct": False}
    return await update_stream(bus, own)


async def _freeze(bus: Bus, old: StreamInfo) -> None:
    """Take its subjects from STATE: what is stored is final, and a process of an older version is refused.

    Nor can it be read directly: it would serve an older process a state that is out of date, and the broker
    would have copies of one slot answer for the whole log (seen on 2.15.1).
    """
    bound = old.config.get("subjects")
    if bound not in ([subjects.ANY_STATE], [FROZEN]):
        raise IncompatibleStreamError(
            f"stream {OLD} exists with subjects={bound!r} where Podium had {subjects.ANY_STATE!r}: "
            "use another NATS account or store folder. If it has Podium's states, give it that subject again"
        )
    if bound != [FROZEN] or old.config.get("allow_direct"):
        await update_stream(bus, old.config | {"subjects": [FROZEN], "allow_direct": False})
    else:
        await write_file(bus, old.config)  # it may have been found again, and lost its update


async def _slots(bus: Bus, settings: Settings) -> tuple[list[str], set[str]]:
    """Return the slots that need a log, and the subjects in STATE that belong to no slot.

    A slot that the settings no longer have needs one, too: gateways read the chains of all jobs.
    """
    stored = await subjects_in(bus, OLD)
    strays = {subject for subject in stored if subjects.slot_in(subject) is None}
    if await find_stream(bus, subjects.JOBS_STREAM) is not None:
        stored |= await subjects_in(bus, subjects.JOBS_STREAM)
    named = sorted(filter(None, map(subjects.slot_in, stored)))
    return list(dict.fromkeys([*settings.slots, *named])), strays


async def _begin_copy(bus: Bus, settings: Settings, slot: str, old: StreamInfo) -> str | None:
    """Have the broker copy a slot's records; return the new log's name, or None if it was begun before."""
    name = subjects.state_stream(slot)
    if await find_stream(bus, name) is not None:
        return None
    config = state_log(settings, slot).config | {
        "mirror": {"name": OLD, "filter_subject": subjects.states_of_slot(slot)},
        "max_bytes": max(settings.log_max_bytes, old.config.get("max_bytes", -1), old.bytes),
        "allow_direct": False,  # services find no log until all of it is there
    }
    del config["subjects"]
    await create_stream(bus, config)
    return name


async def _await_copy(bus: Bus, slot: str) -> None:
    """Wait until a slot's log has all records of STATE that are the slot's, and compare them."""
    name, newest = subjects.state_stream(slot), await _newest(bus, slot)
    grown_at, seen = time.monotonic(), -1
    while True:
        copy = await find_stream(bus, name)
        if copy is None:
            raise BusUnavailableError(f"{name} has vanished while it was copied")
        if not copy.config.get("mirror"):  # compared by another service, or before an interruption
            return await _must_be_equal(bus, slot, max(0, newest - 1))
        if copy.last >= newest:
            return await _must_be_equal(bus, slot)
        if copy.last > seen:
            grown_at, seen = time.monotonic(), copy.last
        if time.monotonic() - grown_at > STILL_S:
            raise BusUnavailableError(
                f"{name} has {copy.last} of {newest} records of {OLD} and does not grow"
            )
        await asyncio.sleep(LOOK_S)


async def _must_be_equal(bus: Bus, slot: str, after: int = 0) -> None:
    """Compare the copy with STATE record by record from a sequence on: subject, sequence, time and data."""
    name, count = subjects.state_stream(slot), 0
    copies = _records(bus, name, slot, after)
    async for record in _records(bus, OLD, slot, after):
        if await anext(copies, None) != record:
            raise BusError(f"{name} differs from {OLD} at {record.sequence}: nothing was deleted")
        count += 1
    if after == 0:
        log.info("a slot's states are copied", stream=name, records=count)


async def _newest(bus: Bus, slot: str) -> int:
    """Return the sequence of the slot's newest record in STATE; 0 if it has none."""
    found = await _get(bus, OLD, {"last_by_subj": subjects.states_of_slot(slot)})
    return 0 if found is None else found.sequence


async def _records(bus: Bus, stream: str, slot: str, after: int) -> AsyncIterator[Record]:
    """Yield the slot's records in STATE or in its copy, oldest first."""
    query = {"next_by_subj": subjects.states_of_slot(slot)}
    while record := await _get(bus, stream, query | {"seq": after + 1}):
        yield record
        after = record.sequence


async def _get(bus: Bus, stream: str, query: dict[str, Any]) -> Record | None:
    """Return a record of the stream itself, never from a copy; neither answers direct reads meanwhile."""
    message = await bus.request(f"$JS.API.STREAM.MSG.GET.{stream}", json.dumps(query).encode())
    reply = answer_of(message, stream)
    if "error" in reply:
        if reply["error"].get("err_code") == NO_MESSAGE:
            return None
        raise BusUnavailableError(f"{stream} can't be read: {reply['error'].get('description')}")
    found = reply["message"]
    data = base64.b64decode(found.get("data") or "")
    return Record(found["seq"], found["subject"], data, found["time"])
