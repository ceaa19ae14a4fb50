"""Authenticate this process and the broker to each other: NKey seed, private inbox, CA certificate.

A seed file made by `podium keys` names its user on the first line, so that a service that was given
another user's key can report it before it connects:

    # podium user: trainer-a
    SUA...
"""

from __future__ import annotations

import re
import ssl
import stat
from pathlib import Path
from typing import Final

import nkeys
from msgspec import Struct

from shared.errors import SettingsError
from shared.logs import get_logger
from shared.settings import Settings

ADMIN: Final = "admin"  # makes the streams; looks at everything
GATEWAY: Final = "gateway"
OPERATOR: Final = "operator"  # reads
UPSTREAM: Final = "upstream"  # asks with offers, nothing else
NOBODY: Final = "anonymous"  # of a broker without users

SEED_SUFFIX: Final = ".nk"
_OWNER = re.compile(r"# podium user: ([A-Za-z0-9_-]+)")

log = get_logger()


class Identity(Struct, frozen=True):
    """A user of the broker. The seed is secret: it is in no text that this struct becomes."""

    user: str
    seed: str

    @property
    def public_key(self) -> str:
        """Return the key by which the broker knows the user."""
        key: bytes = nkeys.from_seed(bytearray(self.seed.encode())).public_key
        return key.decode()

    def __repr__(self) -> str:
        return f"Identity({self.user!r})"


def trainer(slot: str) -> str:
    """Return the user name of a slot's nodes."""
    return f"trainer-{slot}"


def inbox_prefix(user: str) -> str:
    """Return the prefix of this user's inboxes; no other user may subscribe there."""
    return f"_INBOX_{user}"


def seed_path(keys: Path, user: str) -> Path:
    """Return where `podium keys` puts a user's seed: in a folder that can be handed over as a whole."""
    return keys / user / f"{user}{SEED_SUFFIX}"


def seed_text(identity: Identity) -> str:
    """Return the content of a seed file; other NATS tools read it too."""
    return f"# podium user: {identity.user}\n{identity.seed}\n"


def identify(settings: Settings, user: str | None) -> Identity | None:
    """Return the identity of a process that must be `user` (None: the user that the file names).

    None without authentication. Raises SettingsError if there is no readable seed, or it is another user's.
    """
    if not settings.nats_nkey_seed_file:
        return None
    path = Path(settings.nats_nkey_seed_file).expanduser()
    if path.is_dir():
        path = seed_path(path, user or OPERATOR)
    identity = read_seed(path)
    if user is None or identity.user == user:
        return identity
    if identity.user == NOBODY:
        return Identity(user, identity.seed)
    raise SettingsError(
        f"nats_nkey_seed_file {path} is the key of {identity.user}; the key of {user} is needed"
    )


def read_seed(path: Path) -> Identity:
    """Read one seed file; a file without an owner's name fits any user. Raises SettingsError."""
    try:
        lines = path.read_text().split("\n")
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise SettingsError(f"nats_nkey_seed_file {path} can't be read: {reason}") from error
    if mode & 0o077:
        log.warning("other users can read a seed file; chmod 600 it", path=str(path), mode=f"{mode:o}")
    user = next((match[1] for line in lines if (match := _OWNER.match(line))), NOBODY)
    seed = next((line.strip() for line in lines if line.strip() and not line.startswith("#")), "")
    identity = Identity(user, seed)
    try:
        if not identity.public_key.startswith("U"):
            raise ValueError("not a user's")
    except (nkeys.NkeysError, ValueError):  # not chained: its text may hold the seed
        raise SettingsError(
            f"nats_nkey_seed_file {path} holds no seed of a user; `podium keys` makes one"
        ) from None
    return identity


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return the context that verifies the broker's certificate; None = no TLS. Raises SettingsError."""
    if not settings.nats_ca_file:
        return None
    path = Path(settings.nats_ca_file).expanduser()
    try:
        return ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(path))
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror if not isinstance(error, ssl.SSLError) else "it holds no certificate"
        raise SettingsError(f"nats_ca_file {path} can't be used: {reason}") from error
