"""Text to pre-train the arena's base models on: no row of a data set is in it, nor a piece of a test row.

Prose (gcide, perl-doc) and the rows that each source has beyond its data set. A passage that shares a run of
eight words with any test row, or ends in a test row's completion, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from bench.arena.packages import fetch
from bench.arena.parsers import dict_entries
from bench.arena.rows import MOST_ROWS, SHINGLE_WORDS, Row, digest, shingles, split, words
from bench.arena.sources import SOURCES, load_all, text_of

PASSAGE_BYTES = 1500
MOST_SPARE_ROWS = 8000
MOST_PROSE_BYTES = 6_000_000


def passages(text: str) -> Iterator[str]:
    """Yield pieces of a text of about PASSAGE_BYTES, cut at blank lines."""
    piece: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        piece.append(paragraph.strip("\n"))
        size += len(paragraph.encode())
        if size >= PASSAGE_BYTES:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def _prose(cache: Path) -> Iterator[str]:
    for path in sorted(fetch("dict-gcide", cache).glob("usr/share/dictd/*.dict.dz")):
        for head, body in dict_entries(text_of(path)):
            yield re.sub(r"\s*\[1913 Webster\]|[{}]", "", f"{head}\n{body}")
    for path in sorted(fetch("perl-doc", cache).glob("usr/share/perl/**/*.pod")):
        yield from passages(text_of(path))


class Guard:
    """Knows the test rows and refuses text that repeats them."""

    def __init__(self, test: list[Row]) -> None:
        self.long = {
            shingle
            for row in test
            for part in (row.prompt, row.completion)
            if len(words(part)) >= SHINGLE_WORDS
            for shingle in shingles(part)
        }
        self.completions = {row.completion for row in test if len(row.completion) >= 20}
        self.prompts = {row.prompt for row in test}

    def passes(self, text: str) -> bool:
        """Return whether no run of eight words of a test row is in the text."""
        return not shingles(text) & self.long

    def passes_row(self, row: Row) -> bool:
        """Return whether neither part of a row is that of a test row."""
        fresh = row.prompt not in self.prompts and row.completion not in self.completions
        return fresh and self.passes(row.prompt) and self.passes(row.completion)


def pretraining_text(cache: Path) -> list[str]:
    """Return the passages in an order set by their content."""
    test: list[Row] = []
    spare: list[Row] = []
    for name in SOURCES:
        rows = load_all(name, cache)
        test += split(rows[:MOST_ROWS]).test
        spare += rows[MOST_ROWS : MOST_ROWS + MOST_SPARE_ROWS]
    guard = Guard(test)
    found = {f"{row.prompt}\n{row.completion}" for row in spare if guard.passes_row(row)}
    prose = sorted({text for text in _prose(cache) if guard.passes(text)}, key=digest)
    size = 0
    for text in prose:
        size += len(text.encode())
        if size > MOST_PROSE_BYTES:
            break
        found.add(text)
    return sorted(found, key=digest)
