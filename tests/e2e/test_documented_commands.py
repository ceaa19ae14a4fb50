"""Every `podium` command that a document names is run, as a reader would; what can't be run here says why."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.conftest import ORACLE

ROOT = Path(__file__).parents[2]
SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
# A log of what was done, and of what has changed: their commands need not be those of today.
LOGS = {"CHANGELOG.md", "docs/experiments.md"}
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md"))
)
CODE = re.compile(r"(?s:```.*?```)|`[^`\n]+`|^    \S.*$", re.MULTILINE)
COMMAND = re.compile(r"(?<![\w./=-])(?:\.venv/bin/)?podium ((?:[a-z]|--\w).*)")

# A command as a document has it -> the words that are run for it. In the order in which they are run.
RUN: dict[str, str] = {
    "--version": "--version",
    "env": "env",
    "settings": "settings",
    "settings --set": "settings --set",
    "settings --markdown": "settings --markdown",
    "doctor": "doctor",
    "doctor --strict": "doctor --strict",
    "train examples/offer.json --preview 2": "",
    "train examples/offer.json --hours 4m --out run1": "train examples/offer.json --hours 45s --out run1",
    "plan --params 8B --hardware 4xH100-80GB --hours 4": "",
    "plan --params 8B --hardware 4xH100-80GB --hours 4 --profile maximum_accuracy": "",
    "plan --params 14B --hardware 2xH100-80GB --hours 4": "",
    "plan --params 1B --hardware 1xH100-80GB --hours 1 --task-type DpoTask": "",
    "policy list": "",
    "keys DIR": "keys keys",
    "keys DIR --rotate trainer-a": "keys keys --rotate trainer-a",
    "offer examples/offer.json --task-id first": "",
    "offer examples/offer.json --task-id smoke": "",
    "offer examples/offer.json": "",
    "status": "",
    "jobs list": "",
    "requeue TASK": "requeue smoke",
    "drain SLOT": "drain B",
    "resume SLOT": "resume B",
    "cancel TASK": "cancel smoke",
    "watch first": "",
    "logs -f first": "",
    "logs -f TASK": "logs -f first",
    "logs smoke": "",
    "logs -f wordnet-nouns-1": "logs -f first",
    "track": "track --once",
    "track --once": "",
    "track --run run1": "",
    "jobs inspect first": "",
    "jobs inspect smoke": "",
    "jobs inspect TASK": "jobs inspect first",
    "drain a --wait": "",
    'drain a --reason "new power supply" --wait': "",
    "resume a": "",
    "scores import FILE": "scores import scores.json",
    "scores show": "",
    "policy replay TRACE": "policy replay data/decisions.jsonl",
    "policy replay TRACE --policy maximum_accuracy --policy expected_value --slots 2": (
        "policy replay data/decisions.jsonl --policy maximum_accuracy --policy expected_value --slots 2"
    ),
}
# Exit codes other than 0 that are right here.
ENDS = {
    "doctor": {0, 1},  # this machine may have troubles of its own
    "doctor --strict": {0, 1},
    "requeue TASK": {0, 1},  # it may have ended meanwhile
    "cancel TASK": {0, 1},
    "watch first": {0, 1},
    "offer examples/offer.json": {0, 3},  # both slots may be busy
}
# What is not run, and why. A name alone stands for each mention of it without arguments.
NOT_RUN = {
    "up": "it serves all the others here",
    "demo": "CI runs it: ten minutes",
    "demo --compare": "twenty minutes; tests/unit/podium/demo",
    "doctor --self-test": "it tests GPUs; `python -m bench gpu --dry` runs it",
    "bootstrap": "tests/integration/test_permissions.py",
    "keys /keys --rotate trainer-a": "in compose's volume; the same as with DIR",
    "train examples/offer.json --hours 10m --out run1": "the same as with 4m",
    "train examples/offer.json --preview": "the same as with 2",
    "train --kl-coef": "tests/engine/test_pipeline.py",
    "restore <file>": "tests/integration/gateway/test_mirror.py",
    "restore FILE": "tests/integration/gateway/test_mirror.py",
    "entry build entry --license upstream/LICENSE* --notice upstream/NOTICE*": "needs upstream's repository",
    "entry check entry --license upstream/LICENSE* --notice upstream/NOTICE*": "needs upstream's repository",
    "scores import - --hotkey 5F": "reads what curl fetches from upstream",
    "score --adapter run1/export": "tests/engine/test_score_command.py",
}


def commands_of(document: str) -> set[str]:
    """The commands in a document's code, without the words that explain them."""
    found = set[str]()
    for block in CODE.finditer((ROOT / document).read_text()):
        for line in block[0].strip("`").replace("\\\n", " ").splitlines():
            for match in COMMAND.finditer(re.split(r"\s+#", line)[0]):
                plain = re.split(r"\s{3,}|[|;&]|\s--\s", match[1])[0].strip()
                found.add(re.sub(r"\s+", " ", plain).strip(" `.,"))
    return found


MENTIONED = {command: name for name in DOCUMENTS if name not in LOGS for command in commands_of(name)}


def is_a_name(command: str) -> bool:
    """Whether it is only the name of a command, as prose mentions it."""
    return re.fullmatch(r"[a-z]+( [a-z]+)?", command) is not None


def test_each_command_of_the_documents_is_run_or_says_why_not() -> None:
    assert len(MENTIONED) > 40
    left = {
        command: document
        for command, document in MENTIONED.items()
        if command not in RUN and command not in NOT_RUN and not is_a_name(command)
    }
    assert left == {}
    gone = [command for command in (*RUN, *NOT_RUN) if command not in MENTIONED and not is_a_name(command)]
    assert gone == []


@pytest.fixture(scope="module")
def machine(machine_with: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A live `podium up` whose SmolLM is a tiny model, in a folder with the examples."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(ROOT / "examples")
    score = {"task_id": "first", "quality_score": 3.0, "test_loss": 1.0}
    (folder / "scores.json").write_text(json.dumps([score]))
    machine = machine_with(
        folder,
        PODIUM_MODELS=json.dumps({SMOLLM: str(ORACLE / "base")}),
        PODIUM_DATASET_ROOTS=str(ROOT / "examples"),
        PODIUM_PROFILE="lora_r16",
    )
    machine.up()
    machine.environment |= {
        "PODIUM_GATEWAY_PORT": str(urlsplit(machine.url).port),
        "PODIUM_DATA_DIR": str(machine.data),
        "COLUMNS": "160",
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    return machine


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(1500)
def test_the_documents_commands_run(machine: Any) -> None:
    troubles, ran = [], set[str]()
    for command, instead in RUN.items():
        words = shlex.split(instead or command)
        if shlex.join(words) in ran:  # two documents, one command
            continue
        ran.add(shlex.join(words))
        done = subprocess.run(
            [sys.executable, "-m", "podium", *words],
            cwd=machine.folder,
            env=machine.environment | {"PYTHONPATH": os.pathsep.join([str(ROOT)])},
            capture_output=True,
            text=True,
            timeout=900,
        )
        print(f"{done.returncode}  podium {shlex.join(words)}")
        if done.returncode not in ENDS.get(command, {0}) or "Traceback" in done.stderr:
            troubles.append(f"{command}: {done.returncode}\n{done.stdout[-500:]}{done.stderr[-500:]}")
    assert troubles == []
    view = machine.client.task("first")
    assert (view.state, Path(view.result.artifact or "").is_dir()) == ("submitted", True)
