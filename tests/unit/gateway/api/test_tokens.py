"""Token files: read, hashed, read again, never shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.api import tokens
from gateway.api.tokens import Tokens, own_token, parse_tokens
from shared.errors import SettingsError
from shared.settings_sources import load_settings

ONE, TWO = "a" * 16, "B-._~+/=" * 4


def write(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text)
    os.utime(path, ns=(path.stat().st_mtime_ns + 1, path.stat().st_mtime_ns + 1))  # coarse clocks
    return path


def test_names_and_tokens_of_a_file(tmp_path: Path) -> None:
    tokens = Tokens(write(tmp_path / "t", f"# who\n\n  {ONE}\nup-stream: {TWO}\n"))
    assert tokens.owner(ONE) == ""
    assert tokens.owner(TWO) == "up-stream"
    for other in ("", "a" * 15, ONE + "a", f"up-stream: {TWO}", "\udce4" * 16, "\u00e4" * 16):
        assert tokens.owner(other) is None


@pytest.mark.parametrize(
    "line", ["short", "two words of a phrase", f"na me: {ONE}", f"{ONE}\u00e4", "x" * 513]
)
def test_a_line_that_is_no_token_is_named_and_not_shown(line: str) -> None:
    with pytest.raises(SettingsError, match="file, line 2 is not a token: it must have 16 or more") as caught:
        parse_tokens(f"{ONE}\n{line}\n", "file")
    assert line not in str(caught.value)
    assert ONE not in repr(parse_tokens(f"n:{ONE}", "file"))


@pytest.mark.parametrize("inside", [False, True])
def test_only_systemds_own_files_may_be_readable_by_a_group(
    inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its credentials show as 0440, and no advice could change that."""
    path = write(tmp_path / "t", ONE)
    path.chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path if inside else tmp_path / "elsewhere"))
    warned = list[str]()
    monkeypatch.setattr(tokens.log, "warning", lambda text, **_: warned.append(text))
    Tokens(path)
    assert warned == ([] if inside else ["the token file is readable by other users; chmod 600 it"])


@pytest.mark.parametrize(
    ("text", "said"), [("# nothing\n", "holds no token"), (None, "can't be read: No such")]
)
def test_a_file_without_a_token_is_told(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "t"
    if text is not None:
        write(path, text)
    with pytest.raises(SettingsError, match=said):
        Tokens(path)
    with pytest.raises(SettingsError, match=said):
        own_token(load_settings({}, api_token_file=str(path)))


async def test_a_changed_file_counts_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "t", ONE)
    tokens = Tokens(path)
    write(path, f"{TWO}\n")
    await tokens.refresh()
    assert (tokens.owner(ONE), tokens.owner(TWO)) == (None, "")
    write(path, "broken\n")
    await tokens.refresh()
    path.unlink()
    await tokens.refresh()
    assert tokens.owner(TWO) == ""
    write(path, "# nobody any more\n")
    await tokens.refresh()
    assert tokens.owner(TWO) is None


def test_a_command_sends_the_first_token(tmp_path: Path) -> None:
    assert own_token(load_settings({})) is None
    (tmp_path / "gateway").mkdir()
    write(tmp_path / "gateway" / "api.token", f"podium: {TWO}\nother: {ONE}\n")
    for named in (tmp_path, tmp_path / "gateway" / "api.token"):
        token = own_token(load_settings({}, api_token_file=str(named)))
        assert token is not None
        assert token.secret == TWO
