"""The headers of safetensors files, read and written without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

MOST_HEADER_BYTES: Final = 100 << 20  # what the format allows
FLOAT32_BYTES: Final = 4
LEAST_HEADER_BYTES: Final = 2048  # upstream's uploader takes a file of 1 KiB for metadata


class BrokenFileError(ValueError):
    """A file is not a whole safetensors file."""


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors. Raises BrokenFileError unless the file is whole, and OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
            raise BrokenFileError(f"{path.name} ends inside its header")
        text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in tensors.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise BrokenFileError(f"{path.name} has a header that can't be read: {error}") from error
    if size != 8 + length + end:
        raise BrokenFileError(f"{path.name} has {size} bytes instead of {8 + length + end}")
    return shapes


def write_zeros(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a file of fp32 tensors that are all zero."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = FLOAT32_BYTES
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(LEAST_HEADER_BYTES)
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
