"""Make the files with the broker's users, certificates and the API token."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import nkeys

from gateway.api.tokens import FILE as TOKEN_FILE
from gateway.api.tokens import parse_tokens
from podium.security.permissions import configuration, users
from shared.broker.credentials import GATEWAY, Identity, read_seed, seed_path, seed_text
from shared.errors import PodiumError
from shared.files import write_atomically

if TYPE_CHECKING:
    from podium.security.certificates import Pair

BROKER = "broker"
CA = "ca"
API = "api"
OWN_TOKEN = "podium"  # name of the token made here
METRICS = "metrics"  # folder with what Prometheus needs, and no key
METRICS_TOKEN = "podium.token"
USERS_FILE = "users.conf"
CA_FILE = "ca.crt"
HOSTS = ("nats", "localhost", "127.0.0.1")
SECRET = 0o600
PUBLIC = 0o644


def make_users(folder: Path, slots: Iterable[str], *, rotate: Iterable[str] = ()) -> list[Path]:
    """Make missing users' keys and the broker's list of all users; return the written paths.

    Raises PodiumError if `rotate` has an unknown name, or a file can't be written.
    """
    everybody, rotate, made = users(slots), set(rotate), list[Path]()
    if unknown := rotate - {user.name for user in everybody} - {BROKER, CA, API}:
        known = ", ".join([user.name for user in everybody] + [BROKER, CA, API])
        raise PodiumError(f"can't rotate {', '.join(sorted(unknown))}; known are {known}")
    public = {}
    try:
        _folder(folder, 0o755)
        for user in everybody:
            path = seed_path(folder, user.name)
            pub = path.with_suffix(".pub")
            if user.name in rotate or not (path.exists() or pub.exists()):
                identity = new_identity(user.name)
                made += _write(pub, identity.public_key + "\n", PUBLIC)
                made += _write(path, seed_text(identity), SECRET)
            public[user.name] = read_seed(path).public_key if path.exists() else pub.read_text().strip()
            _write(pub, public[user.name] + "\n", PUBLIC)
        made += _write(folder / BROKER / USERS_FILE, configuration(everybody, public), PUBLIC)
    except OSError as error:
        raise _cant_write(folder, error) from error
    return made


def make_certificates(
    folder: Path, hosts: Iterable[str], names: Iterable[str], *, rotate: Iterable[str] = ()
) -> list[Path]:
    """Make the CA and the broker's certificate if missing; give every user the CA's certificate.

    Raises PodiumError if the broker's certificate lacks one of `hosts`, or a file can't be written.
    """
    try:
        from podium.security import certificates  # its library takes 0.3 s to import
    except ImportError as error:
        raise PodiumError(f"certificates need a library: pip install '.[broker]' ({error})") from error
    ca, broker, rotate, made = folder / CA, folder / BROKER, set(rotate), list[Path]()
    wanted = list(dict.fromkeys([*HOSTS, *hosts]))
    try:
        if CA in rotate or not (ca / CA_FILE).exists():
            made += _write_pair(ca, "ca", certificates.make_ca("Podium"))
            rotate.add(BROKER)
        authority = (ca / CA_FILE).read_bytes()
        if BROKER in rotate or not (broker / "server.crt").exists():
            pair = certificates.Pair(authority, (ca / "ca.key").read_bytes())
            made += _write_pair(broker, "server", certificates.make_server(pair, wanted))
        elif lacking := set(wanted) - certificates.names_in((broker / "server.crt").read_bytes()):
            raise PodiumError(
                f"the broker's certificate lacks {', '.join(sorted(lacking))}; "
                f"use --rotate {BROKER} with every --host to make a new one"
            )
        for name in (BROKER, *names):
            made += _write(folder / name / CA_FILE, authority.decode(), PUBLIC)
    except OSError as error:
        raise _cant_write(folder, error) from error
    return made


def make_api_token(folder: Path, *, rotate: Iterable[str] = ()) -> list[Path]:
    """Make a token for /v1 if there is none; keep all other lines. Return the written paths.

    Prometheus gets the file's first token in a folder of its own: next to the file is the gateway's seed.
    Raises SettingsError if the existing file is not a token file, and PodiumError if it can't be written.
    """
    path = folder / GATEWAY / TOKEN_FILE
    try:
        text = path.read_text() if path.exists() else ""
        if API in rotate or not parse_tokens(text, str(path)):
            others = [line for line in text.splitlines() if not line.startswith(f"{OWN_TOKEN}:")]
            text = "\n".join([f"{OWN_TOKEN}: {secrets.token_urlsafe(32)}", *others]) + "\n"
        first = parse_tokens(text, str(path))[0].secret
        return _write(path, text, SECRET) + _write(folder / METRICS / METRICS_TOKEN, first, SECRET)
    except (OSError, UnicodeDecodeError) as error:
        raise _cant_write(folder, error) from error


def new_identity(user: str) -> Identity:
    """Make a user with a new, random key."""
    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return Identity(user, seed.decode())


def _write_pair(folder: Path, name: str, pair: Pair) -> list[Path]:
    """Write the key first, so that an existing certificate always has its key."""
    key = _write(folder / f"{name}.key", pair.key.decode(), SECRET)
    return key + _write(folder / f"{name}.crt", pair.certificate.decode(), PUBLIC)


def _write(path: Path, text: str, mode: int) -> list[Path]:
    """Write a file atomically, never more readable than `mode`; skip it if the content is the same."""
    if path.exists() and path.read_text() == text:
        return []
    _folder(path.parent, 0o700)
    write_atomically(path, text.encode(), mode)
    _give_to_owner(path)
    return [path]


def _give_to_owner(path: Path) -> None:
    """Give a file that root wrote to its folder's owner: a service reads its own key, and no other."""
    folder = path.parent.stat()
    if os.geteuid() == 0 and folder.st_uid != 0:
        os.chown(path, folder.st_uid, folder.st_gid)


def _folder(path: Path, mode: int) -> None:
    path.mkdir(parents=True, exist_ok=True, mode=mode)


def _cant_write(folder: Path, error: OSError | UnicodeDecodeError) -> PodiumError:
    if isinstance(error, UnicodeDecodeError):
        return PodiumError(f"a file in {folder} is not text: {error}")
    return PodiumError(f"{error.filename or folder} can't be used: {error.strerror}")
