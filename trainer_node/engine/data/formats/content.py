"""Find out what a data file is, regardless of its name: compressed, in another encoding, or not data."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
import tempfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from shared.errors import DataError
from trainer_node.engine.data.download import MAX_BYTES
from trainer_node.engine.data.row_set import RowSet

PIECE = 1 << 20
HEAD = 4096  # bytes by which a file is known
DEEPEST = 2  # compressions in each other
DAMAGES = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)  # what decompressors raise
FOREIGN_SHARE = 0.3  # of the letters: with more bytes beyond ASCII the text isn't in a western alphabet
HIGH = re.compile(rb"[\x80-\xff]")
LETTER = re.compile(rb"[A-Za-z]")

PARQUET = b"PAR1"
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
# What is often there instead of data: its first bytes, its name, what to do.
FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer", "run `git lfs pull` where it is"),
    (b"<!doctype html", "an HTML page", "the link may have expired, or need a login"),
    (b"<html", "an HTML page", "the link may have expired, or need a login"),
    (b"<?xml", "an XML document", "if it is a store's error, the link may have expired"),
    (b"<error>", "an XML document", "if it is a store's error, the link may have expired"),
    (b"pk\x03\x04", "a zip archive or an Excel workbook", "unpack it, or save it as CSV"),
    (b"arrow1", "an Arrow file", "save it as Parquet"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "save it as Parquet"),
    (b"%pdf", "a PDF document", "extract its text into JSON lines"),
    (b"rar!", "a rar archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"\x89png", "an image", "give a file of rows"),
    (b"\xff\xd8\xff", "an image", "give a file of rows"),
    (b"\x89hdf", "an HDF5 file", "save it as Parquet"),
    (b"sqlite format 3", "an SQLite database", "save the table as CSV or Parquet"),
    (b"\x93numpy", "a NumPy array", "save it as Parquet, with named columns"),
    (b"\x80\x04\x95", "a Python pickle", "save it as JSON lines: a pickle can run code"),
    (b"\x80\x05\x95", "a Python pickle", "save it as JSON lines: a pickle can run code"),
)
MARKUP = re.compile(r"<[^>]*>|\s+")


def head_of(file: BinaryIO) -> bytes:
    """Return the first bytes of a file, which stays at its start."""
    head = file.read(HEAD)
    file.seek(0)
    return head


def unpacked(file: BinaryIO, name: str, into: RowSet) -> BinaryIO:
    """Return the file, or a compressed one's content. Raises DataError if that is damaged or too large."""
    for _ in range(DEEPEST):
        head = head_of(file)
        kind = next((kind for magic, kind in COMPRESSED.items() if head.startswith(magic)), None)
        if kind is None:
            break
        into.notice(f"{name} is compressed with {kind}: it is unpacked")
        packed, file = file, _unpacked(file, kind, name)
        packed.close()
    return file


def _unpacked(file: BinaryIO, kind: str, name: str) -> BinaryIO:
    source = _decompressor(kind)(file)
    target = _temporary()
    try:
        while piece := source.read(PIECE):
            target.write(piece)
            if target.tell() > MAX_BYTES:
                raise DataError(
                    f"{name} unpacks to more than {MAX_BYTES / 1e9:.1f} GB, the most that data may have"
                )
    except BaseException as error:
        target.close()
        if not isinstance(error, DAMAGES):
            raise
        if getattr(error, "errno", None):  # the disk's, not the content's
            raise
        raise DataError(f"{name} is a damaged {kind} file: {error}") from error
    target.seek(0)
    return target


def _temporary() -> BinaryIO:
    """Return a file without a name, which the caller closes."""
    return cast(BinaryIO, tempfile.TemporaryFile())


def _decompressor(kind: str) -> Callable[[BinaryIO], Any]:
    if kind == "zstd":
        import pyarrow

        return lambda file: pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    opened: dict[str, Callable[[BinaryIO], Any]] = {
        "gzip": lambda file: gzip.GzipFile(fileobj=file),
        "bzip2": bz2.BZ2File,
        "xz": lzma.LZMAFile,
    }
    return opened[kind]


def refuse_foreign(head: bytes, name: str) -> None:
    """Raise DataError that says what it is if it can't be data."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    for magic, what, advice in FOREIGN:
        if start.startswith(magic):
            text = MARKUP.sub(" ", head[:600].decode("utf-8", "replace")).strip() if magic[:1] == b"<" else ""
            quoted = f" ({text:.80})" if text else ""
            raise DataError(f"{name} is {what}{quoted}, not data: {advice}")
    if head[257:262] == b"ustar":
        raise DataError(f"{name} is a tar archive, not data: unpack it")
    if head and not head.strip(b"\0"):
        raise DataError(
            f"{name} begins with {len(head)} zero bytes: its download or copy broke off; get it again"
        )


def as_utf8(file: BinaryIO, head: bytes, name: str, into: RowSet) -> BinaryIO:
    """Return the file from behind its byte-order mark; one in UTF-16 or UTF-32 is converted to UTF-8."""
    encoding = json.detect_encoding(head) if head else "utf-8"
    if encoding.startswith("utf-8"):
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        return file
    into.notice(f"{name} is read as {encoding.upper()}")
    return _transcoded(file, encoding)


def from_other_encoding(file: BinaryIO, name: str, into: RowSet) -> BinaryIO:
    """Return a file that is not UTF-8 as UTF-8: it has damaged places, or a western one-byte encoding.

    Raises DataError if it is neither.
    """
    damaged, whole, high, letters, western = _counted(file)
    if whole > damaged:
        into.notice(f"{name}: {damaged} places are not UTF-8; they became U+FFFD")
        return _transcoded(file, "utf-8")
    if high > FOREIGN_SHARE * (high + letters):
        raise DataError(f"{name} is not UTF-8, nor text in a western encoding: save it as UTF-8")
    encoding = "cp1252" if western else "latin-1"
    into.notice(f"{name} is not UTF-8: it is read as {encoding}, in which {high} characters are not ASCII")
    return _transcoded(file, encoding)


def _counted(file: BinaryIO) -> tuple[int, int, int, int, bool]:
    """Damaged and whole characters beyond ASCII as UTF-8; such bytes, letters; whether it may be cp1252."""
    damaged = whole = high = letters = 0
    western = True
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    file.seek(0)
    while piece := file.read(PIECE):
        text = decoder.decode(piece)
        broken = text.count("\ufffd")
        damaged += broken
        whole += sum(not character.isascii() for character in text) - broken if not text.isascii() else 0
        high += len(HIGH.findall(piece))
        letters += len(LETTER.findall(piece))
        western = western and not re.search(rb"[\x81\x8d\x8f\x90\x9d]", piece)
    file.seek(0)
    return damaged, whole, high, letters, western


def _transcoded(file: BinaryIO, encoding: str) -> BinaryIO:
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    target = _temporary()
    file.seek(0)
    while piece := file.read(PIECE):
        target.write(decoder.decode(piece).encode())
    target.write(decoder.decode(b"", final=True).encode())
    target.seek(0)
    return target
