"""Download a data file over https without letting its URL reach into private networks.

Every address that a host name resolves to is checked, and the connection goes to a checked address, not to
the name again: a name server that answers differently the second time gains nothing. Each redirect is checked
again.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from shared.errors import DataError, DataUnavailableError, EngineError
from shared.files import is_disk_full
from shared.messages.runs import ErrorCode

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_BYTES = 2_200_000_000  # upstream's own files end at 2.147 GB
TIMEOUT_S = 30.0  # of one connect, handshake or read
TOTAL_S = 1800.0  # of one download
PAUSES = (1.0, 2.0, 5.0, 15.0, 30.0)  # before each further try: a host may be restarting
REDIRECTS = 5
GONE = (404, 410)  # for everyone; with 403 others may have come before a signed URL expired
PIECE = 1 << 20
HEADERS = {"Accept-Encoding": "identity", "User-Agent": "podium"}
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
ASIS = "!#$%&'()*+,/:;=?@[]~"  # of a URL's path and query: what is quoted already stays so
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # carries an IPv4 address in its last 32 bits


class Limits(NamedTuple):
    """What one download may take, all tries together."""

    bytes: int
    stop_at: float  # monotonic
    tick: Callable[[str], None]  # called whenever bytes have come, with what has come so far

    def look(self, name: str, doing: str) -> None:
        """Say what is being done. Raises DataUnavailableError once the time is over."""
        self.tick(doing)
        if time.monotonic() > self.stop_at:
            raise DataUnavailableError(f"{name}: not downloaded within {TOTAL_S / 60:.0f} minutes")


class _Watched(io.RawIOBase):
    """A connection's bytes, with a look at the limits for each read: head, lengths of chunks and body.

    A server that sends a byte now and then delays the end of a line or a piece, but not these looks.
    """

    def __init__(self, raw: io.RawIOBase, name: str, limits: Limits) -> None:
        self.raw, self.name, self.limits, self.size = raw, name, limits, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        count = self.raw.readinto(buffer)
        self.size += count or 0
        self.limits.look(self.name, f"{self.size / 1e6:.0f} MB of {self.name} downloaded")
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Transient(Exception):
    """A failure that another try may not meet."""


def is_url(source: str) -> bool:
    """Return whether a data reference must be downloaded."""
    return source.lower().startswith(("https://", "http://"))


def public_name(source: str) -> str:
    """Return a data reference without a URL's user and query, whose signature is a secret."""
    if not is_url(source):
        return source
    try:
        parts = urlsplit(source)
    except ValueError:  # brackets that are no IPv6 address
        return "a malformed URL"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def is_public(address: str) -> bool:
    """Return whether an IP address is public, also where it is an IPv4 address inside an IPv6 one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def resolve(host: str, port: int, *, allow_private: bool) -> list[str]:
    """Return all addresses of a host. Raises DataError if one is private, _Transient on a name failure."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise _Transient(f"can't resolve {host}: {error}") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    private = [address for address in addresses if not is_public(address)]
    if private and not allow_private:
        raise DataError(
            f"the data's host {host} has the private address {private[0]}; "
            "if that is your own server, set PODIUM_ALLOW_PRIVATE_URLS=true"
        )
    return addresses


def fetch(
    url: str,
    target: Path,
    *,
    allow_private: bool,
    max_bytes: int = MAX_BYTES,
    headers: Mapping[str, str] = NO_HEADERS,
    tick: Callable[[str], None] = lambda text: None,
) -> None:
    """Write what `url` holds to `target`, in pieces, with a `tick` whenever bytes come.

    `headers` go to the URL's own host only, never to one that it redirects to: they may hold a token.
    Raises DataError (refused address, not found, too large), DataUnavailableError (refused by the server,
    unreachable at every try, too slow) or EngineError(DISK_FULL).
    """
    limits = Limits(max_bytes, time.monotonic() + TOTAL_S, tick)
    for attempt, pause_s in enumerate([*PAUSES, None], 1):
        try:
            _fetch_once(url, target, allow_private, limits, headers)
            return
        except (_Transient, http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError) as error:
            if pause_s is None or time.monotonic() > limits.stop_at:
                raise DataUnavailableError(
                    f"can't download {public_name(url)} ({attempt} tries): {error or type(error).__name__}"
                ) from error
            time.sleep(pause_s)
        except OSError as error:
            if is_disk_full(error):
                raise EngineError(ErrorCode.DISK_FULL, f"no space for the data in {target.parent}") from error
            raise DataUnavailableError(f"can't download {public_name(url)}: {error}") from error


def _fetch_once(
    url: str, target: Path, allow_private: bool, limits: Limits, headers: Mapping[str, str]
) -> None:
    origin = _origin(url)
    for _ in range(REDIRECTS + 1):
        connection, path = _connect(url, allow_private, limits)
        own = headers if _origin(url) == origin else NO_HEADERS
        with closing(connection):
            connection.request("GET", path, headers={**HEADERS, **own})
            with _response(connection, public_name(url), limits) as response:
                response.begin()
                if response.status in (301, 302, 303, 307, 308):
                    url = _target(url, response.headers.get("Location", ""))
                    continue
                answer = f"the server answers {response.status} {response.reason}"
                if response.status >= 500 or response.status == 429:
                    raise _Transient(answer)
                if response.status != 200:
                    kind = DataError if response.status in GONE else DataUnavailableError
                    raise kind(f"{public_name(url)}: {answer}")
                _store(response, target, public_name(url), limits)
                return
    raise DataError(f"{public_name(url)}: more than {REDIRECTS} redirects")


def _response(connection: http.client.HTTPConnection, name: str, limits: Limits) -> http.client.HTTPResponse:
    """Return the response to the request that was sent, not yet begun, whose every read keeps the limits."""
    response = http.client.HTTPResponse(connection.sock, method="GET")
    response.fp = io.BufferedReader(_Watched(response.fp.detach(), name, limits))
    return response


def _origin(url: str) -> tuple[str, str, int]:
    parts, host, port = _split(url)
    return parts.scheme, host, port


def _target(url: str, location: str) -> str:
    """Return where a redirect leads."""
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise DataError(f"{public_name(url)} redirects to a malformed URL") from error


def _connect(url: str, allow_private: bool, limits: Limits) -> tuple[http.client.HTTPConnection, str]:
    """Return a connection to a checked address of the URL's host, and the path to ask for."""
    parts, host, port = _split(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and allow_private):
        raise DataError(
            f"data must come over https, not {parts.scheme}: {public_name(url)}; "
            "PODIUM_ALLOW_PRIVATE_URLS=true allows http as well"
        )
    addresses = resolve(host, port, allow_private=allow_private)
    raw = _open(addresses, port, public_name(url), limits)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S)
        try:
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
        except OSError:
            raw.close()
            raise
    else:
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        connection.sock = raw
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return connection, quote(target, safe=ASIS)


def _split(url: str) -> tuple[SplitResult, str, int]:
    """Return a URL, its host and its port. Raises DataError if it has none that could be used."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise DataError(f"not a usable URL: {public_name(url)}") from error
    if not host:
        raise DataError(f"not a usable URL: {public_name(url)}")
    return parts, host, port or (443 if parts.scheme == "https" else 80)


def _open(addresses: list[str], port: int, name: str, limits: Limits) -> socket.socket:
    failure: OSError | None = None
    for address in addresses:  # a name may have hundreds that don't answer, each for TIMEOUT_S
        limits.look(name, f"connecting to {address} port {port}")
        try:
            return socket.create_connection((address, port), timeout=TIMEOUT_S)
        except OSError as error:
            failure = error
    raise _Transient(f"no connection to {', '.join(addresses)} port {port}: {failure}")


def _store(response: http.client.HTTPResponse, target: Path, name: str, limits: Limits) -> None:
    too_large = DataError(f"{name} is larger than {limits.bytes / 1e9:.1f} GB, the most that data may have")
    if response.length is not None and response.length > limits.bytes:
        raise too_large
    expected, size = response.length, 0
    with target.open("wb") as file:
        while piece := response.read(PIECE):
            size += len(piece)
            if size > limits.bytes:
                raise too_large
            file.write(piece)
    if expected is not None and size != expected:
        raise _Transient(f"the connection broke after {size} of {expected} bytes")
