"""Files of JSON: forms, values, encodings and damage."""

from __future__ import annotations

import json
from typing import Any

from bench.rows.case import Case
from shared.messages.offers import DatasetType

COLOURS = ("red", "green", "blue", "black")
QA = tuple((f"Say the colour number {number}.", f"It is {name}.") for number, name in enumerate(COLOURS))
ROWS: list[dict[str, Any]] = [{"q": question, "a": answer} for question, answer in QA]
FRENCH = (("Où est l'été ?", "Déjà là."), *QA)
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def dumped(rows: Any, **options: Any) -> bytes:
    """Return JSON as Python writes it."""
    return json.dumps(rows, **options).encode()


def with_extra(value: Any) -> list[dict[str, Any]]:
    """Return the rows with a column that nobody asks for."""
    return [{**row, "score": value} for row in ROWS]


def french(encoding: str) -> bytes:
    """Return rows with accents in an encoding."""
    rows = [{"q": question, "a": answer} for question, answer in FRENCH]
    return json.dumps(rows, ensure_ascii=False).encode(encoding)


FORMS = (
    Case(name="array.json", content=dumped(ROWS), right=QA),
    Case(name="array_pretty.json", content=dumped(ROWS, indent=2), right=QA),
    Case(name="lines.jsonl", content=JSON_LINES.encode(), right=QA),
    Case(name="lines_called_json.json", content=JSON_LINES.encode(), right=QA),
    Case(name="array_called_jsonl.jsonl", content=dumped(ROWS), right=QA),
    Case(name="blank_lines.jsonl", content=("\n" + JSON_LINES.replace("\n", "\n\n")).encode(), right=QA),
    Case(name="crlf.jsonl", content=JSON_LINES.replace("\n", "\r\n").encode(), right=QA),
    Case(name="cr_only.jsonl", content=JSON_LINES.replace("\n", "\r").encode(), right=QA),
    Case(name="one_row.jsonl", content=dumped(ROWS[0]), right=QA[:1]),
    Case(name="pretty_single_object.json", content=dumped(ROWS[0], indent=2), right=QA[:1]),
    Case(
        name="pretty_objects.jsonl",
        content=b"\n".join(dumped(row, indent=1) for row in ROWS),
        right=QA,
    ),
    Case(name="concatenated.json", content=b"".join(dumped(row) for row in ROWS), right=QA),
    Case(
        name="splits_of_columns.json",
        content=dumped(
            {
                "train": {"q": [question for question, _ in QA], "a": [answer for _, answer in QA]},
                "test": {"q": ["not this"], "a": ["one"]},
            }
        ),
        right=QA,
        notices=("the columns under 'train' are read, not those under 'test'",),
    ),
    Case(
        name="data_of_columns.json",
        content=dumped({"data": {"q": ["one", "two"], "a": ["three", "four"]}, "status": "ok"}),
        right=(("one", "three"), ("two", "four")),
        notices=("the columns under 'data' are read",),
    ),
    Case(name="keys_twice.jsonl", content=b'{"q": "one", "a": "x", "q": "two"}\n', right=(("two", "x"),)),
    Case(
        name="nothing_among_rows.json",
        content=dumped([None, *ROWS, {}]),
        right=QA,
        dropped={"not a JSON object": 1, "column 'q' is missing": 1},
        notices=("row 1: a row must be a JSON object",),
    ),
    Case(name="marks_amid.jsonl", content=2 * (b"\xef\xbb\xbf" + JSON_LINES.encode()), right=(*QA, *QA)),
    Case(name="sequence.json", content=b"".join(b"\x1e" + dumped(row) + b"\n" for row in ROWS), right=QA),
    Case(
        name="line_breaks_in_text.json",
        content=b'[{"q": "one\ntwo", "a": "three\tfour"}]',
        right=(("one\ntwo", "three\tfour"),),
    ),
    Case(name="tabs_in_text.jsonl", content=b'{"q": "one\ttwo", "a": "x"}\n', right=(("one\ttwo", "x"),)),
    Case(
        name="capital_columns.json",
        content=dumped([{"Q": question, "A": answer} for question, answer in QA]),
        refusal="no row has the column 'q'; the columns of row 1 are 'Q', 'A'; is 'Q' meant?",
    ),
    Case(name="commas_between.json", content=b",\n".join(dumped(row) for row in ROWS), right=QA),
    Case(name="arrays_joined.json", content=dumped(ROWS[:2]) + b"\n" + dumped(ROWS[2:]), right=QA),
    Case(
        name="data_wrapper.json",
        content=dumped({"data": ROWS}, indent=1),
        right=QA,
        notices=("the 4 rows under 'data' are read",),
    ),
    Case(
        name="splits_wrapper.json",
        content=dumped({"test": ROWS[:1], "train": ROWS}),
        right=QA,
        notices=("under 'train' are read, not those under 'test'",),
    ),
    Case(
        name="two_wrappers.json",
        content=dumped({"one": ROWS, "two": ROWS}),
        refusal="holds rows under 'one' and 'two': give a file with one of them",
    ),
    Case(
        name="columns_dict.json",
        content=dumped({name: [row[name] for row in ROWS] for name in ("q", "a")}),
        right=QA,
        notices=("holds columns, not rows: 4 rows",),
    ),
    Case(
        name="columns_numbered.json",  # what pandas' to_json writes
        content=dumped({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ("q", "a")}),
        right=QA,
        notices=("holds columns, not rows: 4 rows",),
    ),
    Case(
        name="columns_and_data.json",  # pandas' orient="split"
        content=dumped({"columns": ["q", "a"], "index": [0], "data": [list(pair) for pair in QA]}),
        right=QA,
        notices=("'data' is read by 'columns'",),
    ),
    Case(
        name="rows_by_name.json",  # pandas' orient="index"
        content=dumped({f"row {n}": row for n, row in enumerate(ROWS)}),
        right=QA,
        notices=("holds its rows by name: all 4",),
    ),
)

VALUES = (
    Case(name="nan_extra.json", content=dumped(with_extra(float("nan"))), right=QA),
    Case(
        name="inf_extra.jsonl",
        content=b"\n".join(dumped(row) for row in with_extra(float("inf"))),
        right=QA,
    ),
    Case(name="huge_extra.json", content=dumped(with_extra(1)).replace(b": 1}", b": 1e999}"), right=QA),
    Case(name="half_extra.json", content=dumped(with_extra("cut \ud83d")), right=QA),
    Case(
        name="nan_answer.json",
        content=dumped([*ROWS, {"q": "How much?", "a": float("nan")}]),
        right=QA,
        dropped={"column 'a' is missing": 1},
    ),
    Case(
        name="null_answer.json",
        content=dumped([*ROWS, {"q": "How much?", "a": None}]),
        right=QA,
        dropped={"column 'a' is missing": 1},
    ),
    Case(
        name="lone_surrogate.json",
        content=dumped([*ROWS, {"q": "cut \ud83d", "a": "ok"}]),
        right=(*QA, ("cut \ufffd", "ok")),
        notices=("half a character (a lone surrogate) became U+FFFD in 1 rows, first in row 5",),
    ),
    Case(
        name="whole_surrogates.json",
        content=dumped([{"q": "smile \U0001f600", "a": float("inf")}, {"q": "smile \U0001f600", "a": "ok"}]),
        right=(("smile \U0001f600", "ok"),),
        dropped={"column 'a' is missing": 1},
    ),
    Case(
        name="int_answers.json",
        content=dumped([{"q": "Count.", "a": number} for number in range(3)]),
        right=(("Count.", "0"), ("Count.", "1"), ("Count.", "2")),
    ),
    Case(
        name="some_int_answers.json",
        content=dumped([*ROWS, {"q": 7, "a": 2.5}, {"q": True, "a": False}]),
        right=(*QA, ("7", "2.5"), ("True", "False")),
    ),
    Case(
        name="object_answer.json",
        content=dumped([*ROWS, {"q": "List.", "a": ["x"]}, {"q": "Map.", "a": {"x": 1}}]),
        right=QA,
        dropped={"column 'a' is not text": 2},
    ),
    Case(
        name="nested_column.json",
        content=dumped([{"x": row} for row in ROWS]),
        settings=DatasetType(field_instruction="x.q", field_output="x.a"),
        right=QA,
    ),
    Case(
        name="dot_in_name.jsonl",
        content=b"\n".join(dumped({"x.q": row["q"], "a": row["a"]}) for row in ROWS),
        settings=DatasetType(field_instruction="x.q", field_output="a"),
        right=QA,
    ),
    Case(
        name="spaces_in_names.json",
        content=dumped([{" q": row["q"], "a ": row["a"]} for row in ROWS]),
        right=QA,
    ),
    Case(
        name="nested_unasked.json",
        content=dumped([{"x": row} for row in ROWS]),
        refusal="no row has the column 'q'; the columns of row 1 are 'x.q', 'x.a'; is 'x.q' meant?",
    ),
    Case(
        name="other_column.json",
        content=dumped([{"question": row["q"], "a": row["a"]} for row in ROWS]),
        settings=DatasetType(field_instruction="qestion", field_output="a"),
        refusal="no row has the column 'qestion'; the columns of row 1 are 'question', 'a'; is 'question'",
    ),
)

DAMAGE = (
    Case(
        name="a_bad_line.jsonl",
        content=(JSON_LINES + '{"q": "cut').encode(),
        right=QA,
        dropped={"not valid JSON": 1},
        notices=('line 5: not valid JSON: \'{"q": "cut\'',),
    ),
    Case(
        name="first_line_bad.jsonl",
        content=('"q": "cut"}\n' + JSON_LINES).replace('"q": "cut"}', '{"q": }', 1).encode(),
        right=QA,
        dropped={"not valid JSON": 1},
        notices=("line 1: not valid JSON",),
    ),
    Case(
        name="a_number_among_rows.json",
        content=dumped([*ROWS, 5]),
        right=QA,
        dropped={"not a JSON object": 1},
        notices=("row 5: a row must be a JSON object with named columns, not 5",),
    ),
    Case(
        name="mostly_bad_lines.jsonl",
        content=(JSON_LINES + "{\n" * 9).encode(),
        refusal="not valid JSON",
    ),
    Case(
        name="array_cut.json",
        content=dumped(ROWS)[:-30],
        refusal="it ends inside row 4, so a part of the file is missing",
    ),
    Case(
        name="array_bad_row.json",
        content=dumped(ROWS)[:-1] + b', {"q": "\\x", "a": "y"}, ' + dumped(ROWS[0]) + b"]",
        right=(*QA, QA[0]),
        dropped={"not valid JSON": 1},
        notices=('row 5: not valid JSON: \'{"q": "',),
    ),
    Case(
        name="array_mostly_bad.json",
        content=b"[" + b", ".join([b'{"q": "\\x", "a": "y"}'] * 3) + b", " + dumped(ROWS[0]) + b"]",
        refusal="array_mostly_bad.json is not valid JSON: row 1: ",
    ),
    Case(name="array_comma_at_end.json", content=dumped(ROWS)[:-1] + b",\n]", right=QA),
    Case(name="array_of_arrays.json", content=dumped([["a", "b"], ["c", "d"]]), refusal="with named columns"),
    Case(name="empty.json", content=b"", refusal="empty.json holds no rows"),
    Case(name="empty_array.json", content=b"[]", refusal="holds no rows"),
    Case(name="deep.json", content=b"[" * 100_000, refusal="nested too deeply"),
    Case(name="text.json", content=b"just words", refusal="it begins with 'just words', not with [ or {"),
)

ENCODINGS = (
    Case(name="utf8_bom.json", content=french("utf-8-sig"), right=FRENCH),
    Case(name="utf16.json", content=french("utf-16"), right=FRENCH, notices=("is read as UTF-16",)),
    Case(
        name="utf16_be_without_mark.json",
        content=french("utf-16-be"),
        right=FRENCH,
        notices=("is read as UTF-16-BE",),
    ),
    Case(name="utf32.json", content=french("utf-32"), right=FRENCH, notices=("is read as UTF-32",)),
    Case(
        name="latin1.json",
        content=french("latin-1"),
        right=FRENCH,
        notices=("is not UTF-8: it is read as cp1252, in which 6 characters are not ASCII",),
    ),
    Case(
        name="latin1_lines.jsonl",
        content=b"\n".join(
            json.dumps({"q": q, "a": a}, ensure_ascii=False).encode("latin-1") for q, a in FRENCH
        ),
        right=FRENCH,
        notices=("is not UTF-8: it is read as cp1252",),
    ),
    Case(
        name="latin1_extra.json",
        content=json.dumps(with_extra("d\u00e9j\u00e0"), ensure_ascii=False).encode("latin-1"),
        right=QA,
    ),
    Case(
        name="damaged_utf8.json",
        content=french("utf-8").replace(b"red", b"r\xffd"),
        right=(FRENCH[0], (QA[0][0], "It is r\ufffdd."), *QA[1:]),
        notices=("1 places are not UTF-8; they became U+FFFD",),
    ),
    Case(
        name="cyrillic_cp1251.json",
        content=json.dumps(
            [{"q": "\u043f\u0440\u0438\u0432\u0435\u0442" * 9, "a": "\u0434\u0430" * 9}], ensure_ascii=False
        ).encode("cp1251"),
        refusal="is not UTF-8, nor text in a western encoding: save it as UTF-8",
    ),
)

CASES = (*FORMS, *VALUES, *DAMAGE, *ENCODINGS)
