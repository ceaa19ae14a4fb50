"""The data sets of the accuracy arena: rows, completion lengths, languages and licences.

python -m bench arena_data [SOURCE ...] [--write FOLDER]

Fetches what the cache lacks ($PODIUM_ARENA_CACHE or ~/.cache/podium/arena). The last line is one JSON object:
`{"sources": {name: {"rows", "train", "test", "median_bytes", "p90_bytes", "sha256", ...}}}`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from bench.arena.packages import cache_folder
from bench.arena.rows import Row, split, write_json
from bench.arena.sources import SOURCES, load


def describe(rows: list[Row]) -> dict[str, Any]:
    """Return counts, completion lengths in bytes and a hash of the rows."""
    sizes = sorted(len(row.completion.encode()) for row in rows)
    parts = split(rows)
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(f"{row.prompt}\x00{row.completion}\x00".encode())
    return {
        "rows": len(rows),
        "train": len(parts.train),
        "test": len(parts.test),
        "median_bytes": sizes[len(sizes) // 2],
        "p90_bytes": sizes[len(sizes) * 9 // 10],
        "sha256": hashed.hexdigest()[:16],
    }


def table(names: list[str], cache: Path) -> dict[str, dict[str, Any]]:
    """Print one line for each data set and return the same facts."""
    facts: dict[str, dict[str, Any]] = {}
    print(f"{'source':15} {'rows':>5} {'test':>5} {'median':>6} {'p90':>5}  languages; licence")
    for name in names:
        source = SOURCES[name]
        found = describe(load(name, cache))
        facts[name] = {**found, "languages": source.languages.split(), "licence": source.licence}
        counts = f"{found['rows']:5} {found['test']:5} {found['median_bytes']:6} {found['p90_bytes']:5}"
        print(f"{name:15} {counts}  {source.languages}; {source.licence}", flush=True)
    return facts


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench arena_data", description=__doc__)
    parser.add_argument("sources", nargs="*", help=f"of {', '.join(SOURCES)}; all by default")
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="write NAME_train.json and NAME_test.json"
    )
    options = parser.parse_args()
    chosen = options.sources or list(SOURCES)
    if unknown := set(chosen) - set(SOURCES):
        parser.error(f"no such source: {', '.join(sorted(unknown))}")
    facts = table(chosen, cache_folder())
    for name in chosen if options.write else ():
        options.write.mkdir(parents=True, exist_ok=True)
        parts = split(load(name, cache_folder()))
        write_json(parts.train, options.write / f"{name}_train.json")
        write_json(parts.test, options.write / f"{name}_test.json")
    print(json.dumps({"sources": facts}))


if __name__ == "__main__":
    main()
