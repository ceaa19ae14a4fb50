"""Run the engine's self-test for this slot, in processes of its own, and say what is wrong."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from importlib import metadata
from pathlib import Path

import msgspec
from msgspec import Struct

from shared.files import write_atomically
from shared.logs import get_logger
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.planning.hardware import device_count, is_cpu
from shared.processes import PARENT, kill
from shared.self_test import (
    ProcessReport,
    SelfTestRequest,
    SlotHealth,
    faults_in,
    read_reports,
    warnings_in,
    write_request,
)
from shared.settings import Settings
from shared.version import version
from trainer_node.hardware import worker_threads
from trainer_node.worker.environment import worker_environment

LIMIT_S = 180.0  # a healthy slot takes under a minute, most of it imports and a compile
COMMAND = (sys.executable, "-m", "trainer_node.engine.self_test")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
DRIVER = Path("/proc/driver/nvidia/version")
# What computes on the devices, by the beginnings of the distributions' names: another one may compute wrong.
LIBRARIES = re.compile(r"torch|pytorch-triton|triton|flash-attn|transformers|nvidia-|cuda-")

log = get_logger()


class Passed(Struct, frozen=True, kw_only=True):
    """What was found healthy: as long as all of it is the same there is no test again."""

    boot: str
    version: str
    hardware: Hardware
    libraries: dict[str, str]  # version of each, sorted by name
    driver: str  # empty: none


def wanted(settings: Settings, hardware: Hardware) -> bool:
    """Return whether this slot is tested when its node starts."""
    return settings.self_test == "on" or (settings.self_test == "auto" and not is_cpu(hardware))


async def health_at_start(settings: Settings, hardware: Hardware, folder: Path) -> SlotHealth:
    """Return the slot's health; one without a remark is not tested again until something has changed.

    So a node that restarts has no minute between it and its job: only another boot, driver, library, version
    or hardware counts. A disk that can't be written is a fault.
    """
    known = folder / "self_test.json"
    passed = await asyncio.to_thread(_current, hardware)
    if known.is_file() and known.read_bytes() == encode(passed):
        return SlotHealth()
    try:
        health = await run_self_test(settings, hardware, folder)
        if health == SlotHealth():
            write_atomically(known, encode(passed))
    except OSError as error:
        log.error("the self-test can't be run", error=str(error))
        return SlotHealth(faults=[f"the self-test can't be run: {error}"])
    return health


async def run_self_test(
    settings: Settings,
    hardware: Hardware,
    folder: Path,
    *,
    command: tuple[str, ...] = COMMAND,
    limit_s: float = LIMIT_S,
) -> SlotHealth:
    """Return what is wrong with the slot's devices; takes at most `limit_s`."""
    place, processes = folder / "self_test", device_count(hardware)
    await asyncio.to_thread(write_request, place, SelfTestRequest(hardware=hardware, processes=processes))
    # What a worker gets: a library that only the node's environment finds must fail here, not in a job.
    environment = worker_environment(
        os.environ, worker_threads(settings), settings.gpus, settings.worker_environment
    )
    environment[PARENT] = str(os.getpid())
    with (place / "log").open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, str(place), stdout=output, stderr=output, env=environment, start_new_session=True
        )
    manner = ""
    try:
        async with asyncio.timeout(limit_s):
            status = await process.wait()
        if status:
            manner = f"the test ended with exit code {status}, see {place / 'log'}"
    except TimeoutError:
        manner = f"no answer within {limit_s:g} s"
    finally:
        ended = await kill(process, group=True)  # its ranks, too
    if not ended:
        manner += ", and it can't be killed: the driver hangs"
    return _health_of(await asyncio.to_thread(read_reports, place, processes), manner)


def _health_of(reports: list[ProcessReport | None], manner: str) -> SlotHealth:
    """Return what the processes found, and write it to the log; `manner` says how the test ended."""
    for report in filter(None, reports):
        for result in report.results:
            log.info("self-test", **msgspec.structs.asdict(result))
    health = SlotHealth(faults=faults_in(reports, manner), warnings=warnings_in(reports))
    for fault in health.faults:
        log.error("the self-test found a fault", fault=fault)
    for warning in health.warnings:
        log.warning("the self-test warns", warning=warning)
    return health


def _current(hardware: Hardware) -> Passed:
    """Return what a test now would be a test of."""
    return Passed(
        boot=_text(BOOT_ID) or os.urandom(8).hex(),  # without one no earlier result counts
        version=version(),
        hardware=hardware,
        libraries=libraries(),
        driver=_text(DRIVER),
    )


def libraries() -> dict[str, str]:
    """Return the versions of the installed distributions whose code runs on devices, sorted by name."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.name or "").lower()  # one that is half removed has none
        if LIBRARIES.match(name):
            found.setdefault(name, distribution.version)  # the first one on the path is imported
    return dict(sorted(found.items()))


def _text(path: Path) -> str:
    """Return a small file's text, empty if it can't be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
