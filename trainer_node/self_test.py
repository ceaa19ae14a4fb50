"""Run the engine's self-test for this slot, in processes of its own, and say what is wrong."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec
from msgspec import Struct

from shared.files import write_atomically
from shared.logs import get_logger
from shared.messages import Hardware, encode
from shared.planning.hardware import device_count, is_cpu
from shared.processes import kill
from shared.self_test import SelfTestRequest, faults_in, read_reports, write_request
from shared.settings import Settings
from shared.version import version
from trainer_node.hardware import worker_threads
from trainer_node.worker.environment import worker_environment

LIMIT_S = 180.0  # a healthy slot takes under a minute, most of it imports and a compile
PARENT = "PODIUM_PARENT"  # the process that the test must not outlive
COMMAND = (sys.executable, "-m", "trainer_node.engine.self_test")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = get_logger()


class Passed(Struct, frozen=True, kw_only=True):
    """What was found healthy: the same hardware and version need no test again until the next boot."""

    boot: str
    version: str
    hardware: Hardware


def wanted(settings: Settings, hardware: Hardware) -> bool:
    """Return whether this slot is tested when its node starts."""
    return settings.self_test == "on" or (settings.self_test == "auto" and not is_cpu(hardware))


async def faults_at_start(settings: Settings, hardware: Hardware, folder: Path) -> list[str]:
    """Return the slot's faults; one that passed since the machine booted is not tested again.

    So a node that restarts has no minute between it and its job. A disk that can't be written is a fault.
    """
    known = folder / "self_test.json"
    passed = Passed(boot=_boot(), version=version(), hardware=hardware)
    if known.is_file() and known.read_bytes() == encode(passed):
        return []
    try:
        faults = await run_self_test(settings, hardware, folder)
        if not faults:
            write_atomically(known, encode(passed))
    except OSError as error:
        log.error("the self-test can't be run", error=str(error))
        return [f"the self-test can't be run: {error}"]
    return faults


async def run_self_test(
    settings: Settings,
    hardware: Hardware,
    folder: Path,
    *,
    command: tuple[str, ...] = COMMAND,
    limit_s: float = LIMIT_S,
) -> list[str]:
    """Return what is wrong with the slot's devices, in one sentence each; takes at most `limit_s`."""
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
    reports = await asyncio.to_thread(read_reports, place, processes)
    faults = faults_in(reports, manner)
    for report in filter(None, reports):
        for result in report.results:
            log.info("self-test", **msgspec.structs.asdict(result))
    for fault in faults:
        log.error("the self-test found a fault", fault=fault)
    return faults


def _boot() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:  # then no earlier result counts
        return os.urandom(8).hex()
