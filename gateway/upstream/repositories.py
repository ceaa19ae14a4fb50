"""What this miner enters in contests: one repository for each kind of task, as upstream asks for it.

An answer enters the repository and costs a fee. So a kind that isn't configured is answered with 404, never
with another kind's repository, and so is an entry that upstream would exclude after the fee.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from msgspec import Struct

from gateway.upstream.contract import TrainingRepo
from shared.errors import PodiumError
from shared.messages.encoding import decode
from shared.settings import Settings
from shared.settings_sources import without_password

KINDS: Final = ("text", "image", "environment")
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
MOST_DATASETS: Final = 2


class NotEnteredError(PodiumError):
    """This miner enters nothing for a kind of task, or nothing that upstream would take."""


class WrongEntryError(NotEnteredError):
    """What the operator configured can't be read, or upstream would exclude it."""


class EnteredRepository(Struct, frozen=True, forbid_unknown_fields=True):
    """One kind's part of the file."""

    github_repo: str
    commit_hash: str
    github_token: str | None = None  # that may read a private repository, and nothing else
    requested_datasets: tuple[str, ...] = ()  # ids of upstream's list


def training_repo(settings: Settings, kind: str) -> TrainingRepo:
    """Return the repository for a kind of task. Raises NotEnteredError. Reads a file: use a thread."""
    if settings.training_repos_file is not None:
        entered = _read(Path(settings.training_repos_file).expanduser()).get(kind)
    elif kind == "text" and settings.training_repo and settings.training_commit:
        entered = EnteredRepository(settings.training_repo, settings.training_commit)
    else:
        entered = None
    if entered is None:
        raise NotEnteredError(
            f"no training repository for {kind} tasks: name it in the file of PODIUM_TRAINING_REPOS_FILE"
        )
    if wrong := objection(entered):
        raise WrongEntryError(f"the training repository for {kind} tasks would be excluded: {wrong}")
    return TrainingRepo(
        entered.github_repo,
        entered.commit_hash,
        entered.github_token,
        list(entered.requested_datasets) or None,
    )


def objection(entered: EnteredRepository) -> str | None:
    """Return why upstream would exclude an entry, or None."""
    if not COMMIT.fullmatch(entered.commit_hash):
        return f"commit_hash must be 40 hexadecimal digits in lower case, not {entered.commit_hash!r:.60}"
    if not entered.github_repo.startswith("https://"):
        return f"github_repo must be an https URL, not {without_password(entered.github_repo)!r:.200}"
    if len(entered.requested_datasets) > MOST_DATASETS:
        return f"requested_datasets may name at most {MOST_DATASETS}"
    return None


def _read(path: Path) -> dict[str, EnteredRepository]:
    """Return the file's content: kind -> repository. The error never shows a line of it: it holds tokens."""
    try:
        found = decode(path.read_bytes(), dict[str, EnteredRepository])
    except OSError as error:
        raise WrongEntryError(f"PODIUM_TRAINING_REPOS_FILE can't be read: {error}") from error
    except ValueError as error:
        raise WrongEntryError(f"{path} is not the JSON of training repositories: {error}") from error
    if unknown := sorted(found.keys() - set(KINDS)):
        raise WrongEntryError(f"{path} names {', '.join(unknown)}; the kinds are {', '.join(KINDS)}")
    return found


def faults(settings: Settings) -> list[str]:
    """Return what is wrong with the configured repositories, each fault once. Reads a file: use a thread."""
    found: dict[str, None] = {}
    for kind in KINDS:
        try:
            training_repo(settings, kind)
        except WrongEntryError as error:
            found[str(error)] = None
        except NotEnteredError:  # that is no fault
            continue
    return list(found)
