"""Bearer tokens of /v1: a file with one token per line; the gateway keeps only hashes in memory.

# each of these tokens may offer, cancel and requeue
podium: 4Wq...        the name appears in the log, the token never does
9xK...                a token without a name
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct

from gateway.watched_file import WatchedFile
from shared.errors import SettingsError
from shared.logs import TroubleLog, get_logger
from shared.settings import Settings

FILE: Final = "api.token"  # the name that `podium keys` uses, in the gateway's folder
SHORTEST: Final = 16  # characters; shorter ones could be guessed
LARGEST_FILE: Final = 1 << 20
POLL_S: Final = 1.0  # poll interval for changes of the file
_LINE = re.compile(rf"(?:([A-Za-z0-9_.@-]{{1,64}}):[ \t]*)?([A-Za-z0-9._~+/=-]{{{SHORTEST},512}})")

log = get_logger()


class Token(Struct, frozen=True):
    """One line of a token file. The secret is not in the repr."""

    secret: str
    name: str = ""

    def __repr__(self) -> str:
        return f"Token({self.name!r})"


class Tokens:
    """The accepted tokens; reloaded when the file changes."""

    def __init__(self, file: Path) -> None:
        """Read the file. Raises SettingsError if it is invalid or holds no token. Blocks."""
        self._file = WatchedFile(file, _read)
        self._trouble = TroubleLog()
        self._hashes: Mapping[bytes, str] = _hashed(_load(self._file) or [])
        if not self._hashes:
            raise SettingsError(f"api_token_file {file} holds no token; `podium keys` makes one")

    def owner(self, secret: str) -> str | None:
        """Return the name of a token, "" if it has none, None if it is unknown. Takes constant time."""
        presented, found = _hash(secret), None
        for known, name in self._hashes.items():
            if hmac.compare_digest(known, presented):
                found = name
        return found

    async def refresh(self) -> None:
        """Reload the file if it has changed. If the new one is invalid, keep the previous tokens."""
        try:
            found = await asyncio.to_thread(_load, self._file)
        except SettingsError as error:
            if self._trouble.is_new(error):
                log.error("keeping the previous API tokens", error=str(error))
            return
        self._trouble.over()
        if found is not None:
            self._hashes = _hashed(found)
            log.info("API tokens read", file=str(self._file.path), tokens=len(self._hashes))


def token_file(settings: Settings) -> Path | None:
    """Return the token file of the settings; the setting may also name a folder made by `podium keys`."""
    if not settings.api_token_file:
        return None
    path = Path(settings.api_token_file).expanduser()
    return path / "gateway" / FILE if path.is_dir() else path


def own_token(settings: Settings) -> Token | None:
    """Return the token that a command sends, the file's first; None without a file. Raises SettingsError."""
    path = token_file(settings)
    if path is None:
        return None
    tokens = _load(WatchedFile(path, _read))
    if not tokens:
        raise SettingsError(f"api_token_file {path} holds no token; `podium keys` makes one")
    return tokens[0]


def parse_tokens(text: str, where: str) -> list[Token]:
    """Parse the tokens of a file. Raises SettingsError that names the bad line, never its content."""
    tokens = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise SettingsError(
                f"{where}, line {number} is not a token: it must have {SHORTEST} or more letters, digits or "
                "._~+/=-, optionally after a name and a colon"
            )
        tokens.append(Token(match[2], match[1] or ""))
    return tokens


def _load(file: WatchedFile[list[Token]]) -> list[Token] | None:
    """Return the tokens if the file has changed, else None. Raises SettingsError. Blocks."""
    try:
        return file.read_if_changed()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SettingsError(f"api_token_file {file.path} can't be read: {reason}") from error


def _read(path: Path, status: os.stat_result) -> list[Token]:
    if status.st_size > LARGEST_FILE:
        raise SettingsError(f"api_token_file {path} is not a token file: it has {status.st_size} bytes")
    mode, text = stat.S_IMODE(status.st_mode), path.read_text()
    # systemd's credentials are the unit's alone, though the ACL that gives it access shows as a mode of 0440.
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if mode & 0o077 and not (credentials and path.is_relative_to(credentials)):
        log.warning(
            "the token file is readable by other users; chmod 600 it", path=str(path), mode=f"{mode:o}"
        )
    return parse_tokens(text, f"api_token_file {path}")


def _hashed(tokens: list[Token]) -> dict[bytes, str]:
    return {_hash(token.secret): token.name for token in tokens}


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).digest()
