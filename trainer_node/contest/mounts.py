"""Where upstream's runtime mounts things, and where the runner may write. Pure.

All that must survive renames lies next to the submission, on its file system: a rename is then atomic, and a
hard link costs nothing. Caches and temporary files lie on the container's own disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from msgspec import Struct

from trainer_node.contest.arguments import ContestTask

# Set before the worker starts: without them a hub call waits for a network that is not there.
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


class Mounts(Struct, frozen=True):
    """Every path of one task."""

    model: Path
    data: Path
    submission: Path
    work: Path  # run folders; next to the submission
    scratch: Path  # caches and temporary files

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that keep libraries offline, and their files in the scratch folder."""
        places = {
            "HOME": "home",
            "TMPDIR": "tmp",
            "HF_HOME": "hf",
            "XDG_CACHE_HOME": "cache",
            "TRITON_CACHE_DIR": "triton",
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
        }
        return OFFLINE | {name: str(self.scratch / folder) for name, folder in places.items()}


def mounts_of(task: ContestTask) -> Mounts:
    """Return the paths of a task."""
    root = Path(task.root)
    folder = root / "app" / "checkpoints" / task.task_id
    return Mounts(
        model=root / "cache" / "models" / flat(task.model),
        data=root / "cache" / "datasets" / f"{task.task_id}_train_data.json",
        submission=folder / task.expected_repo_name,
        work=folder / f".podium-{task.expected_repo_name}",
        scratch=root / "tmp" / "podium",
    )


def flat(model: str) -> str:
    """Return the name of a model's folder: a hub id without its slash."""
    return model.replace("/", "--")
