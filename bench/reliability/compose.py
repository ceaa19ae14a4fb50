"""Test the real compose file under faults: two jobs, and each kind of container goes down during them.

    python -m bench compose                        # with `docker-compose`, else `docker compose`
    python -m bench compose --compose "CMD ..."    # any other command that takes Compose's arguments

Builds and starts the services in a separate project and offers a job to each slot. When both have a
checkpoint: `kill -s KILL trainer-a` and its start, kill -9 of node b inside its container (Docker restarts
that one), `restart nats`, `restart gateway`. Then waits for both results, and reads each submission's digest
back in the container of its slot. The model is the tests' tiny one. Everything is removed at the
end. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from gateway.api.tokens import parse_tokens
from gateway.views.schemas import TaskView
from podium.client import ENDED, Client, Refusal
from shared.errors import PodiumError
from shared.messages.encoding import encode
from shared.messages.offers import DatasetType, Offer, TaskType
from shared.net import free_port

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests" / "data" / "oracle"
MODEL = "podium/base"  # the folder `base` of MODELS
JOB_S = 300.0  # each container imports torch again; on a loaded machine that takes a minute
START_S = 300.0
KILLED = 137
KILL_NODE = (
    "import os, signal; [os.kill(int(p), signal.SIGKILL) for p in os.listdir('/proc') if p.isdigit() "
    "and b'trainer_node\\0' == open(f'/proc/{p}/cmdline', 'rb').read()[-13:]]"
)
DIGEST = (
    "import pathlib; from shared.files import folder_digest; "
    "print(folder_digest(pathlib.Path('/artifacts/%s/submission')))"
)


class Verdict(Struct, kw_only=True):
    """The last line."""

    jobs: int = 0
    faults: int = 0
    submitted: int = 0
    wrong_digests: int = 0
    late: int = 0
    restarted_bystanders: int = 0  # containers that a fault of another one restarted
    back_s: dict[str, float] = {}
    attempts: list[int] = []
    resumes: list[int] = []
    violations: list[str] = []


class Project:
    """The compose file as one project, with a gateway port of its own."""

    def __init__(self, command: list[str], name: str, files: list[str]) -> None:
        self.command = [*command, "-p", name]
        for file in files:
            self.command += ["-f", file]
        self.port = free_port()
        self.environment = os.environ | {
            "PODIUM_GATEWAY_PORT": str(self.port),
            "PODIUM_MODELS_DIR": str(MODELS),
            "PODIUM_DATA_ROOT": str(ROOT / "examples"),
            "PODIUM_DEADLINE_MARGIN_S": "0",
        }
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = Client(self.url)

    def run(self, *arguments: str, timeout_s: float = 600.0, may_die: bool = False) -> str:
        """Run one Compose command; return its output. Raises PodiumError, unless it may be killed."""
        done = subprocess.run(
            [*self.command, *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode != 0 and not (may_die and done.returncode == KILLED):
            raise PodiumError(f"compose {' '.join(arguments)}: {(done.stderr or done.stdout)[-2000:]}")
        return done.stdout

    def python(self, service: str, code: str) -> str:
        """Run Python in a service's container."""
        return self.run("exec", "-T", service, "python", "-c", code).strip()

    def enter(self) -> None:
        """Take the gateway's token, once its keys are made."""
        text = self.python("gateway", "print(open('/keys/api.token').read())")
        self.client = Client(self.url, parse_tokens(text, "api.token")[0])

    def started_at(self, service: str) -> str:
        """Return when a service's container was last started."""
        container = self.run("ps", "-q", service).split()[0]
        inspect = ["docker", "inspect", "--format", "{{.State.StartedAt}}", container]
        return subprocess.run(inspect, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    def ready(self) -> bool:
        """Return whether the gateway decides on offers and both nodes send heartbeats."""
        try:
            return self.client.why_not_ready() is None and all(slot.live for slot in self.client.slots())
        except PodiumError:
            return False

    def views(self, tasks: list[str]) -> list[TaskView]:
        """Return the tasks as the gateway shows them; none while it is down."""
        try:
            found = {view.task: view for view in self.client.tasks()}
        except PodiumError:
            return []
        return [found[task] for task in tasks if task in found]

    def has_checkpoint(self, view: TaskView) -> bool:
        """Return whether a run has a checkpoint to resume from."""
        folder = f"/data/nodes/{view.slot}/runs/{view.task}/checkpoints"
        code = f"import pathlib; print(any(pathlib.Path({folder!r}).glob('step-*')))"
        return self.python(f"trainer-{view.slot}", code) == "True"


def say(text: str) -> None:
    """Print one line, flushed."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def until(what: str, condition: Callable[[], bool], limit_s: float) -> float:
    """Wait for a condition; how long it took. PodiumError after `limit_s`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > limit_s:
            raise PodiumError(f"waited {limit_s:g} s for {what}")
        time.sleep(0.25)
    return time.monotonic() - began


def offer(project: Project, task: str) -> str:
    """Have one job accepted; its token."""
    answer = project.client.offer(
        encode(
            Offer(
                task_id=task,
                task_type=TaskType.INSTRUCT,
                model=MODEL,
                model_params_count=140_000,
                hours_to_complete=JOB_S / 3600,
                dataset="wordnet/nouns_train.json",
                dataset_type=DatasetType(field_instruction="instruct", field_output="output"),
            )
        )
    )
    if isinstance(answer, Refusal) or not answer.accepted:
        raise PodiumError(f"{task} was not accepted: {answer}")
    return answer.task


FAULTS: dict[str, tuple[list[str], Callable[[Project], object]]] = {
    "kill -s KILL trainer-a": (
        ["trainer-b", "gateway", "nats"],
        lambda project: (project.run("kill", "-s", "KILL", "trainer-a"), project.run("start", "trainer-a")),
    ),
    "kill -9 node b": (
        ["trainer-a", "gateway", "nats"],
        # The container ends with its node, and this command with the container.
        lambda project: project.run("exec", "-T", "trainer-b", "python", "-c", KILL_NODE, may_die=True),
    ),
    "restart nats": (["trainer-a", "trainer-b", "gateway"], lambda project: project.run("restart", "nats")),
    "restart gateway": (
        ["trainer-a", "trainer-b", "nats"],
        lambda project: project.run("restart", "gateway"),
    ),
}


def drive(project: Project) -> Verdict:
    """Take two jobs through every fault; return what came of them."""
    verdict = Verdict()
    until("the services to be ready", project.ready, START_S)
    tasks = [offer(project, name) for name in ("compose-one", "compose-two")]
    verdict.jobs = len(tasks)
    until("both jobs to train", lambda: _all_train(project.views(tasks), len(tasks)), JOB_S)
    until("checkpoints", lambda: all(map(project.has_checkpoint, project.views(tasks))), JOB_S)
    for name, (bystanders, hit) in FAULTS.items():
        before = {service: project.started_at(service) for service in bystanders}
        say(name)
        hit(project)
        verdict.back_s[name] = round(until(f"everybody after {name}", project.ready, START_S), 2)
        verdict.faults += 1
        for service in bystanders:
            if project.started_at(service) != before[service]:
                verdict.restarted_bystanders += 1
                verdict.violations.append(f"{name} restarted {service}")
    until("results", lambda: _all_ended(project.views(tasks), len(tasks)), JOB_S + START_S)
    for view in project.views(tasks):
        judge(project, view, verdict)
    return verdict


def judge(project: Project, view: TaskView, verdict: Verdict) -> None:
    """Add one ended task to the verdict."""
    verdict.attempts.append(view.attempts)
    result = view.result
    if view.state != "submitted" or result is None:
        verdict.violations.append(f"{view.task} ended as {view.state}: {result.reason if result else ''}")
        return
    verdict.submitted += 1
    verdict.resumes.append(result.metrics.resumes if result.metrics else -1)
    if project.python(f"trainer-{view.slot}", DIGEST % view.task) != result.digest:
        verdict.wrong_digests += 1
        verdict.violations.append(f"{view.task}: what is stored has another digest than the result")
    if result.deadline_margin_s is None or result.deadline_margin_s < 0:
        verdict.late += 1
        verdict.violations.append(f"{view.task} is late by {-(result.deadline_margin_s or 0):.0f} s")


def _all_train(views: list[TaskView], count: int) -> bool:
    return len(views) == count and all(view.progress and view.progress.step > 0 for view in views)


def _all_ended(views: list[TaskView], count: int) -> bool:
    return len(views) == count and all(view.state in ENDED for view in views)


def compose_command() -> list[str]:
    """Docker Compose as it is installed here."""
    return ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]


def main() -> int:
    """Build, start, drive, take down; 1 if anything that must not happen did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compose", type=shlex.split, default=compose_command(), help="the Compose command")
    parser.add_argument("--project", default="podium-bench", help="the project's name")
    parser.add_argument("--file", action="append", default=[], help="compose files, if not the usual one")
    parser.add_argument("--keep", action="store_true", help="leave everything up at the end")
    args = parser.parse_args()
    project = Project(args.compose, args.project, args.file)
    try:
        say("building")
        project.run("build", timeout_s=3600)
        say("starting")
        project.run("up", "-d")
        project.enter()
        verdict = drive(project)
    except PodiumError as error:
        verdict = Verdict(violations=[str(error)])
        print(project.run("logs", "--tail", "40", "--no-color"))
    finally:
        if not args.keep:
            project.run("down", "-v", "-t", "30")
    for violation in verdict.violations:
        print("VIOLATION", violation)
    print(msgspec.json.encode(verdict).decode())
    return 1 if verdict.violations else 0


if __name__ == "__main__":
    sys.exit(main())
