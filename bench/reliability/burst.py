"""Send hundreds and thousands of signed offers at one moment while two slots are free, also without a broker.

    python -m bench burst     # about a minute

A real broker, two gateways that require signatures, two nodes with scripted workers. Each burst is signed
before it is sent, over up to 500 open connections (upstream's own limit), each with one request at a time.
Exactly two offers must be accepted, and every offer must get a response. The accepted ones are then started
and must end in results, which frees the slots for the next burst:

- 500 offers at one gateway, and 5,000
- 500 at two gateways in turn
- 500 and 5,000 while the broker is killed (kill -9) and restarted: an offer may then get a 503 with a
  reason, and is signed and sent again until it is decided

The last line is one JSON object. `violations` counts wrong numbers of acceptances, lost offers and unclear
refusals; `slow` names the bursts without a fault in which a response took over a second.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
from msgspec import Struct

from bench.fake_validator import requests
from bench.fake_validator.validator import OFFER, Validator, request_bytes, signed_headers
from bench.harness.burst_client import BurstClient, BurstRequest, Response
from bench.harness.fleet import GATEWAYS, Fleet
from bench.harness.signed_fleet import MINER, VALIDATOR, make_fleet, scripted_data, started, until
from shared.broker.bus import Bus
from shared.logs import set_up_logs

CONNECTIONS = 500
GOAL_S = 1.0
DECIDED_S = 40.0  # until every offer of a burst is decided, whatever the broker does
BACK_S = 40.0
PAUSE_S = 0.3
KILL_AFTER_S = 0.2


class Scene(Struct, frozen=True, kw_only=True):
    """One burst of offers."""

    name: str
    offers: int
    gateways: tuple[str, ...] = GATEWAYS[:1]
    kills: int = 0  # of the broker, during the burst


SCENES = (
    Scene(name="500 at one gateway", offers=500),
    Scene(name="5,000 at one gateway", offers=5000),
    Scene(name="500 at two gateways", offers=500, gateways=GATEWAYS),
    Scene(name="500, broker killed once", offers=500, kills=1),
    Scene(name="5,000 at two gateways, broker killed 3 times", offers=5000, gateways=GATEWAYS, kills=3),
)


class Outcome(Struct, kw_only=True):
    """Figures of one burst."""

    scene: Scene
    accepted: int
    statuses: Counter[int]
    slowest_s: float  # from a request's own sending to its response
    last_s: float  # from the beginning of the burst
    decided_s: float  # when every offer was decided, also those that were sent again
    findings: list[str]


class Burst:
    """Sends bursts to one fleet."""

    def __init__(self, fleet: Fleet, bus: Bus) -> None:
        self.fleet = fleet
        self.bus = bus

    def signed_requests(self, scene: Scene, kinds: Mapping[str, str]) -> list[BurstRequest]:
        """Return signed offers of tasks of these kinds, to the scene's gateways in turn."""
        signed_requests = []
        for number, (task, kind) in enumerate(kinds.items()):
            body = json.dumps(requests.offer(kind, task)).encode()
            request = request_bytes("POST", OFFER, signed_headers(VALIDATOR, MINER.address, body), body)
            gateway = scene.gateways[number % len(scene.gateways)]
            port = int(self.fleet.url(gateway).rpartition(":")[2])
            signed_requests.append(BurstRequest(task, port, request))
        return signed_requests

    async def one(self, scene: Scene) -> Outcome:
        """Send one burst, and again what was not decided; then complete the accepted tasks."""
        each_kind = itertools.cycle(requests.TEXT_KINDS)
        tasks = {str(uuid.uuid4()): kind for kind in itertools.islice(each_kind, scene.offers)}
        client = await self._ready(scene, tasks)
        killing = asyncio.create_task(self._kill(scene.kills))
        began = time.monotonic()
        answers = await asyncio.to_thread(client.send)
        decided = {answer.task: answer for answer in answers if answer.status == 200}
        findings = [finding for answer in answers for finding in unclear(answer, faults=scene.kills > 0)]
        if scene.kills:
            while len(decided) < len(tasks) and time.monotonic() - began < DECIDED_S:
                await asyncio.sleep(PAUSE_S)
                left = {task: kind for task, kind in tasks.items() if task not in decided}
                again = await asyncio.to_thread((await self._ready(scene, left)).send)
                findings += [finding for answer in again for finding in unclear(answer, faults=True)]
                decided |= {answer.task: answer for answer in again if answer.status == 200}
        await killing
        outcome = Outcome(
            scene=scene,
            accepted=sum(answer.accepted for answer in decided.values()),
            statuses=Counter(answer.status for answer in answers),
            slowest_s=max(answer.took_s for answer in answers),
            last_s=max(answer.after_s for answer in answers),
            decided_s=time.monotonic() - began,
            findings=findings,
        )
        if lost := len(tasks) - len(decided):
            outcome.findings.append(f"{lost} offers were never decided")
        if outcome.accepted != len(self.fleet.settings.slots):
            outcome.findings.append(f"{outcome.accepted} offers were accepted")
        accepted = [answer.task for answer in decided.values() if answer.accepted]
        await self.finish({task: tasks[task] for task in accepted}, outcome)
        return outcome

    async def _ready(self, scene: Scene, kinds: Mapping[str, str]) -> BurstClient:
        """Sign everything and open all connections."""
        signed_requests = await asyncio.to_thread(self.signed_requests, scene, kinds)
        return await asyncio.to_thread(BurstClient, signed_requests, min(CONNECTIONS, len(signed_requests)))

    async def _kill(self, kills: int) -> None:
        """Kill the broker `kills` times; the fleet restarts it."""
        for _ in range(kills):
            await asyncio.sleep(KILL_AFTER_S)
            self.fleet.members["broker"].signal(signal.SIGKILL)

    async def finish(self, kinds: Mapping[str, str], outcome: Outcome) -> None:
        """Start the accepted tasks as they were offered; all must end, so that both slots are free again."""
        async with aiohttp.ClientSession(self.fleet.url(GATEWAYS[0])) as session:
            upstream = Validator(session, VALIDATOR, MINER.address)
            data = scripted_data(self.fleet.folder, "short.json", steps=1, step_s=0.01)
            for task, kind in kinds.items():
                body = requests.start(kind, task, str(uuid.uuid4()), data)
                path = requests.START_PATHS[kind]

                async def begun(path: str = path, body: dict[str, Any] = body) -> bool:
                    return (await upstream.start(path, body)).status == 200

                await until(f"the start of {task}", begun, BACK_S)

            async def free() -> bool:
                async with session.get("/v1/slots") as reply:
                    if reply.status != 200:
                        return False
                    slots = (await reply.json())["slots"]
                return all(slot["live"] for slot in slots) and all(slot["state"] == "free" for slot in slots)

            await until("both slots to be free again", free, BACK_S)
            for task in kinds:
                async with session.get(f"/v1/tasks/{task}") as reply:
                    state = (await reply.json()).get("state")
                if state != "submitted":
                    outcome.findings.append(f"{task} was accepted and is {state}")


def unclear(answer: Response, *, faults: bool) -> list[str]:
    """Return findings about a response that is not a proper decision or 503."""
    if answer.status == 200:
        good = isinstance(answer.body, dict) and isinstance(answer.body.get("message"), str)
        return [] if good else [f"200 with {answer.body!r}"]
    if not faults:
        return [f"status {answer.status} while nothing was wrong: {answer.body!r}"]
    reason = answer.body.get("detail") if isinstance(answer.body, dict) else None
    return [] if answer.status == 503 and reason else [f"status {answer.status}: {answer.body!r}"]


async def measure(folder: Path) -> list[Outcome]:
    """Send every burst to one fleet."""
    fleet = make_fleet(folder)
    async with started(fleet) as bus:
        burst = Burst(fleet, bus)
        outcomes = []
        for scene in SCENES:
            outcomes.append(await burst.one(scene))
            report(outcomes[-1])
        return outcomes


def report(outcome: Outcome) -> None:
    """Print one burst."""
    print(
        f"{outcome.scene.name:46} accepted {outcome.accepted}  responses {dict(outcome.statuses)}"
        f"  slowest {outcome.slowest_s:.3f} s, last {outcome.last_s:.3f} s, all {outcome.decided_s:.2f} s",
        flush=True,
    )
    for finding, count in Counter(outcome.findings).most_common(5):
        print(f"  VIOLATION {count} x {finding}")


def main() -> int:
    """Run, print, fail on any violation."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    set_up_logs("console", "error", service="bench")
    with tempfile.TemporaryDirectory(prefix="podium-burst-") as folder:
        outcomes = asyncio.run(measure(Path(folder)))
    calm = [outcome for outcome in outcomes if not outcome.scene.kills]
    violations = sum(len(outcome.findings) for outcome in outcomes)
    figures = {
        "offers": sum(outcome.scene.offers for outcome in outcomes),
        "accepted": [outcome.accepted for outcome in outcomes],
        "slowest_s": {outcome.scene.name: round(outcome.slowest_s, 3) for outcome in outcomes},
        "last_s": {outcome.scene.name: round(outcome.last_s, 3) for outcome in outcomes},
        "slow": [outcome.scene.name for outcome in calm if outcome.slowest_s > GOAL_S],
        "violations": violations,
    }
    print(json.dumps(figures))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
