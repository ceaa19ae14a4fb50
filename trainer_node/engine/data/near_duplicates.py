"""Rows that are copies of each other but for a word or two, found by the runs of tokens they share.

What is compared are a row's labelled tokens: a prompt that many rows share says nothing, and a completion
that is there twice can be learnt by heart. A row with few labelled tokens (a class, a number) is compared as
a whole, with rows of the same labels, and may differ in a word or two only. Runs that many rows share are the
data's form, which unseen rows have as well: they don't count. Nor does a chain of many rows that are alike
in pairs make a group.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # the label of a token that is not scored
FEW_LABELS = 16  # fewer labelled tokens don't tell a copy from a common phrase
RARE_RUN = 6  # tokens: most runs of this length are a row's own
FEW_RUNS = 4  # of a row that count: fewer say nothing about it
CANDIDATES = 0.2  # of the runs of two rows that count are shared: then all their tokens are compared
RUN = 3  # tokens: a changed word of two tokens breaks four runs
ALIKE = 0.6  # of the runs of two rows are shared
DIFFERENT_RUNS = 10  # at most, of rows that are compared as a whole: two words
SKETCH = 64  # runs of a row that make candidates: those with the lowest hashes
NEXT = 3  # rows that a row is compared with, of those that share a run: many copies still make a chain
CHUNK = 2**21  # tokens that are hashed at once: 100 MB
CHUNK_ROWS = 2**16  # at most: a row's number takes 16 bits of a key, the hash of a run the others
HASH_BITS = 48
MOST_COUNTERS = 2**25  # entries of the table of holders: 128 MB; 50 million runs put 1.5 into each
P1, P2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


class Compared(NamedTuple):
    """N rows as they are compared: `tokens` int32, row i's from `borders[i]` on.

    `salt` goes into the hashes of a row's runs: rows of different salts share none.
    """

    tokens: NDArray[np.int32]
    borders: NDArray[np.int64]
    salt: NDArray[np.uint64]
    whole: NDArray[np.bool_]  # compared as a whole


class Sketches(NamedTuple):
    """Runs that others may share: `hashes` and `rows`, in the order of the rows.

    `kept` is how many of each row's runs were looked at, at most SKETCH.
    """

    hashes: NDArray[np.uint64]
    rows: NDArray[np.int64]
    kept: NDArray[np.int64]


def near_duplicates(
    ids: NDArray[np.int32], labels: NDArray[np.int32], borders: NDArray[np.int64], most: int
) -> list[list[int]]:
    """Return groups of two to `most` rows that are nearly alike, by their first rows; most rows are in none.

    `borders` are those of the rows in `ids` and `labels`. Takes 6 to 11 s for 175,000 rows of 300 tokens.
    """
    if most < 2 or len(borders) < 3:
        return []
    rows = _compared(ids, labels, borders)
    candidates = _candidates(_sketches(rows, _holders(rows), most))
    return [group for group in _joined(rows, candidates) if len(group) <= most]


def _compared(ids: NDArray[np.int32], labels: NDArray[np.int32], borders: NDArray[np.int64]) -> Compared:
    labelled, lengths = labels != IGNORED, np.diff(borders)
    counts = np.add.reduceat(labelled, borders[:-1], dtype=np.int64)
    whole = counts < FEW_LABELS
    salt = np.zeros(len(lengths), dtype=np.uint64)
    for row in np.flatnonzero(whole).tolist():
        span = slice(borders[row], borders[row + 1])
        salt[row] = 1 + zlib.crc32(ids[span][labelled[span]].tobytes())
    tokens = ids[labelled | np.repeat(whole, lengths)]
    ends = np.cumsum(np.where(whole, lengths, counts))
    return Compared(tokens, np.concatenate([np.zeros(1, np.int64), ends]), salt, whole)


def _chunks(rows: Compared) -> Iterator[tuple[int, int, NDArray[np.uint64]]]:
    """Yield the first row of some, their end, and their runs' keys in order, each of a row once.

    A key is a row's number among them, and below it the hash of a run.
    """
    start, count = 0, len(rows.salt)
    while start < count:
        end = int(np.searchsorted(rows.borders, rows.borders[start] + CHUNK, "right")) - 1
        end = min(max(end, start + 1), start + CHUNK_ROWS, count)
        tokens = rows.tokens[rows.borders[start] : rows.borders[end]].astype(np.uint64)
        if len(tokens) < RARE_RUN:  # there is no run, and the slices below would count from the end
            yield start, end, tokens[:0]
            start = end
            continue
        numbers = np.repeat(np.arange(end - start, dtype=np.uint64), np.diff(rows.borders[start : end + 1]))
        last = RARE_RUN - 1
        runs = tokens[last:] ^ (rows.salt[start:end] * P2)[numbers[last:].astype(np.intp)]
        for back in range(1, RARE_RUN):
            runs = runs * P1 + tokens[last - back : len(tokens) - back]
        runs = _mixed(runs) | numbers[last:] << np.uint64(HASH_BITS)
        runs = runs[numbers[last:] == numbers[: len(numbers) - last]]  # none begins in the row before
        runs.sort()
        yield start, end, runs[np.flatnonzero(np.diff(runs, prepend=~runs[:1]))]
        start = end


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return hashes of HASH_BITS bits."""
    values ^= values >> np.uint64(30)
    values *= P2
    values ^= values >> np.uint64(27)
    values *= P1
    values >>= np.uint64(64 - HASH_BITS)
    return values


def _holders(rows: Compared) -> NDArray[np.uint32]:
    """Return how many rows have a run, by the hash's lowest bits."""
    size = 1 << max(10, min(MOST_COUNTERS, 4 * len(rows.tokens)).bit_length() - 1)
    table = np.zeros(size, dtype=np.uint32)
    for _, _, keys in _chunks(rows):
        np.add.at(table, _places(keys, table), np.uint32(1))
    return table


def _places(keys: NDArray[np.uint64], table: NDArray[np.uint32]) -> NDArray[np.intp]:
    return (keys & np.uint64(len(table) - 1)).astype(np.intp)


def _sketches(rows: Compared, holders: NDArray[np.uint32], most: int) -> Sketches:
    """Return the runs of rows that may be like another: enough of their own runs are in others as well."""
    hashes, owners, kept = [], [], []
    for start, end, keys in _chunks(rows):
        held = holders[_places(keys, holders)]
        keys, held = keys[held <= most], held[held <= most]
        numbers = (keys >> np.uint64(HASH_BITS)).astype(np.intp)
        count = np.bincount(numbers, minlength=end - start)
        first = np.cumsum(count) - count
        shared = (held > 1) & (np.arange(len(keys)) - first[numbers] < SKETCH)
        sketch = np.minimum(count, SKETCH)
        enough = np.bincount(numbers, shared, minlength=end - start) >= CANDIDATES * sketch
        shared &= (enough & (count >= FEW_RUNS))[numbers]
        hashes.append(keys[shared] & np.uint64((1 << HASH_BITS) - 1))
        owners.append(start + numbers[shared])
        kept.append(sketch)
    return Sketches(*(np.concatenate(parts) for parts in (hashes, owners, kept)))


def _candidates(sketches: Sketches) -> NDArray[np.int64]:
    """Return pairs of rows that may be alike, int64[*, 2].

    Of the rows that share a run each is compared with the NEXT ones alone.
    """
    order = np.argsort(sketches.hashes, kind="stable")
    hashes, rows = sketches.hashes[order], sketches.rows[order]
    links = []
    for step in range(1, NEXT + 1):
        same = hashes[step:] == hashes[:-step]
        links.append(rows[:-step][same] << 32 | rows[step:][same])
    keys, shared = np.unique(np.concatenate(links), return_counts=True)
    pairs = np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1)
    found: NDArray[np.int64] = pairs[shared >= CANDIDATES * (sketches.kept[pairs].sum(axis=1) - shared)]
    return found


def _are_alike(rows: Compared, one: int, other: int) -> bool:
    """Return whether two rows are the same but for a word or two, also by the runs that many rows have."""
    runs, others = _runs(rows, one), _runs(rows, other)
    shared = len(runs & others)
    if rows.whole[one] and max(len(runs), len(others)) > shared + DIFFERENT_RUNS:
        return False
    return shared >= ALIKE * (len(runs) + len(others) - shared)


def _runs(rows: Compared, row: int) -> set[tuple[int, ...]]:
    tokens = rows.tokens[rows.borders[row] : rows.borders[row + 1]].tolist()
    return set(zip(*(tokens[start:] for start in range(RUN)), strict=False))


def _joined(rows: Compared, candidates: NDArray[np.int64]) -> list[list[int]]:
    """Return the rows of each chain of pairs that are alike, in order."""
    parent: dict[int, int] = {}

    def first(row: int) -> int:
        while (above := parent.setdefault(row, row)) != row:
            parent[row] = parent[above]
            row = above
        return row

    for one, other in candidates.tolist():
        low, high = sorted((first(one), first(other)))
        if low != high and _are_alike(rows, one, other):
            parent[high] = low
    groups = defaultdict[int, list[int]](list)
    for row in sorted(parent):
        groups[first(row)].append(row)
    return [group for group in groups.values() if len(group) > 1]
