"""What upstream's runtime prepares for a container: a private folder with its mounts, and its arguments."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Final

from msgspec import Struct, to_builtins

from bench.tournament.tasks import CASES, MODELS, Row, rows_of

TASK: Final = "0b5c0f4e-7d1a-4c55-9a53-2f6f3c1f9a10"
HOTKEY: Final = "5F3sa2TJ"
REPO: Final = f"tournament-tourn_1-{TASK}-{HOTKEY}"
SALT: Final = "bench"


class Mounted(Struct, frozen=True, kw_only=True):
    """A task's folder on this machine, and what its container is started with."""

    root: Path
    case: str
    model: Path  # under its anonymous name
    test: Path  # rows that the container never sees
    arguments: list[str]
    environment: dict[str, str]

    @property
    def submission(self) -> Path:
        """Return the folder that is uploaded."""
        return self.root / "app" / "checkpoints" / TASK / REPO

    @property
    def runs(self) -> Path:
        """Return the folder of the runner's own run folders."""
        return self.submission.with_name(f".podium-{REPO}") / "runs"

    @property
    def staged(self) -> Path:
        """Return where the runner puts a submission together."""
        return self.submission.with_name(f".staged-{REPO}")


def anonymous(model: str) -> str:
    """Return the name that upstream gives a model: 16 hexadecimal digits of a salted hash."""
    return hashlib.sha256(f"{SALT}:{model}".encode()).hexdigest()[:16]


def prepare(root: Path, case_name: str, model: str, rows: int, hours: float) -> Mounted:
    """Write a task's mounts below `root`; return them."""
    case, name = CASES[case_name], anonymous(model)
    place = root / "cache" / "models" / name
    shutil.copytree(MODELS[model], place)
    config = json.loads((place / "config.json").read_text())
    config.pop("_name_or_path", None)  # all that upstream scrubs
    (place / "config.json").write_text(json.dumps(config))
    train, test = rows_of(case, rows)
    _write(root / "cache" / "datasets" / f"{TASK}_train_data.json", train)
    _write(root / "test.json", test)
    stats = root / "cache" / f"baseline_stats_{TASK}_{HOTKEY}.json"
    stats.write_text(json.dumps({"dataset": {"num_records": len(train)}, "training": {"init_loss": None}}))
    (root / "app" / "checkpoints").mkdir(parents=True)
    (root / "tmp").mkdir()
    given = {
        "--task-id": TASK,
        "--model": name,
        "--dataset": "https://data.example/train.json?signature=x",
        "--dataset-type": json.dumps(to_builtins(case.dataset_type)),
        "--task-type": case.task_type.value,
        "--file-format": "s3",
        "--expected-repo-name": REPO,
        "--hours-to-complete": repr(hours),
    }
    return Mounted(
        root=root,
        case=case_name,
        model=place,
        test=root / "test.json",
        arguments=[part for pair in given.items() for part in pair],
        environment={
            "WANDB_MODE": "offline",
            "BASELINE_STATS_PATH": f"/cache/{stats.name}",
            **case.environment,
        },
    )


def _write(path: Path, rows: list[Row] | Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
