"""What a validator would object to in an entry, each with what to do. Rules read files and run nothing."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

from podium.entry.sources import missing_modules
from podium.entry.texts import DOCKERFILES
from shared.errors import PodiumError
from shared.planning.profiles import PROFILES

MOST_FILE_BYTES: Final = 1 << 20
MOST_DATA_BYTES: Final = 64 << 10
MOST_BYTES: Final = 50 << 20  # with the history; a clone may take 60 s
MOST_LINE: Final = 1000  # characters; longer lines are minified or packed
GIT_TIMEOUT_S: Final = 30.0
PACKED: Final = {
    *(".pyc", ".pyo", ".bin", ".dll", ".so", ".exe", ".dylib", ".a", ".o"),
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".whl", ".egg", ".jar"),
}
WEIGHTS: Final = {".safetensors", ".gguf", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".npz", ".npy", ".pkl"}
DATA: Final = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt"}
DOWNLOADS: Final = re.compile(r"huggingface-cli\s+download|hf\s+download|snapshot_download|hf_hub_download")
HIDES: Final = re.compile(
    r"(?:exec|eval)\s*\(\s*(?:\w+\.)*(?:b64decode|decompress|loads|fromhex)\b|marshal\.loads"
)
SECRETS: Final = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|-----BEGIN [A-Z ]*PRIVATE KEY"
)


class Objection(Struct, frozen=True):
    """One thing that a validator would object to, and what to do."""

    what: str
    advice: str


class Repository(Struct, frozen=True):
    """An entry on disk: its folder and its files, relative to it, without git's own."""

    folder: Path
    files: list[Path]

    def text(self, path: Path) -> str | None:
        """Return a file's text; None if it is none, or a link to nothing."""
        try:
            data = (self.folder / path).read_bytes()
            return None if b"\0" in data else data.decode()
        except (OSError, UnicodeDecodeError):
            return None

    def holds(self, source: str) -> bool:
        """Return whether a COPY finds something in the context, which is the repository."""
        pattern = os.path.normpath(source.strip("/") or ".")
        inside = not pattern.startswith("..")
        return inside and (pattern == "." or any(self.folder.glob(pattern)))


def objections(folder: Path, license_file: Path | None, notice_file: Path | None) -> list[Objection]:
    """Return all objections to an entry; the files are upstream's own, to compare with."""
    found = Repository(folder, sorted(_files(folder)))
    return [
        *_of_dockerfiles(found),
        *_of_legal(found, "LICENSE", license_file),
        *_of_legal(found, "NOTICE", notice_file),
        *_of_requirements(found),
        *_of_content(found),
        *_of_code(found),
        *_of_git(folder),
    ]


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        if inside.parts[0] != ".git" and (path.is_file() or path.is_symlink()):
            yield inside


def _of_dockerfiles(found: Repository) -> Iterator[Objection]:
    there = [Path(name) for name in DOCKERFILES if Path(name) in found.files]
    if not there:
        yield Objection(
            f"there is no {DOCKERFILES[0]}", "run `podium entry build` again, or put the Dockerfile there"
        )
        return
    lines = (found.text(there[0]) or "").replace("\\\n", " ").splitlines()
    words = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not any(line[0].upper() == "FROM" for line in words):
        yield Objection(f"{there[0]} has no FROM", "name a base image")
    users = [line[1] for line in words if line[0].upper() == "USER" and len(line) > 1]
    if users and users[-1] not in ("root", "0", "root:root", "0:0"):
        yield Objection(
            f"{there[0]} runs as {users[-1]}",
            "remove USER: the container has no capabilities and only root may write to the volume",
        )
    started = [line for line in words if line[0].upper() == "ENTRYPOINT"]
    if not started:
        yield Objection(
            f"{there[0]} has no ENTRYPOINT", "validators append arguments to it: a CMD would be replaced"
        )
    elif not "".join(started[-1][1:]).startswith("["):
        yield Objection(
            f"{there[0]} has an ENTRYPOINT in shell form",
            "write it as a JSON list: a shell drops the arguments",
        )
    yield from _of_instructions(found, there[0], words)


def _of_instructions(found: Repository, path: Path, words: list[list[str]]) -> Iterator[Objection]:
    for line in words:
        sources = [word for word in line[1:-1] if not word.startswith("--")]
        if line[0].upper() in ("COPY", "ADD") and not any(word.startswith("--from") for word in line):
            for source in sources:
                if not found.holds(source):
                    yield Objection(
                        f"{path} copies {source}, which is not in the repository",
                        "the build context is the repository's root: add it, or remove the line",
                    )
        text = " ".join(line)
        if DOWNLOADS.search(text):
            yield Objection(
                f"{path} downloads a model: {text[:80]}", "remove it: models must not be part of the image"
            )
        for name in re.findall(r'PODIUM_CONTEST_PROFILES="?([^"]*)"?', text):
            for profile in name.split():
                if profile not in PROFILES:
                    yield Objection(
                        f"{path} names an unknown profile {profile!r}",
                        f"known profiles: {', '.join(sorted(PROFILES))}",
                    )


def _of_legal(found: Repository, name: str, upstream: Path | None) -> Iterator[Objection]:
    endings = ("", ".md") if name == "LICENSE" else ("", ".txt")
    there = [Path(name + ending) for ending in endings if Path(name + ending) in found.files]
    if not there:
        yield Objection(f"there is no {name}", f"copy upstream's {name} to the repository's root")
    elif upstream is not None:
        ours, theirs = (
            [line.rstrip() for line in text.splitlines()]
            for text in (found.text(there[0]) or "", upstream.read_text(encoding="utf-8"))
        )
        if ours != theirs:
            number = next(
                (n for n, (one, other) in enumerate(zip(ours, theirs, strict=False), 1) if one != other),
                min(len(ours), len(theirs)) + 1,
            )
            yield Objection(
                f"{there[0]} differs from {upstream} in line {number}", "copy it again: lines must be equal"
            )


def _of_requirements(found: Repository) -> Iterator[Objection]:
    path = Path("requirements.txt")
    if path not in found.files:
        return
    for line in (found.text(path) or "").splitlines():
        requirement = line.partition("#")[0].strip()
        if not requirement or requirement.startswith("-"):
            continue
        if "://" in requirement:
            yield Objection(
                f"requirements.txt installs from an address: {requirement[:80]}", "pin a release instead"
            )
        elif "==" not in requirement:
            yield Objection(
                f"requirements.txt doesn't pin {requirement}",
                "write name==version: every task builds the image again",
            )


def _of_content(found: Repository) -> Iterator[Objection]:
    total = 0
    for path in found.files:
        place = found.folder / path
        if place.is_symlink():
            if not place.resolve().is_relative_to(found.folder.resolve()):
                yield Objection(f"{path} is a link out of the repository", "copy the file")
            elif not place.exists():
                yield Objection(f"{path} is a link to nothing", "remove it, or add the file")
            continue
        size, kind = place.stat().st_size, path.suffix.lower()
        total += size
        if kind in PACKED or "__pycache__" in path.parts:
            yield Objection(f"{path} is packed or compiled", "remove it: it is taken for hidden code")
        elif kind in WEIGHTS:
            yield Objection(f"{path} holds weights", "remove it: pretrained models are not allowed")
        elif kind in DATA and size > MOST_DATA_BYTES:
            yield Objection(f"{path} may hold a data set ({size} bytes)", "remove it: rows are not allowed")
        elif size > MOST_FILE_BYTES:
            yield Objection(f"{path} is {size} bytes", f"keep it below {MOST_FILE_BYTES} bytes, or remove it")
        elif found.text(path) is None:
            yield Objection(f"{path} is not text", "remove it: only source code can be reviewed")
    total += sum(path.stat().st_size for path in (found.folder / ".git").rglob("*") if path.is_file())
    if total > MOST_BYTES:
        yield Objection(
            f"the repository has {total} bytes with its history",
            "start a new history (`git checkout --orphan`): a clone may take 60 s",
        )


def _of_code(found: Repository) -> Iterator[Objection]:
    for path in found.files:
        text = None if (found.folder / path).is_symlink() else found.text(path)
        if text is None:
            continue
        if SECRETS.search(text):
            yield Objection(f"{path} holds a secret", "remove it, also from the history, and revoke it")
        if path.suffix not in (".py", ".sh", ".js"):
            continue
        longest = max(map(len, text.splitlines()), default=0)
        if longest > MOST_LINE:
            yield Objection(
                f"{path} has a line of {longest} characters", "write it out: minified code is refused"
            )
        if HIDES.search(text):
            yield Objection(f"{path} runs code that it unpacks", "write the code out")
        if path.suffix == ".py":
            try:
                ast.parse(text)
            except (SyntaxError, ValueError) as error:
                yield Objection(f"{path} is not Python: {error}", "mend it")
    missing = missing_modules(found.folder)
    for line in missing[:5]:
        yield Objection(f"{line}, which is not in the repository", "run `podium entry build` again")
    if not (found.folder / "trainer_node" / "contest" / "__main__.py").is_file():
        yield Objection("the runner trainer_node/contest is missing", "run `podium entry build` again")


def _of_git(folder: Path) -> Iterator[Objection]:
    if not (folder / ".git").exists():
        yield Objection("it is not a git repository", "run `git init`, commit everything and push it")
        return
    if (folder / ".gitmodules").exists():
        yield Objection("it has submodules", "copy their files: validators don't fetch submodules")
    attributes = folder / ".gitattributes"
    if attributes.exists() and "filter=lfs" in attributes.read_text(errors="replace"):
        yield Objection("it uses git LFS", "commit the files themselves: validators would get pointers")
    status = _git(folder, "status", "--porcelain")
    if status:
        yield Objection(
            f"{len(status.splitlines())} files are not committed", "commit them: validators see commits only"
        )
    if not _git(folder, "rev-parse", "HEAD"):
        yield Objection("it has no commit", "commit everything")


def _git(folder: Path, *arguments: str) -> str:
    """Return git's output; empty if it fails. The operator's own hooks and settings stay out of it.

    Raises PodiumError if there is no git, or if it doesn't answer.
    """
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "-c", f"safe.directory={folder.resolve()}", *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PodiumError(f"git can't be run: {error}") from error
    return done.stdout.strip() if done.returncode == 0 else ""


def as_json(found: list[Objection]) -> str:
    """Return the objections as one line."""
    return json.dumps({"objections": [{"what": one.what, "advice": one.advice} for one in found]})
