"""The program that speaks with a hub: `python -m trainer_node.artifacts.hub_process`, one request on stdin.

A process of its own, because the hub's library blocks, keeps its options in global state, sleeps for as long
as a server asks it to, and can't be stopped: a process can be killed, which is also what a crash does,
so there is one case less. It ends by itself when the node that started it does (stdin closes).

The submission of a task is the commit whose title names the task. It is made on top of a commit that holds
nothing, and only if that is still the newest one: so the first one wins, and there is no second.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

GO: Final = b"go\n"


class Request(Struct, kw_only=True):
    """Look for this commit; if there is a folder, upload it when there is none."""

    url: str
    token: str
    repository: str
    task: str
    folder: str | None = None
    private: bool = False
    silence_s: float = 60.0


class Found(Struct, tag=True):
    """The task's submission is this commit, and its files have this digest."""

    commit: str
    digest: str


class Absent(Struct, tag=True):
    """Nothing is there."""


class Ready(Struct, tag=True):
    """All is uploaded but the commit: say GO, and it is made."""

    sent_bytes: int = 0  # if this request uploaded all of it
    sent_s: float = 0.0


class Trouble(Struct, tag=True):
    """It failed, or its outcome is unknown."""

    error: str


Reply = Found | Absent | Ready | Trouble


def main() -> int:
    """Answer the one request; returns the exit status."""
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=Request)
    go: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(go,), daemon=True).start()
    try:
        _write(answer(request, go))
    except Exception as error:  # whatever it is, the waiting node must get an answer
        traceback.print_exc()
        _write(Trouble(_clean(f"{type(error).__name__}: {error}", request.token)))
    return 0


def _listen(go: queue.SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        go.put(line)
    os._exit(1)  # the node is gone: nothing may be committed in its name any more


def _write(reply: Reply) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
    sys.stdout.buffer.flush()


def answer(request: Request, go: queue.SimpleQueue[bytes]) -> Reply:
    """Return what the repository holds; store the folder, if one is given and it holds nothing yet.

    `go` says when to commit.
    """
    # Here, not above: the node imports this file for its messages, and must not pay for the library.
    from trainer_node.artifacts.hub_session import Session

    session = Session(request.url, request.token, request.repository, request.silence_s)
    title = f"podium: {request.task}"
    try:
        state = session.find(title)
        if state is None and request.folder is not None:
            session.create(private=request.private)
            state = session.find(title)
        if isinstance(state, str) and request.folder is not None:
            additions, sent = session.upload(Path(request.folder))
            _write(Ready(*sent))
            if go.get() != GO:
                return Trouble("stopped before the commit")
            session.commit(title, additions, parent=state)
            state = session.find(title)
        if isinstance(state, tuple):
            return Found(*state)
        if request.folder is None:
            return Absent()
        return Trouble(f"{request.repository} has no submission after the commit was sent")
    except session.ERRORS as error:
        return Trouble(_clean(session.explain(error), request.token))


def _clean(text: str, token: str) -> str:
    """Return one line without the token: a server that echoes its input must not get it into a log."""
    return " ".join(text.replace(token, "***").split())


if __name__ == "__main__":
    sys.exit(main())
