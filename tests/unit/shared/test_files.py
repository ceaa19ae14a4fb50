"""Files are replaced whole or not at all; a folder's digest changes with any name or byte."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from shared.files import (
    append_lines,
    digest_of,
    file_digest,
    files_in,
    folder_digest,
    open_private,
    sync,
    write_all,
    write_atomically,
)


def test_a_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "outcome.json"
    write_atomically(path, b"one")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"two")
    assert path.read_bytes() == b"one"


def test_a_kernel_that_takes_a_part_at_a_time_gets_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: whole(descriptor, data[:3]))
    with (tmp_path / "file").open("wb", buffering=0) as file:
        write_all(file.fileno(), b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_lines_after_a_cut_one_begin_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for before, after in ((b"", b"one\n"), (b"one\ntw", b"one\ntw\none\n"), (b"two\n", b"two\none\n")):
        path.write_bytes(before)
        with path.open("a+b", buffering=0) as file:
            append_lines(file.fileno(), b"one\n")
        assert path.read_bytes() == after


def test_files_and_folders_can_be_synced(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    sync(tmp_path / "file")
    sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "none")


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"podium" * 1000)
    assert file_digest(path) == hashlib.sha256(b"podium" * 1000).hexdigest()


def make(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_same_content_same_digest_whatever_the_order(tmp_path: Path) -> None:
    one = make(tmp_path / "1", {"a": "x", "sub/b": "y"})
    other = make(tmp_path / "2", {"sub/b": "y", "a": "x"})
    assert folder_digest(one) == folder_digest(other)


@pytest.mark.parametrize(
    "files",
    [{"a": "x", "sub/b": "z"}, {"a": "x", "sub/c": "y"}, {"a": "x"}, {"a": "x", "sub/b": "y", "d": ""}],
)
def test_any_difference_shows(tmp_path: Path, files: dict[str, str]) -> None:
    one = make(tmp_path / "1", {"a": "x", "sub/b": "y"})
    assert folder_digest(one) != folder_digest(make(tmp_path / "2", files))


def test_a_folder_far_away_has_the_digest_it_had_here(tmp_path: Path) -> None:
    """Its files come in the order of paths, not of strings: `sub/b` before `sub-1`."""
    make(tmp_path, {"sub/b": "1", "sub-1": "2", "sub.x": "3"})
    lines = [
        f"{path.relative_to(tmp_path).as_posix()}:{file_digest(path)}\n"
        for path in sorted(path for path in tmp_path.rglob("*") if path.is_file())
    ]
    assert lines[0].startswith("sub/b:")
    known = hashlib.sha256("".join(lines).encode()).hexdigest()
    away = dict(line.strip().split(":") for line in reversed(lines))
    assert folder_digest(tmp_path) == digest_of(away) == known


def test_nothing_to_hash_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        folder_digest(tmp_path / "none")
    with pytest.raises(ValueError, match="nothing to hash"):
        folder_digest(tmp_path)


@pytest.mark.parametrize("mode", [None, 0o666])
def test_a_private_file_is_private_whatever_it_was(tmp_path: Path, mode: int | None) -> None:
    path = tmp_path / "file"
    if mode is not None:
        path.write_bytes(b"before")
        path.chmod(mode)
    with open_private(path, empty=True) as file:
        file.write(b"text")
    path.chmod(0o644)
    with open_private(path, empty=False) as file:
        assert file.read() == b"text"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_private_file_that_must_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_private(tmp_path / "file", empty=False)


def test_a_part_of_a_folder_that_can_not_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest of the rest would be one of another folder."""
    (tmp_path / "whole").write_text("read")
    part = tmp_path / "part"
    part.mkdir()
    (part / "file").write_text("not read")
    assert sorted(files_in(tmp_path)) == [part / "file", tmp_path / "whole"]
    scan = os.scandir

    def refuse(path: Path) -> object:  # as a test that runs as root is refused nothing
        if Path(path) == part:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        folder_digest(tmp_path)
