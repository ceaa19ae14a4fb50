"""The artifact store: one name per task, the first rename wins, what is read back is what counts."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from shared.files import folder_digest
from trainer_node.artifacts.disk import DamagedExportError, is_stored, store, stored_digest, submission


def make_export(folder: Path, text: str = "weights") -> tuple[Path, str]:
    (folder / "deep").mkdir(parents=True)
    (folder / "adapter.safetensors").write_text(text)
    (folder / "deep" / "config.json").write_text("{}")
    return folder, folder_digest(folder)


def put(store_folder: Path, export: Path, digest: str, node: str = "n1") -> str:
    return store(store_folder, "t", export, digest, node=node, must_hold=lambda: None)


def test_what_is_stored_is_read_back(tmp_path: Path) -> None:
    export, digest = make_export(tmp_path / "export")
    assert not is_stored(tmp_path / "store", "t")
    assert put(tmp_path / "store", export, digest) == digest
    assert is_stored(tmp_path / "store", "t")
    assert stored_digest(tmp_path / "store", "t") == digest
    assert [path.name for path in (tmp_path / "store" / "t").iterdir()] == ["submission"]


def test_the_first_one_is_kept(tmp_path: Path) -> None:
    first, digest = make_export(tmp_path / "first", "first")
    second, other = make_export(tmp_path / "second", "second")
    put(tmp_path / "store", first, digest)
    assert put(tmp_path / "store", second, other, node="n2") == digest
    assert (submission(tmp_path / "store", "t") / "adapter.safetensors").read_text() == "first"


def test_of_many_at_once_one_wins_and_all_name_it(tmp_path: Path) -> None:
    exports = [make_export(tmp_path / f"e{number}", str(number)) for number in range(8)]
    found: list[str] = []

    def run(number: int) -> None:
        found.append(put(tmp_path / "store", *exports[number], node=f"n{number}"))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {folder_digest(submission(tmp_path / "store", "t"))}
    assert [path.name for path in (tmp_path / "store" / "t").iterdir()] == ["submission"]


@pytest.mark.parametrize("damage", ["changed", "missing", "empty"])
def test_a_damaged_export_is_not_stored(tmp_path: Path, damage: str) -> None:
    export, digest = make_export(tmp_path / "export")
    if damage == "changed":
        (export / "adapter.safetensors").write_text("other")
    elif damage == "missing":
        export = tmp_path / "nowhere"
    else:
        export = tmp_path / "empty"
        export.mkdir()
    with pytest.raises(DamagedExportError):
        put(tmp_path / "store", export, digest)
    assert not is_stored(tmp_path / "store", "t")
    assert list((tmp_path / "store").glob("t/.*")) == []


def test_the_slot_must_still_be_held_at_the_rename(tmp_path: Path) -> None:
    export, digest = make_export(tmp_path / "export")

    def must_hold() -> None:
        raise PermissionError("fenced")

    with pytest.raises(PermissionError):
        store(tmp_path / "store", "t", export, digest, node="n", must_hold=must_hold)
    assert not is_stored(tmp_path / "store", "t")


def test_what_a_kill_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    export, digest = make_export(tmp_path / "export")
    left = tmp_path / "store" / "t" / ".incoming-n1"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    assert not is_stored(tmp_path / "store", "t")
    assert put(tmp_path / "store", export, digest) == digest


def test_another_file_system_is_copied_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_device(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    export, digest = make_export(tmp_path / "export")
    monkeypatch.setattr(os, "link", other_device)
    assert put(tmp_path / "store", export, digest) == digest
    inode = os.stat(submission(tmp_path / "store", "t") / "adapter.safetensors").st_ino
    assert inode != os.stat(export / "adapter.safetensors").st_ino
