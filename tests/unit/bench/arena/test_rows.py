"""Order, duplicates and splits of the arena's rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

from bench.arena.rows import DATASET_TYPE, Row, shingles, split, unique, write_json

WORDS = [
    first + last for first in ("ba", "ke", "li", "mo", "su") for last in ("dor", "fin", "gat", "rel", "zon")
]


def sentences(count: int) -> list[Row]:
    draw = random.Random(1)
    return [
        Row(f"say {' '.join(draw.choices(WORDS, k=6))}", " ".join(draw.choices(WORDS, k=20)))
        for _ in range(count)
    ]


def test_unique_keeps_one_row_for_each_prompt_in_an_order_of_its_own() -> None:
    rows = [Row("a", "1"), Row("b", "2"), Row("a", "3"), Row("c", " ")]
    assert unique(rows) == unique(reversed(rows))
    assert sorted(unique(rows)) == [Row("a", "1"), Row("b", "2")]


def test_the_split_is_stable_and_complete() -> None:
    rows = sentences(200)
    parts = split(rows)
    assert len(parts.test) == 20
    assert sorted(parts.train + parts.test) == sorted(rows)
    assert split(rows) == parts


def test_near_duplicates_stay_on_one_side() -> None:
    rows = sentences(200)
    copies = [Row(f"repeat {row.prompt}", f"{row.completion} badly!") for row in rows]
    parts = split(rows + copies, test_share=0.3)
    train = {shingle for row in parts.train for shingle in shingles(row.completion)}
    assert parts.test
    assert not any(shingles(row.completion) & train for row in parts.test)


def test_a_completion_that_many_rows_share_stays_on_one_side() -> None:
    rows = sentences(500)
    rows += [Row(f"{row.prompt} again", "yes") for row in rows[:4]]
    parts = split(rows, test_share=0.5)
    sides = [sum(row.completion == "yes" for row in side) for side in (parts.train, parts.test)]
    assert sorted(sides) == [0, 4]


def test_a_data_file_has_the_columns_of_the_dataset_type(tmp_path: Path) -> None:
    write_json([Row("a", "\u00e9")], tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text("utf-8")) == [
        {"prompt": "a", "completion": "\u00e9"}
    ]
    assert set(DATASET_TYPE.values()) == {"prompt", "completion"}
