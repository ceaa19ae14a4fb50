"""Start accepted tasks while the gateway is killed, and count refused connections and lost starts.

    python -m bench starts [--starts 100] [--kills 3]     # about a minute

Uses `podium up` with scripted workers and signed requests. Upstream sends a start once and waits 10 s for
the response. Here two accepted tasks are started repeatedly, each time over a new connection, during kill -9
of the gateway. A connection that is not accepted yet waits in the launcher's socket; one whose request the
killed process was handling is reset, which is counted separately. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct

from bench.fake_validator.validator import START, Validator, accepted, keys_from_seed
from bench.harness.fleet import ROOT
from podium.client import Client

WORKER = ROOT / "bench" / "harness" / "scripted_worker.py"
GAP_S = 0.3  # between two starts
MODEL = "podium/tiny-0.001B"
MINER, VALIDATOR = keys_from_seed("miner"), keys_from_seed("validator")


class Start(Struct, frozen=True):
    """The result of one start."""

    task: str
    end: str  # answered, refused, reset, timeout
    status: int = 0
    body: Any = None
    seconds: float = 0.0


def main() -> int:
    """Run, print every start that was not answered, fail if a connection was refused or an answer differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=100)
    parser.add_argument("--kills", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="podium-starts-") as folder:
        summary = asyncio.run(measure(Path(folder), args.starts, args.kills))
    print(json.dumps(summary))
    return 0 if not summary["refused"] and summary["jobs"] == 2 and not summary["different_answers"] else 1


async def measure(folder: Path, count: int, kills: int) -> dict[str, Any]:
    """Offer two tasks, start them `count` times amid `kills` kills, and look at what is stored."""
    launcher, url = launch(folder)
    try:
        tasks = await offer_two(url)
        knobs = folder / "knobs.json"
        knobs.write_text(json.dumps({"steps": 100_000, "step_s": 0.2}))
        kill_at = {round(count * (number + 0.5) / kills) for number in range(kills)}
        sent: list[asyncio.Task[Start]] = []
        for number in range(count):
            sent.append(asyncio.create_task(start(url, tasks[number % 2], str(knobs))))
            await asyncio.sleep(0)  # so that some kills find a start in the gateway's hands
            if number in kill_at:
                os.kill(gateway_pid(folder), signal.SIGKILL)
            await asyncio.sleep(GAP_S)
        starts = await asyncio.gather(*sent)
        stored = await asyncio.to_thread(Client(url).tasks)
        return summary_of(starts, len(kill_at)) | {"jobs": sum(task.state == "running" for task in stored)}
    finally:
        launcher.terminate()
        await asyncio.to_thread(launcher.wait, 60)


def launch(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """`podium up`, and where its gateway is."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PODIUM_")}
    own = {
        "PODIUM_HOTKEY": MINER.address,
        "PODIUM_UPSTREAM_VALIDATORS": VALIDATOR.address,
        "PODIUM_HARDWARE": "cpu",
        "PODIUM_WORKER_COMMAND": msgspec.json.encode([sys.executable, str(WORKER)]).decode(),
        "PODIUM_MODELS": json.dumps({MODEL: str(ROOT / "tests" / "data" / "oracle" / "base")}),
        "PODIUM_DATASET_ROOTS": str(folder),
        "PODIUM_STOP_GRACE_S": "5",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "podium", "up", "--data-dir", str(folder / "data")]
    launcher = subprocess.Popen(
        [*command, "--port", "0", "--nats-port", "0"],
        env=inherited | own,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    url = ""
    for line in launcher.stdout:
        if match := re.match(r"gateway +(http://\S+)", line):
            url = match[1]
        if line.startswith("data "):
            return launcher, url
    raise SystemExit(f"podium up ended with {launcher.wait()}")


def gateway_pid(folder: Path) -> int:
    """Return the gateway's process id."""
    return int(json.loads((folder / "data" / "run" / "gateway.json").read_text())["pid"])


async def offer_two(url: str) -> list[str]:
    """Offer two tasks that are accepted; they are not started yet."""
    async with aiohttp.ClientSession(url) as session:
        validator = Validator(session, VALIDATOR, MINER.address)
        for task in ("one", "two"):
            fields = {
                "task_id": task,
                "task_type": "InstructTextTask",
                "model": MODEL,
                "hours_to_complete": 2,
            }
            reply = await validator.offer(fields)
            if not accepted(reply):
                raise SystemExit(f"{task} was not accepted: {reply}")
    return ["one", "two"]


async def start(url: str, task: str, dataset: str) -> Start:
    """Send one start as upstream does: once, over a new connection."""
    request = {
        "task_id": task,
        "model": MODEL,
        "hours_to_complete": 2,
        "dataset": dataset,
        "file_format": "json",
        "dataset_type": {"field_instruction": "instruct", "field_output": "output"},
    }
    began = time.monotonic()
    async with aiohttp.ClientSession(url) as session:
        try:
            reply = await Validator(session, VALIDATOR, MINER.address).start(START, request)
        except aiohttp.ClientConnectorError:
            return Start(task, "refused")
        except (aiohttp.ClientError, ConnectionError):
            return Start(task, "reset")
        except TimeoutError:
            return Start(task, "timeout")
    return Start(task, "answered", reply.status, reply.body, time.monotonic() - began)


def summary_of(starts: list[Start], kills: int) -> dict[str, Any]:
    """Counts; every answered start of a task must have the same answer."""
    for one in starts:
        if one.end != "answered" or one.status != 200:
            print(one)
    answers = {(one.task, one.status, json.dumps(one.body)) for one in starts if one.end == "answered"}
    slowest = max((one.seconds for one in starts), default=0.0)
    return {
        "starts": len(starts),
        "kills": kills,
        "refused": sum(one.end == "refused" for one in starts),
        "reset": sum(one.end == "reset" for one in starts),
        "timeout": sum(one.end == "timeout" for one in starts),
        "different_answers": len(answers) - len({task for task, _, _ in answers}),
        "slowest_s": round(slowest, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
