"""How messages are encoded and decoded: bytes that are no message raise a ValueError, whatever they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

import msgspec
from msgspec import Struct

T = TypeVar("T")


def encode(message: Struct) -> bytes:
    """Encode one message as JSON bytes."""
    return msgspec.json.encode(message)


@overload
def decoder(kind: type[T]) -> Callable[[bytes | str], T]: ...
@overload
def decoder(kind: Any) -> Callable[[bytes | str], Any]: ...
def decoder(kind: Any) -> Callable[[bytes | str], Any]:
    """Return the function that decodes JSON bytes as one kind of message.

    It raises ValueError: msgspec's errors, or UnicodeDecodeError.
    """
    decoded = msgspec.json.Decoder(kind).decode

    def decode_one(data: bytes | str) -> Any:
        try:
            return decoded(data)
        except RecursionError as error:  # a thousand brackets in a row, also in a field that is not known
            raise msgspec.DecodeError("the JSON is nested too deeply") from error

    return decode_one


@overload
def decode(data: bytes | str, kind: type[T]) -> T: ...
@overload
def decode(data: bytes | str, kind: Any) -> Any: ...
def decode(data: bytes | str, kind: Any) -> Any:
    """Decode JSON bytes as one kind of message. Raises ValueError, as `decoder` says."""
    return decoder(kind)(data)
