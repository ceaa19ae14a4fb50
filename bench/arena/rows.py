"""Rows of a data set: order, duplicates, and a split whose parts share no near duplicates."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import msgspec

MOST_ROWS = 8000
SHINGLE_WORDS = 8
# A shingle in more rows than this is boilerplate, not a sign of a copy.
COMMON_SHINGLE_ROWS = 20
# Chains of near duplicates can join many rows; groups larger than this share of all rows stay in train.
LARGEST_TEST_GROUP = 0.01


class Row(msgspec.Struct, frozen=True, order=True):
    """One example of supervised fine-tuning."""

    prompt: str
    completion: str


class Split(msgspec.Struct, frozen=True):
    """Rows to train on and rows to score on."""

    train: list[Row]
    test: list[Row]


# The dataset type of an offer for the files of `write_json`.
DATASET_TYPE = {"field_instruction": "prompt", "field_output": "completion"}


def write_json(rows: list[Row], path: Path) -> None:
    """Write the rows as a JSON data file of an InstructTextTask; DATASET_TYPE names its columns."""
    path.write_bytes(msgspec.json.encode(rows))


def digest(*parts: str) -> bytes:
    """Return a stable hash of texts."""
    return hashlib.sha256("\x00".join(parts).encode()).digest()


def unique(rows: Iterable[Row]) -> list[Row]:
    """Return the rows without repeated prompts or empty parts, in an order set by their content alone."""
    ordered = sorted({row for row in rows if row.prompt.strip() and row.completion.strip()})
    first: dict[str, Row] = {}
    for row in ordered:
        first.setdefault(row.prompt, row)
    return sorted(first.values(), key=lambda row: digest(row.prompt, row.completion))


def words(text: str) -> list[str]:
    """Return the words of a text in one case; digits and punctuation do not count."""
    return re.findall(r"[^\W\d_]+", text.casefold())


def shingles(text: str) -> set[int]:
    """Return hashes of every run of eight words, or of all words of a shorter text."""
    tokens = words(text)
    last = max(1, len(tokens) - SHINGLE_WORDS + 1)
    runs = (" ".join(tokens[start : start + SHINGLE_WORDS]) for start in range(last))
    return {int.from_bytes(digest(run)[:8], "big") for run in runs if run}


def near_duplicate_groups(rows: list[Row]) -> list[list[int]]:
    """Return the row numbers in groups; rows that share a rare shingle or a completion are in one group."""
    parent = list(range(len(rows)))

    def find(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    holders: dict[object, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        for shingle in shingles(row.completion) | shingles(row.prompt):
            holders[shingle].append(number)
        holders[" ".join(words(row.completion)) or row.completion].append(number)
    for key, numbers in holders.items():
        if isinstance(key, int) and len(numbers) > COMMON_SHINGLE_ROWS:
            continue
        for other in numbers[1:]:
            parent[find(other)] = find(numbers[0])
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(rows)):
        groups[find(number)].append(number)
    return list(groups.values())


def split(rows: list[Row], test_share: float = 0.1, most_test: int = 1000) -> Split:
    """Split the rows; near duplicates stay on one side. The same rows give the same split."""
    wanted = min(int(len(rows) * test_share), most_test)
    largest = max(1, int(len(rows) * LARGEST_TEST_GROUP))
    groups = [group for group in near_duplicate_groups(rows) if len(group) <= largest]
    groups.sort(key=lambda group: min(digest("split", rows[number].prompt) for number in group))
    chosen: set[int] = set()
    for group in groups:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    train = [row for number, row in enumerate(rows) if number not in chosen]
    return Split(train, [rows[number] for number in sorted(chosen)])
