"""Fetch Debian and PyPI packages with apt-get and pip and unpack them into the arena's cache.

Nothing is installed. The cache is $PODIUM_ARENA_CACHE or ~/.cache/podium/arena.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

COMMAND_S = 600.0  # for apt-get or pip, which wait for a mirror that is silent


def cache_folder() -> Path:
    """Return the cache folder; it may not exist yet."""
    given = os.environ.get("PODIUM_ARENA_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "podium" / "arena"


def _run(*command: str, folder: Path) -> None:
    """Run a command; RuntimeError if it fails or hangs."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)} is not done within {COMMAND_S:g} s") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")


def _fetch_debian(name: str, folder: Path) -> None:
    try:
        _run("apt-get", "download", name, folder=folder)
    except RuntimeError:
        _run("apt-get", "update", folder=folder)
        _run("apt-get", "download", name, folder=folder)
    for archive in folder.glob("*.deb"):
        _run("dpkg-deb", "-x", archive.name, ".", folder=folder)
        archive.unlink()
        (folder / "VERSION").write_text(archive.name + "\n", encoding="utf-8")


def _fetch_wheel(requirement: str, folder: Path) -> None:
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", ".")
    _run(*pip, requirement, folder=folder)
    for archive in folder.glob("*.whl"):
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
        archive.unlink()
        (folder / "VERSION").write_text(archive.name + "\n", encoding="utf-8")


def fetch(package: str, cache: Path) -> Path:
    """Return the folder of an unpacked package; fetch it first if the cache lacks it.

    A package is a Debian name ("wordnet-base") or a pinned PyPI wheel ("networkx==3.6.1").
    """
    folder = cache / "packages" / package
    if (folder / "VERSION").exists():
        return folder
    partial = cache / "packages" / f".{package}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (_fetch_wheel if "==" in package else _fetch_debian)(package, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
