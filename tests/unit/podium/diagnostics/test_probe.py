"""What the gathering of facts does with a disk that it may not read."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from podium.diagnostics.probe import Folder, probe_folders
from shared.settings import Settings


def test_a_disk_that_can_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(path: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(shutil, "disk_usage", stale)
    (first, *_) = probe_folders(Settings(data_dir=str(tmp_path)))
    assert first == Folder(str(tmp_path), 0, 0, "Stale file handle")


def test_folders_that_are_not_there_yet_are_left_out(tmp_path: Path) -> None:
    assert [each.path for each in probe_folders(Settings(data_dir=str(tmp_path)))] == [str(tmp_path)]
