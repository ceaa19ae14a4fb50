"""`podium up` as a user runs it: real broker, gateway, nodes and engine on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from podium.client import Client
from shared.processes import command_line
from trainer_node.worker.slot_lock import SlotLock

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ORACLE = Path(__file__).parents[1] / "data" / "oracle"
MODEL = "org/tiny-0.001B"
JOB_S = 120.0
ENVIRONMENT = {
    "PODIUM_MODELS": json.dumps({MODEL: str(ORACLE / "base")}),
    "PODIUM_DATASET_ROOTS": str(ORACLE),
    "PODIUM_DEADLINE_MARGIN_S": "1",
    "PODIUM_HARDWARE": "cpu",
    "PODIUM_THREADS": "1",
}
COLUMNS = {"field_instruction": "instruct", "field_input": "input", "field_output": "output"}


class Machine:
    """One data folder, and what was launched on it."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.url = ""
        self.launched: list[subprocess.Popen[str]] = []
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PODIUM_")}
        self.environment = inherited | ENVIRONMENT | {"OMP_NUM_THREADS": "1"} | variables

    @property
    def client(self) -> Client:
        return Client(self.url)

    def up(self) -> subprocess.Popen[str]:
        arguments = ["up", "--data-dir", str(self.data), "--port", "0", "--nats-port", "0"]
        process = subprocess.Popen(
            [sys.executable, "-m", "podium", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.launched.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"gateway +(http://\S+)", line):
                self.url = match[1]
            if line.startswith("data "):
                return process
        raise AssertionError(f"podium up ended with {process.wait()}")

    def fields(self, task: str, **changes: Any) -> dict[str, Any]:
        """A good offer, but for `changes`."""
        return {
            "task_id": task,
            "task_type": "InstructTextTask",
            "model": MODEL,
            "hours_to_complete": JOB_S / 3600,
            "dataset": "instruct.json",
            "dataset_type": COLUMNS,
        } | changes

    def offer(self, task: str) -> dict[str, Any]:
        """Offer a good job with the command; its decision."""
        file = self.folder / f"{task}.json"
        file.write_text(json.dumps(self.fields(task)))
        decision: dict[str, Any] = json.loads(self.podium("offer", str(file), "--json").stdout)
        return decision

    def podium(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "podium", *arguments, "--url", self.url],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def pid(self, service: str) -> int:
        return int(json.loads((self.data / "run" / f"{service}.json").read_text())["pid"])

    def workers(self) -> list[int]:
        """The holders of both slots' locks, except nodes: they take one to test it, or for a new worker."""
        holders = [pid for slot in "ab" for pid in SlotLock(self.data / "nodes" / slot).holders()]
        return [pid for pid in holders if command_line(pid)[-1:] != ["trainer_node"]]

    def until(self, condition: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"not after {limit_s:g} s: {what}"
            time.sleep(0.2)

    @contextmanager
    def taken_down(self) -> Iterator[None]:
        """Stop everything at the end; no worker may be left."""
        try:
            yield
        finally:
            for process in self.launched:
                if process.poll() is None:
                    process.terminate()
                process.wait(timeout=90)
                if process.stdout is not None:
                    process.stdout.close()
        assert self.workers() == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real chromium; without one the test is skipped."""
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    chromium = next(filter(None, found), None)
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    if find_spec("playwright") is None:
        pytest.skip("playwright is not installed: make setup")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    with machine.taken_down():
        yield machine


@pytest.fixture(scope="module")
def machine_with() -> Iterator[Callable[..., Machine]]:
    """A function that makes a machine, of given folder and settings, that lasts for a whole file of tests."""
    with ExitStack() as stack:

        def make(folder: Path, **variables: str) -> Machine:
            machine = Machine(folder, **variables)
            stack.enter_context(machine.taken_down())
            return machine

        yield make
