"""Who owns the keys that are made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from podium.security.key_files import make_users

SERVICE = 12345  # a user id


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_that_root_rotates_belongs_to_its_service(tmp_path: Path) -> None:
    make_users(tmp_path, ("a",))
    for path in (tmp_path / "trainer-a", *(tmp_path / "trainer-a").iterdir()):
        os.chown(path, SERVICE, SERVICE)
    before = (tmp_path / "trainer-a" / "trainer-a.nk").read_text()
    make_users(tmp_path, ("a",), rotate=["trainer-a"])
    seed = tmp_path / "trainer-a" / "trainer-a.nk"
    assert seed.read_text() != before
    assert (seed.stat().st_uid, seed.stat().st_gid) == (SERVICE, SERVICE)
    assert seed.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "gateway" / "gateway.nk").stat().st_uid == 0
