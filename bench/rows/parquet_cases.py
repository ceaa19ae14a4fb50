"""Files of Parquet: types, columns that nobody asked for, and damage."""

from __future__ import annotations

import io
from typing import Any

import pyarrow
import pyarrow.parquet

from bench.rows.case import Case
from bench.rows.json_cases import QA, ROWS, dumped
from shared.messages.offers import DatasetType, TaskType

CHAT = DatasetType(chat_column="talk", chat_role_field="from", chat_content_field="value")
TALK = [{"from": "user", "value": "Hello"}, {"from": "assistant", "value": "Good day"}]
TALKED = (
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n",
    "Good day",
)


def saved(columns: dict[str, Any], **options: Any) -> bytes:
    """Return a Parquet file of columns."""
    return saved_table(pyarrow.table(columns), **options)


def saved_table(table: pyarrow.Table, **options: Any) -> bytes:
    """Return a table as a Parquet file."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, **options)
    return file.getvalue()


def column(name: str, kind: pyarrow.DataType | None = None) -> pyarrow.Array:
    """Return a column of the rows in a type."""
    return pyarrow.array([row[name] for row in ROWS], kind)


def with_extra(extra: pyarrow.Array) -> bytes:
    """Return the rows with a column that nobody asked for."""
    return saved({"q": column("q"), "a": column("a"), "extra": extra})


def not_utf8(*values: bytes) -> pyarrow.Array:
    """Return text that isn't UTF-8, as other writers leave it."""
    binary = pyarrow.array(values, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), binary.buffers())


NUMBERS = pyarrow.array([-(10**6), 0, 1, None], pyarrow.int32())
CASES = (
    Case(name="plain.parquet", content=with_extra(NUMBERS), right=QA),
    Case(name="parquet_called_json.json", content=with_extra(NUMBERS), right=QA),
    Case(name="really_json.parquet", content=dumped(ROWS), right=QA),
    Case(
        name="large_string.parquet",
        content=saved({name: column(name, pyarrow.large_string()) for name in ("q", "a")}),
        right=QA,
    ),
    Case(
        name="dictionary.parquet",
        content=saved({name: column(name).dictionary_encode() for name in ("q", "a")}),
        right=QA,
    ),
    Case(
        name="binary.parquet",
        content=saved({name: column(name, pyarrow.binary()) for name in ("q", "a")}),
        right=QA,
    ),
    Case(name="date_bc_extra.parquet", content=with_extra(NUMBERS.cast(pyarrow.date32())), right=QA),
    Case(
        name="duration_extra.parquet",
        content=with_extra(pyarrow.array([2**62, 1, None, 2], pyarrow.duration("ns"))),
        right=QA,
    ),
    Case(
        name="zone_extra.parquet",
        content=with_extra(pyarrow.array([1] * 4, pyarrow.timestamp("us", "Mars/Phobos"))),
        right=QA,
    ),
    Case(name="not_utf8_extra.parquet", content=with_extra(not_utf8(b"\xff", b"a", b"b", b"c")), right=QA),
    Case(
        name="date_asked.parquet",
        content=saved({"q": column("q"), "a": NUMBERS.cast(pyarrow.date32())}),
        right=tuple(zip([q for q, _ in QA], ("-0768-02-04", "1970-01-01", "1970-01-02"), strict=False)),
        dropped={"column 'a' is missing": 1},
    ),
    Case(
        name="zone_asked.parquet",
        content=saved({"q": ["When?"], "a": pyarrow.array([0], pyarrow.timestamp("s", "Mars/Phobos"))}),
        right=(("When?", "1970-01-01 00:00:00.000"),),
    ),
    Case(
        name="numbers_asked.parquet",
        content=saved({"q": [1, 2, 3], "a": [0.5, float("nan"), 3.0]}),
        right=(("1", "0.5"), ("3", "3.0")),
        dropped={"column 'a' is missing": 1},
    ),
    Case(
        name="decimal_asked.parquet",
        content=saved({"q": ["How much?"], "a": pyarrow.array([1]).cast(pyarrow.decimal128(21, 2))}),
        right=(("How much?", "1.00"),),
    ),
    Case(
        name="not_utf8_asked.parquet",
        content=saved({"q": ["x", "y"], "a": not_utf8(b"r\xffd", b"blue")}),
        right=(("x", "r\ufffdd"), ("y", "blue")),
        notices=("the column 'a' is not all UTF-8",),
    ),
    Case(
        name="list_of_struct.parquet",
        content=saved({"talk": [TALK]}),
        settings=CHAT,
        task_type=TaskType.CHAT,
        right=(TALKED,),
    ),
    Case(
        name="nested.parquet",
        content=saved({"x": ROWS}),
        settings=DatasetType(field_instruction="x.q", field_output="x.a"),
        right=QA,
    ),
    Case(
        name="nested_unasked.parquet",
        content=saved({"x": ROWS}),
        refusal="no row has the column 'q'; the columns of row 1 are 'x.q', 'x.a'; is 'x.q' meant?",
    ),
    Case(
        name="header_spaces.parquet",
        content=saved({" q": column("q"), "a": column("a")}),
        right=QA,
    ),
    Case(
        name="dup_columns.parquet",
        content=saved_table(
            pyarrow.Table.from_arrays([column("q"), column("a"), column("q")], ["q", "a", "q"])
        ),
        refusal="has 2 columns 'q': rename one of them",
    ),
    Case(
        name="dup_extra.parquet",
        content=saved_table(
            pyarrow.Table.from_arrays(
                [column("q"), column("a"), column("q"), column("q")], ["q", "a", "x", "x"]
            )
        ),
        right=QA,
    ),
    Case(name="cut.parquet", content=with_extra(NUMBERS)[:-20], refusal="is not a readable Parquet file"),
    Case(
        name="text.parquet",
        content=b"words\n",
        refusal="is not a readable Parquet file: it begins with b'wo",
    ),
    Case(name="no_rows.parquet", content=saved({"q": [], "a": []}), refusal="holds no rows"),
)
