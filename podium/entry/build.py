"""Write an entry: the runner and the engine, the Dockerfiles, pinned requirements, licence and notice."""

from __future__ import annotations

import shutil
from pathlib import Path

from msgspec import Struct

import shared
from podium.entry import texts
from podium.entry.requirements import pinned
from podium.entry.sources import PACKAGES, needed_files
from shared.errors import SettingsError
from shared.planning.profiles import resolve
from shared.version import version


class EntryOptions(Struct, frozen=True, kw_only=True):
    """What the operator decides about an entry."""

    license: Path
    notice: Path
    profiles: tuple[str, ...] = ("auto", "lora_r16")
    torch_args: str = ""
    base_image: str = "python:3.11-slim-bookworm"


def source_root() -> Path:
    """Return the folder that this Podium's packages lie in."""
    assert shared.__file__ is not None
    return Path(shared.__file__).parents[1]


def build(folder: Path, options: EntryOptions) -> list[Path]:
    """Write an entry into an empty folder, or over an earlier entry; return the files, relative to it.

    Files of the operator's own stay. Raises SettingsError if the folder holds something else or can't be
    written, or if a file that the operator names can't be read.
    """
    legal = {"LICENSE": _text(options.license, "--license"), "NOTICE": _text(options.notice, "--notice")}
    for profile in options.profiles:
        resolve(profile)
    _refuse_another(folder)
    for package in PACKAGES:
        shutil.rmtree(folder / package, ignore_errors=True)
    root, written = source_root(), dict[Path, str]()
    for path in needed_files(root):
        written[path] = (root / path).read_text(encoding="utf-8")
    image = texts.dockerfile(options.profiles, options.torch_args, options.base_image)
    written |= {Path(name): image for name in texts.DOCKERFILES}
    written |= {Path(name): text for name, text in legal.items()}
    written[Path("requirements.txt")] = "\n".join(pinned()) + "\n"
    written[Path("README.md")] = texts.readme(version(), options.profiles)
    written |= {Path(name): texts.IGNORED for name in (".gitignore", ".dockerignore")}
    try:
        for path, text in written.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{folder} can't be written: {error}") from error
    return sorted(written)


def _refuse_another(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise SettingsError(f"{folder} is not a folder")
    if any(path.name != ".git" for path in folder.iterdir()) and not (folder / texts.DOCKERFILES[0]).exists():
        raise SettingsError(f"{folder} holds something else than an entry; name an empty or a new folder")


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{option}: {error}") from error
