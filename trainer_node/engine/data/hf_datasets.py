"""Data sets of the Hugging Face hub, by id: what they consist of, and their files on this machine.

`HF_ENDPOINT` names another hub, `HF_TOKEN` opens what is not public, `HF_HUB_OFFLINE` forbids to ask.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from huggingface_hub import DatasetInfo, HfApi, constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # httpx's own, whichever httpx the library uses
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from msgspec import Struct

from shared.errors import DataError, DataUnavailableError
from shared.files import write_atomically
from shared.json_files import read_json_if_possible
from trainer_node.engine.data.download import MAX_BYTES, fetch
from trainer_node.engine.data.splits import suffix_of, training_files

TIMEOUT_S = 10.0
PAUSES = (1.0, 3.0)  # before each further try
# Workers get no token of their node by themselves (docs/security.md).
TOKEN_ADVICE = (
    "set HF_TOKEN to a token of an account that may read it, and PODIUM_WORKER_ENVIRONMENT=HF_TOKEN so that "
    "workers get it"
)
INDEX = "files.json"
MOST_FILES = 2000
PUBLIC = "https://huggingface.co"


class Index(Struct, frozen=True):
    """What was downloaded: written when all of it is there."""

    repo: str
    revision: str
    files: list[str]


@cache
def is_reachable() -> bool:
    """Return whether the hub answers at all, asked thrice at the first call; a worker doesn't live long."""
    for pause_s in (*PAUSES, None):
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S / 2, follow_redirects=False)
            return True
        except OfflineModeIsEnabled:
            return False
        except HTTPError:
            if pause_s is not None:
                time.sleep(pause_s)
    return False


def download(
    repo: str, folder: Path, *, allow_private: bool, tick: Callable[[str], None] = lambda text: None
) -> list[Path]:
    """Return the training files of a data set in `folder`, from there if they are; all of one revision.

    Raises DataError: no training rows in a known format, or too large. Raises DataUnavailableError: no such
    data set, no access, or unreachable.
    """
    index = _index(folder)
    if index is None or index.repo != repo:
        index = _download(repo, folder, allow_private or _operators_own(), tick)
    return [folder / name for name in index.files]


def _download(repo: str, folder: Path, allow_private: bool, tick: Callable[[str], None]) -> Index:
    info = _info(repo)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    try:
        paths = training_files(sizes, info.card_data.get("configs") if info.card_data else None)
    except DataError as error:
        raise DataError(f"data set {repo} can't be used: {error}") from error
    total = sum(sizes[path] for path in paths)
    if total > MAX_BYTES or len(paths) > MOST_FILES:
        raise DataError(
            f"data set {repo} has {len(paths)} training files of {total / 1e9:.1f} GB together: "
            f"{MAX_BYTES / 1e9:.1f} GB is the most that data may have"
        )
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    left, names = MAX_BYTES, []
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths):
        url = hf_hub_url(repo, path, repo_type="dataset", revision=info.sha)
        names.append(f"{number:05d}{suffix_of(path)}")
        target = folder / names[-1]
        fetch(url, target, allow_private=allow_private, max_bytes=left, headers=headers, tick=tick)
        left -= target.stat().st_size
    index = Index(repo, info.sha or "", names)
    write_atomically(folder / INDEX, msgspec.json.encode(index))
    return index


def _index(folder: Path) -> Index | None:
    index = read_json_if_possible(folder / INDEX, Index)
    return index if index and all((folder / name).is_file() for name in index.files) else None


def _info(repo: str) -> DatasetInfo:
    for pause_s in (*PAUSES, None):
        try:
            return HfApi().dataset_info(repo, files_metadata=True, timeout=TIMEOUT_S)
        except GatedRepoError as error:
            raise DataUnavailableError(f"data set {repo} is gated: {TOKEN_ADVICE}") from error
        except HFValidationError as error:
            raise DataError(f"{repo} is no id of a data set: {error}") from error
        except RepositoryNotFoundError as error:
            what = f"the hub has no data set {repo}, or it is private"
            raise DataUnavailableError(f"{what}: {TOKEN_ADVICE}") from error
        except OfflineModeIsEnabled as error:
            raise DataUnavailableError(f"data set {repo} can't be read: HF_HUB_OFFLINE is set") from error
        except HTTPError as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 503
            if pause_s is None or (status < 500 and status != 429):
                reason = str(error).strip().partition("\n")[0]
                raise DataUnavailableError(
                    f"data set {repo} can't be read: {constants.ENDPOINT} doesn't answer as a hub: {reason}"
                ) from error
            time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


def _operators_own() -> bool:
    """Return whether the operator named a hub: then it may have a private address, like a file server."""
    return urlsplit(constants.ENDPOINT).netloc != urlsplit(PUBLIC).netloc
