"""Submissions in repositories of a Hugging Face hub, under the name upstream assigned.

The node's side: what to ask, and for how long. A process of its own (hub_process) makes the requests. It
asks the node before it commits, so a node that lost its lease commits nothing, and it exits with its node. If
both fail, the condition of the commit still lets only the first one succeed.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from shared.errors import EngineError
from shared.logs import get_logger
from shared.messages.encoding import decode
from shared.messages.jobs import Job
from shared.messages.runs import ErrorCode
from shared.processes import kill
from shared.settings import Settings
from trainer_node import transfer_rates
from trainer_node.artifacts.hub_process import GO, Absent, Found, Ready, Reply, Request, Trouble
from trainer_node.artifacts.interface import Stored, StoreError

COMMAND: Final = (sys.executable, "-m", "trainer_node.artifacts.hub_process")
TOKEN_VARIABLE: Final = "HF_TOKEN"
STARTING_S: Final = 30.0  # for the process to import the library, on a busy machine
# The library takes its options from the environment, where whatever the worker needs may be set.
OPTIONS: Final = {
    "HF_HUB_OFFLINE": "0",
    "TRANSFORMERS_OFFLINE": "0",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_DEBUG": "0",
}
NAME: Final = re.compile(r"(?!.*(?:--|\.\.))(?!.*\.git$)[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")

log = get_logger()


class Hub:
    """The hub, as one node uses it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def repository(self, job: Job) -> str:
        """Return where the job's submission goes: upstream's name for it, else one made of the task's.

        Raises EngineError for a name that no hub takes: the run would be for nothing.
        """
        given = job.offer.expected_repo_name
        name = given if given is not None else f"podium-{re.sub('-+', '-', job.task).strip('-')}"
        if not NAME.fullmatch(name):
            raise EngineError(
                ErrorCode.UNSUPPORTED,
                f"the hub takes no repository named {name[:100]!r}, which upstream expects",
            )
        return f"{self.settings.hub_namespace}/{name}"

    async def find(self, job: Job) -> Stored | None:
        """Return the task's submission, its files' hashes asked for or fetched; see `Remote`."""
        request = await asyncio.to_thread(self._request, job)
        return await self._ask(request, limit_s=STARTING_S + 5 * request.silence_s)

    async def store(
        self, job: Job, folder: Path, digest: str, *, must_hold: Callable[[], None], limit_s: float
    ) -> Stored:
        """Commit a folder's files unless the task has a submission, and note the rate; see `Remote`."""
        request = msgspec.structs.replace(
            await asyncio.to_thread(self._request, job),
            folder=str(folder),
            private=self.settings.hub_private,
        )
        log.info("uploading", task=job.task, repository=request.repository, digest=digest)
        stored = await self._ask(request, limit_s=limit_s, must_hold=must_hold)
        if stored is None:
            raise StoreError(f"{request.repository}: the upload ended without an answer")
        return stored

    def _request(self, job: Job) -> Request:
        try:
            repository = self.repository(job)
        except EngineError as error:
            raise StoreError(str(error)) from error
        return Request(
            url=self.settings.hub_url.rstrip("/"),
            token=self._token(),
            repository=repository,
            task=job.task,
            silence_s=self.settings.hub_silence_s,
        )

    def _token(self) -> str:
        """Read the token again for every request: an operator may replace it while a job waits. Blocks."""
        file = self.settings.hub_token_file
        try:
            token = Path(file).expanduser().read_text() if file else os.environ.get(TOKEN_VARIABLE, "")
        except OSError as error:
            raise StoreError(f"hub_token_file {file} can't be read: {error.strerror}") from error
        except ValueError:  # without the error, which has a part of what is in it
            raise StoreError(f"hub_token_file {file} is not a text") from None
        if not token.strip():
            raise StoreError("no token for the hub: set hub_token_file or HF_TOKEN")
        return token.strip()

    async def _ask(
        self, request: Request, *, limit_s: float, must_hold: Callable[[], None] | None = None
    ) -> Stored | None:
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            env=self._environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        words = asyncio.create_task(process.stderr.read())
        try:
            async with asyncio.timeout(limit_s):
                reply, ready = await _talk(process, request, must_hold)
        except TimeoutError as error:
            raise StoreError(f"{request.repository}: not done within {limit_s:.0f} s") from error
        except ValueError as error:  # a library wrote to its standard output, say
            what = f"the process that uploads said what can't be read: {error}"
            raise StoreError(f"{request.repository}: {what}") from error
        finally:
            said = ""
            if await kill(process):
                said = (await words).decode(errors="replace").replace(request.token, "***").strip()
            else:  # reading from a disk that hangs
                words.cancel()
                log.warning("the process that uploads can't be killed", repository=request.repository)
            if said:
                log.debug("hub process", repository=request.repository, said=said[-2000:])
        if ready is not None:
            node, direction = self.settings.node, transfer_rates.Direction.UPLOAD
            await asyncio.to_thread(transfer_rates.note, node, direction, ready.sent_bytes, ready.sent_s)
        match reply:
            case Found(commit, digest):
                return Stored(digest, f"hf://{request.repository}@{commit}")
            case Absent():
                return None
            case Trouble(why):
                raise StoreError(f"{request.repository}: {why}")
            case _:
                raise StoreError(f"{request.repository}: the process that uploads ended early: {said[-500:]}")

    def _environment(self) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in (TOKEN_VARIABLE, "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT")
        }
        return inherited | OPTIONS | {"HF_HUB_DISABLE_XET": "0" if self.settings.hub_xet else "1"}


async def _talk(
    process: asyncio.subprocess.Process, request: Request, must_hold: Callable[[], None] | None
) -> tuple[Reply | None, Ready | None]:
    """Ask, allow the commit if the slot is still held, and hear the answer; None if the process died.

    The second is what was said before the commit. Raises ValueError if an answer can't be read.
    """
    ready = None
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(ConnectionError):  # it died at birth: reading tells
        process.stdin.write(msgspec.json.encode(request) + b"\n")
        await process.stdin.drain()
    while line := await process.stdout.readline():
        reply: Reply = decode(line, Reply)
        if not isinstance(reply, Ready):
            return reply, ready
        ready = reply
        if must_hold is not None:
            must_hold()
        with suppress(ConnectionError):
            process.stdin.write(GO)
            await process.stdin.drain()
    return None, ready
