"""One repository on a Hugging Face hub, through huggingface_hub, with a clear error for every failure.

Nothing is repeated here but single uploads, by the library: the node that asked tries again, and looks first.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, get_session, hf_hub_url, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from shared.files import digest_of

HOUSEKEEPING: Final = frozenset({".gitattributes"})  # what a hub puts into a new repository by itself
CHANGED: Final = frozenset({409, 412})  # a commit refused because it is not on top of the newest one
BUSY: Final = frozenset({408, 429, 500, 502, 503, 504})
WHOLE: Final = 0.9  # of a submission's bytes, at least so many are in large files
PATIENCE_S: Final = 30  # longest pause before an upload is repeated that a server may ask for


class HubError(Exception):
    """The hub didn't do it; the text says what and why."""


class Counted(httpx2.SyncByteStream):
    """A request's body that counts its bytes."""

    def __init__(self, body: Iterable[bytes], sent: list[int]) -> None:
        self.body, self.sent = body, sent

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.body:
            self.sent.append(len(piece))
            yield piece


class HubClient(httpx2.Client):
    """The library's HTTP client, with timeouts, and without its repetitions of anything but uploads.

    `sent` gets the sizes of what is uploaded.
    """

    def __init__(self, sent: list[int], **options: Any) -> None:
        super().__init__(**options)
        self.sent = sent

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send one request. Raises HubError for what the library would try again, for minutes or for ever."""
        upload = request.method == "PUT"
        if upload:
            assert isinstance(request.stream, Iterable)
            request.stream = Counted(request.stream, self.sent)
        try:
            response = super().send(request, **options)
        except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
            if upload:
                raise
            raise HubError(f"no answer from {request.url.host}: {error!r}") from error
        pause = response.headers.get("Retry-After", "0")
        if response.status_code in BUSY and not (upload and pause.isdigit() and int(pause) <= PATIENCE_S):
            asked = f", try again in {pause} s" if pause != "0" else ""
            raise HubError(f"{request.url.host} answers {response.status_code}{asked}")
        return response


class Session:
    """One repository, for as long as one request takes."""

    ERRORS = (HubError, HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError)

    def __init__(self, url: str, token: str, repository: str, silence_s: float) -> None:
        self.api = HfApi(endpoint=url, token=token, library_name="podium")
        self.token = token
        self.repository = repository
        self.sent: list[int] = []
        set_client_factory(lambda: HubClient(self.sent, timeout=silence_s, follow_redirects=True))

    def find(self, title: str) -> tuple[str, str] | str | None:
        """Return the commit with this title and its digest; else the newest commit, if it holds nothing yet.

        None = no such repository. Raises HubError if the repository holds something that is not the task's.
        """
        try:
            commits = self.api.list_repo_commits(self.repository)
        except RepositoryNotFoundError as error:
            if error.response.status_code != 404:  # 401 is also the answer to an invalid token
                raise
            return None
        ours = [commit.commit_id for commit in commits if commit.title == title]
        if ours:
            return ours[-1], self._digest(ours[-1])
        if not commits:
            raise HubError(f"{self.repository} has no commit yet")
        if other := self._files(commits[0].commit_id):
            raise HubError(
                f"{self.repository} holds something that is not this task's ({min(other)} and "
                f"{len(other) - 1} more): move it away, nothing is overwritten"
            )
        return commits[0].commit_id

    def create(self, *, private: bool) -> None:
        """Make the repository unless it exists."""
        self.api.create_repo(self.repository, private=private, exist_ok=True)

    def upload(self, folder: Path) -> tuple[list[CommitOperationAdd], tuple[int, float]]:
        """Upload every large file that the hub doesn't have; return what to commit, and what was sent.

        That is the bytes and the seconds it took, hashing included; none if the hub had a part of it, or if
        the other protocol sent it.
        """
        begun = time.monotonic()
        additions = [
            CommitOperationAdd(path.relative_to(folder).as_posix(), path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        self.api.preupload_lfs_files(self.repository, additions)
        size, sent = sum(one.upload_info.size for one in additions), sum(self.sent)
        is_whole = sent >= WHOLE * size  # small files are a part of the commit
        return additions, (sent, time.monotonic() - begun) if is_whole else (0, 0.0)

    def commit(self, title: str, additions: list[CommitOperationAdd], *, parent: str) -> None:
        """Make the commit if `parent` is still the newest one; look afterwards what is there."""
        try:
            self.api.create_commit(self.repository, additions, commit_message=title, parent_commit=parent)
        except HfHubHTTPError as error:
            if error.response.status_code not in CHANGED:
                raise

    def explain(self, error: Exception) -> str:
        """Return a sentence that says what went wrong and what to do."""
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if isinstance(cause, HfHubHTTPError) and cause.response.request.method == "PUT":
            return f"an upload was answered {status}: {(cause.server_message or '')[:500]}"
        if status == 401:
            return "the hub refuses the token (401): check hub_token_file or HF_TOKEN"
        if status == 403:
            return f"the token may not write to {self.repository} (403): it needs the right to write there"
        if isinstance(cause, HfHubHTTPError):
            said = cause.server_message or str(cause)
            return f"the hub answers {status}: {said[:500]}"
        return str(cause) if isinstance(cause, HubError) else f"{type(cause).__name__}: {str(cause)[:500]}"

    def _files(self, commit: str) -> dict[str, str | None]:
        """Return every file of a commit, and its sha256 where the hub keeps it."""
        entries = self.api.list_repo_tree(self.repository, recursive=True, revision=commit)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {
            file.path: file.lfs.sha256 if file.lfs else None
            for file in files
            if file.path not in HOUSEKEEPING
        }

    def _digest(self, commit: str) -> str:
        files = self._files(commit)
        return digest_of({path: known or self._hash(commit, path) for path, known in files.items()})

    def _hash(self, commit: str, path: str) -> str:
        """Hash of a small file, fetched: of those the hub keeps another one."""
        url = hf_hub_url(self.repository, path, revision=commit, endpoint=self.api.endpoint)
        response = get_session().get(url, headers={"authorization": f"Bearer {self.token}"})
        return hashlib.sha256(response.raise_for_status().content).hexdigest()
