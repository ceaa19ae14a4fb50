"""Read a table of small files, each with its right value, as a job would read them.

    python -m bench rows [--write docs/data.md]

One line per file: what is made of it, and whether that is right. Then one JSON object: files, right, wrong,
how many are read and refused, and the speed of plain JSON lines against a bare msgspec loop over all columns.
Exit code 1 if a file is read wrong. With `--write` the table in that page is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from bench.harness.page import with_part
from bench.rows import chat_cases, csv_cases, foreign_cases, json_cases, parquet_cases
from bench.rows.case import Answer, Case, answer_of, fault_of
from shared.messages.offers import FileFormat
from trainer_node.engine.data.formats.readers import DataFile, read
from trainer_node.engine.data.row_set import AskedColumns

CASES: tuple[Case, ...] = (
    *json_cases.CASES,
    *csv_cases.CASES,
    *parquet_cases.CASES,
    *foreign_cases.CASES,
    *chat_cases.CASES,
)
BEGIN, END = "<!-- files: made by bench/rows/table.py -->", "<!-- end of files -->"
SPEED_ROWS = 50_000
REPEATS = 3


def outcome(answer: Answer) -> str:
    """Return in words what is made of a file."""
    if answer.refusal:
        return f"refused: {answer.refusal}"
    count = len(answer.documents)
    parts = [f"{count} document{'s' * (count != 1)}"]
    parts += [f"{count} dropped: {reason}" for reason, count in answer.dropped.items()]
    return "; ".join([*parts, *answer.notices])


def line_of(case: Case, answer: Answer, fault: str) -> str:
    """Return a file's line."""
    return f"{'WRONG' if fault else 'right'}  {case.name:28} {outcome(answer):.150}"


def right_of(case: Case) -> Answer:
    """Return what must be made of a file; notices and refusals are parts of the texts."""
    return Answer(documents=case.right, dropped=case.dropped, notices=case.notices, refusal=case.refusal)


def page_with(text: str) -> str:
    """Return a page with its table replaced. Raises ValueError if it has no place for one."""
    # The right values, not the answers: an answer may quote a library's words, which change with its version.
    rows = [f"| {case.name} | {_cell(outcome(right_of(case)))} |" for case in CASES]
    return with_part(text, BEGIN, END, ["| file | what is made of it |", "| --- | --- |", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def speed() -> dict[str, float]:
    """Measure plain JSON lines with two columns of five asked for, against decoding every column."""
    row = {"q": "Say it. " * 20, "a": "It is said. " * 20, "id": 7, "tags": ["x"] * 8, "meta": {"n": 1.5}}
    content = b"".join(msgspec.json.encode(row | {"id": number}) + b"\n" for number in range(SPEED_ROWS))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(content)
        file, asked = DataFile(path, FileFormat.JSONL, "rows.jsonl"), AskedColumns(("q", "a"))
        ours = bare = float("inf")
        for _ in range(REPEATS):
            began = time.perf_counter()
            assert len(read([file], asked)) == SPEED_ROWS
            ours = min(ours, time.perf_counter() - began)
            began = time.perf_counter()
            assert len(_bare_loop(path)) == SPEED_ROWS
            bare = min(bare, time.perf_counter() - began)
    return {"mb_per_s": round(len(content) / 1e6 / ours, 1), "times_bare_loop": round(bare / ours, 2)}


def _bare_loop(path: Path) -> list[Any]:
    return [msgspec.json.decode(line) for line in path.read_bytes().split(b"\n") if line.strip()]


def main() -> int:
    """Print the table and the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the table in this page")
    write: Path | None = parser.parse_args().write
    if write is not None:
        write.write_text(page_with(write.read_text()))
    wrong = refused = 0
    for case in CASES:
        answer = answer_of(case)
        fault = fault_of(case, answer)
        wrong, refused = wrong + bool(fault), refused + bool(answer.refusal)
        print(line_of(case, answer, fault))
        if fault:
            print(f"       {fault}")
    counts = {"files": len(CASES), "right": len(CASES) - wrong, "wrong": wrong}
    print(json.dumps({**counts, "read": len(CASES) - refused, "refused": refused, **speed()}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
