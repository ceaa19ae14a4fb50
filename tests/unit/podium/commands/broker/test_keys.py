"""Keys and certificates: made once, kept, rotated one by one, never shown."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from podium.__main__ import main
from podium.security.certificates import names_in
from podium.security.permissions import common, users
from shared.broker.credentials import identify, read_seed, seed_path
from shared.errors import SettingsError
from shared.settings_sources import load_settings


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_keys_are_made_once_and_rotated_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PODIUM_SLOTS", "a,b")
    assert main(["keys", str(tmp_path)]) == 0
    first = content(tmp_path)
    assert first["gateway/api.token"] == b"podium: " + first["metrics/podium.token"] + b"\n"
    assert len([name for name in first if name.endswith(".nk")]) == len(users(("a", "b")))
    for name in first:
        secret = name.endswith((".nk", ".key", ".token"))
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == (0o600 if secret else 0o644), name
    assert main(["keys", str(tmp_path)]) == 0
    assert content(tmp_path) == first

    assert main(["keys", str(tmp_path), "--rotate", "trainer-a"]) == 0
    changed = {name for name, data in content(tmp_path).items() if first[name] != data}
    assert changed == {"trainer-a/trainer-a.nk", "trainer-a/trainer-a.pub", "broker/users.conf"}
    token_file = tmp_path / "gateway" / "api.token"
    token_file.write_text(token_file.read_text() + "dashboard: 0123456789abcdef\n")
    old = token_file.read_text().splitlines()
    assert main(["keys", str(tmp_path)]) == 0
    assert token_file.read_text().splitlines() == old
    assert main(["keys", str(tmp_path), "--rotate", "api"]) == 0
    new = token_file.read_text().splitlines()
    assert new[0] != old[0]
    assert new[1:] == old[1:]
    assert (tmp_path / "metrics" / "podium.token").read_text() == new[0].removeprefix("podium: ")
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["podium.token"]  # no key
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600

    assert main(["keys", str(tmp_path), "--host", "bus.example"]) == 1  # not in the certificate that is there
    assert main(["keys", str(tmp_path), "--host", "bus.example", "--rotate", "broker"]) == 0
    assert names_in((tmp_path / "broker" / "server.crt").read_bytes()) == {
        *("nats", "localhost", "127.0.0.1", "bus.example")
    }
    assert main(["keys", str(tmp_path), "--rotate", "nobody"]) == 1
    said = "".join(capsys.readouterr())
    assert "can't rotate nobody" in said
    assert old[0].split()[1] not in said
    assert new[0].split()[1] not in said
    for path in tmp_path.rglob("*.nk"):
        assert read_seed(path).seed not in said
        assert read_seed(path).seed not in repr(read_seed(path))


def test_a_seed_that_was_taken_elsewhere_is_not_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PODIUM_SLOTS", "a")
    assert main(["keys", str(tmp_path)]) == 0
    known = (tmp_path / "broker" / "users.conf").read_text()
    seed_path(tmp_path, "trainer-a").unlink()
    assert main(["keys", str(tmp_path)]) == 0
    assert not seed_path(tmp_path, "trainer-a").exists()
    assert (tmp_path / "broker" / "users.conf").read_text() == known


@pytest.mark.parametrize("text", ["", "SUAAAA", "\n\n", "# podium user: gateway\n"])
def test_a_file_that_holds_no_seed_is_told_without_showing_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.nk"
    file.touch(0o600)
    file.write_text(text)
    with pytest.raises(SettingsError, match="holds no seed of a user") as caught:
        identify(load_settings({}, nats_nkey_seed_file=str(file)), "gateway")
    assert "SUAAAA" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_an_absent_seed_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"gateway.nk can't be read: No such file"):
        identify(load_settings({}, nats_nkey_seed_file=str(tmp_path)), "gateway")


@pytest.mark.parametrize(
    ("published", "subscribed", "both"),
    [
        ("a.*.*", "a.b.*", "a.b.*"),
        ("a.b.*", "a.>", "a.b.*"),
        ("a.b", "a.>", "a.b"),
        ("a.b.*", "a.c.*", None),
        ("a", "a.>", None),
        ("a.b", "a.b.c", None),
    ],
)
def test_what_two_patterns_have_in_common(published: str, subscribed: str, both: str | None) -> None:
    assert common(published, subscribed) == both
