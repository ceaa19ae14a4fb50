"""Start a worker of a chaos run and detect two workers on one slot at the same time.

    python worker_witness.py FOLDER COMMAND... RUN_FOLDER/job.json

Locks FOLDER/<slot>.lock, which no part of Podium knows, and becomes the worker; the worker inherits the lock,
which is free when the last of its processes has exited. FOLDER/<slot>.log lists the workers, in the format of
the slot's own log: a worker that started while the lock was held has no `released` before it.
Uses only the standard library, because it runs before each worker.
"""

import fcntl
import json
import os
import sys
import time
from typing import Any


def witness(folder: str, job_file: str) -> None:
    """Log that this process is now a slot's worker, and whether another one still is."""
    with open(job_file, encoding="utf-8") as file:
        job = json.load(file)
    path = os.path.join(folder, job["slot"])
    lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(lock, True)
    lines = [line_of("acquired", os.getpid(), job["task"], job_file)]
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # shown by the missing `released`
    else:
        if before := last_line(path + ".log"):
            lines.insert(0, line_of("released", before["pid"], before["task"], before["job_file"]))
    log = os.open(path + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with open(log, "w", encoding="utf-8") as file:
        file.writelines(lines)


def line_of(event: str, pid: int, task: str, job_file: str) -> str:
    """Return one line of the log."""
    return (
        json.dumps({"event": event, "pid": pid, "task": task, "job_file": job_file, "at": time.time()}) + "\n"
    )


def last_line(path: str) -> dict[str, Any] | None:
    """Return the newest line of the log."""
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    return json.loads(lines[-1]) if lines else None


if __name__ == "__main__":
    witness(sys.argv[1], sys.argv[-1])
    os.execv(sys.argv[2], sys.argv[2:])
