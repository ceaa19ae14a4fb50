"""Files that are compressed, and files that are no data at all."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile

import pyarrow

from bench.rows.case import Case
from bench.rows.csv_cases import table
from bench.rows.json_cases import JSON_LINES, QA, ROWS, dumped
from bench.rows.parquet_cases import column, saved

PLAIN = dumped(ROWS)


def zstd(content: bytes) -> bytes:
    """Return content compressed with zstd."""
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def zipped(content: bytes) -> bytes:
    """Return a zip archive of one file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.json", content)
    return file.getvalue()


CASES = (
    Case(name="gz.json", content=gzip.compress(PLAIN), right=QA, notices=("is compressed with gzip",)),
    Case(
        name="lines.jsonl.gz",
        content=gzip.compress(JSON_LINES.encode()),
        right=QA,
        notices=("is compressed with gzip",),
    ),
    Case(
        name="members.jsonl.gz",
        content=b"".join(gzip.compress(dumped(row) + b"\n") for row in ROWS),
        right=QA,
        notices=("is compressed with gzip",),
    ),
    Case(name="rows.csv.gz", content=gzip.compress(table().encode()), right=QA, notices=("gzip",)),
    Case(name="rows.json.zst", content=zstd(PLAIN), right=QA, notices=("is compressed with zstd",)),
    Case(name="rows.json.bz2", content=bz2.compress(PLAIN), right=QA, notices=("bzip2",)),
    Case(name="rows.json.xz", content=lzma.compress(PLAIN), right=QA, notices=("xz",)),
    Case(
        name="packed.parquet",
        content=gzip.compress(saved({"q": column("q"), "a": column("a")})),
        right=QA,
        notices=("gzip",),
    ),
    Case(
        name="gz_utf16.json",
        content=gzip.compress(PLAIN.decode().encode("utf-16")),
        right=QA,
        notices=("gzip", "UTF-16"),
    ),
    Case(name="cut.json.gz", content=gzip.compress(PLAIN)[:-20], refusal="is a damaged gzip file"),
    Case(name="cut.json.zst", content=zstd(PLAIN)[:-9], refusal="is a damaged zstd file"),
    Case(
        name="html_error_page.json",
        content=b"<html><body>AccessDenied</body></html>",
        refusal="is an HTML page (AccessDenied), not data: the link may have expired",
    ),
    Case(
        name="doctype.csv",
        content=b"\n<!DOCTYPE html>\n<title>Sign in</title>",
        refusal="is an HTML page (Sign in), not data",
    ),
    Case(
        name="store_error.json",
        content=b'<?xml version="1.0"?><Error><Code>ExpiredToken</Code></Error>',
        refusal="is an XML document (ExpiredToken), not data",
    ),
    Case(
        name="git_lfs_pointer.json",
        content=b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12\n",
        refusal="is a git-lfs pointer, not data: run `git lfs pull`",
    ),
    Case(
        name="archive.json", content=zipped(PLAIN), refusal="is a zip archive or an Excel workbook, not data"
    ),
    Case(name="zeros.json", content=bytes(5000), refusal="begins with 4096 zero bytes"),
    Case(name="document.jsonl", content=b"%PDF-1.7\n...", refusal="is a PDF document, not data"),
)
