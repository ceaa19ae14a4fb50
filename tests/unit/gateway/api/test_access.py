"""Who is let in: the rules, without a socket; and which sockets need tokens at all."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from gateway.api.access import Access, Guard, guard_of
from gateway.api.tokens import Tokens
from gateway.errors import ForeignRequestError, UnauthorizedError
from shared.errors import SettingsError
from shared.settings_sources import load_settings

TOKEN = "0123456789abcdef"
LOCAL = {"Host": "127.0.0.1:7999"}


def guard(tmp_path: Path, *, tokens: bool, loopback: bool = True, metrics_open: bool = False) -> Guard:
    file = tmp_path / "tokens"
    file.touch(0o600)
    file.write_text(f"me: {TOKEN}\n")
    return Guard(Tokens(file) if tokens else None, loopback=loopback, metrics_open=metrics_open)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:7999", "127.9.9.9", "[::1]:7999", "[::1]", ""]
)
def test_without_tokens_this_machine_is_let_in(tmp_path: Path, host: str) -> None:
    assert guard(tmp_path, tokens=False).admit(Access.TOKEN, {"Host": host} if host else {}) == ""


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Host": "evil.example"}, "'evil.example'"),
        ({"Host": "127.0.0.1.evil.example:7999"}, "not for a loopback address"),
        ({"Host": "localhost.evil.example"}, "not for a loopback address"),
        ({"Host": "192.168.1.7:7999"}, "not for a loopback address"),
        ({"Host": "[fe80::1]:7999"}, "not for a loopback address"),
        (LOCAL | {"X-Forwarded-For": "8.8.8.8"}, "through a proxy"),
        (LOCAL | {"Forwarded": "for=8.8.8.8"}, "through a proxy"),
    ],
)
def test_without_tokens_a_rebound_name_or_a_proxy_is_not(
    tmp_path: Path, headers: dict[str, str], said: str
) -> None:
    open_guard = guard(tmp_path, tokens=False)
    for access in (Access.TOKEN, Access.METRICS):
        with pytest.raises(ForeignRequestError, match=said):
            open_guard.admit(access, headers)
    assert open_guard.admit(Access.OPEN, headers) == ""


def test_with_tokens_only_a_token_counts(tmp_path: Path) -> None:
    closed = guard(tmp_path, tokens=True)
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert closed.admit(Access.TOKEN, {"Host": "any", "Authorization": f"{scheme} {TOKEN}"}) == "me"
    for given in (None, "", TOKEN, f"Basic {TOKEN}", "Bearer ", f"Bearer {TOKEN}x", f"Bearer{TOKEN}"):
        headers = LOCAL | ({} if given is None else {"Authorization": given})
        with pytest.raises(UnauthorizedError, match="PODIUM_API_TOKEN_FILE") as caught:
            closed.admit(Access.TOKEN, headers)
        assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "loopback", "metrics_open", "headers", "open_"),
    [
        (True, True, False, LOCAL, True),
        (True, True, False, LOCAL | {"Forwarded": "x"}, False),
        (True, True, False, LOCAL | {"Authorization": "Bearer wrong-wrong-wrong"}, False),
        (True, False, False, LOCAL, False),
        (True, False, False, {"Authorization": f"Bearer {TOKEN}"}, True),
        (True, False, True, {}, True),
        (False, True, False, LOCAL, True),
        (False, True, True, {"Host": "prometheus.example"}, True),
    ],
)
def test_who_may_read_the_metrics(
    tmp_path: Path, tokens: bool, loopback: bool, metrics_open: bool, headers: dict[str, str], open_: bool
) -> None:
    it = guard(tmp_path, tokens=tokens, loopback=loopback, metrics_open=metrics_open)
    if open_:
        it.admit(Access.METRICS, headers)
    else:
        with pytest.raises(UnauthorizedError):
            it.admit(Access.METRICS, headers)


def test_a_socket_that_others_reach_needs_tokens(tmp_path: Path) -> None:
    (tmp_path / "t").touch(0o600)
    (tmp_path / "t").write_text(TOKEN)
    with socket.create_server(("0.0.0.0", 0)) as anywhere, socket.create_server(("127.0.0.1", 0)) as here:
        assert guard_of(load_settings({}), here).tokens is None
        # the socket counts, not the setting: a parent may have passed it
        with pytest.raises(SettingsError, match=r"0\.0\.0\.0 with /v1 open to everyone: make a token"):
            guard_of(load_settings({}, gateway_host="127.0.0.1"), anywhere)
        assert guard_of(load_settings({}, api_token_file=str(tmp_path / "t")), anywhere).tokens is not None
