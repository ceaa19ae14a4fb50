"""One JSON object that holds all rows: wrapped, as columns, or in pandas' orientations; pure."""

from __future__ import annotations

from typing import Any

from shared.errors import DataError
from trainer_node.engine.data.row_set import AskedColumns, Projection, Row, column_names
from trainer_node.engine.data.splits import TRAINING

USUAL = (*TRAINING, "data", "rows", "examples", "instances", "items", "records")


def rows_of_object(value: Row, asked: AskedColumns | None, name: str) -> tuple[list[Any], str | None]:
    """Return the rows that a file's only object holds, and how they were found; else the object itself.

    Raises DataError if they could be in two places.
    """
    if found := _wrapped(value, asked, name):
        return found
    if _has_asked(value, asked):
        if rows := _from_lists(value, asked) or _from_indexed(value, asked):
            return rows, f"{name} holds columns, not rows: {len(rows)} rows are made of them"
        return [value], None
    columns, data = value.get("columns"), value.get("data")
    if isinstance(columns, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return [dict(zip(columns, row, strict=False)) for row in data], f"{name}: 'data' is read by 'columns'"
    if found := _split_of_columns(value, asked, name):
        return found
    rows = list(value.values())
    if rows and all(isinstance(row, dict) for row in rows) and asked and _has_asked(rows[0], asked):
        return rows, f"{name} holds its rows by name: all {len(rows)} are read"
    return [value], None


def _has_asked(row: Row, asked: AskedColumns | None) -> bool:
    """Return whether an object has one of the columns that are needed."""
    return asked is None or bool(Projection(AskedColumns(asked.needed), column_names(row))(row))


def _wrapped(value: Row, asked: AskedColumns | None, name: str) -> tuple[list[Any], str] | None:
    """Return a list of rows under one key, such as `data`."""
    if asked is not None and _has_asked(value, asked):
        return None
    keys = [
        key
        for key, rows in value.items()
        if isinstance(rows, list) and rows and isinstance(rows[0], dict) and _has_asked(rows[0], asked)
    ]
    if not keys:
        return None
    usual = [key for key in USUAL if key in keys]
    if len(keys) > 1 and not usual:
        places = " and ".join(repr(key) for key in keys[:5])
        raise DataError(f"{name} holds rows under {places}: give a file with one of them")
    key = usual[0] if usual else keys[0]
    others = f", not those under {', '.join(repr(other) for other in keys if other != key)}"
    rows = f"{name}: the {len(value[key])} rows under {key!r} are read"
    return value[key], rows + (others if len(keys) > 1 else "")


def _split_of_columns(value: Row, asked: AskedColumns | None, name: str) -> tuple[list[Any], str] | None:
    """Return the rows of columns that are under one of the usual keys, such as `train`."""
    keys = [key for key, columns in value.items() if isinstance(columns, dict) and _has_asked(columns, asked)]
    for key in (usual for usual in USUAL if usual in keys):
        if rows := _from_lists(value[key], asked) or _from_indexed(value[key], asked):
            others = ", ".join(repr(other) for other in keys if other != key)
            return rows, f"{name}: the columns under {key!r} are read" + (
                f", not those under {others}" if others else ""
            )
    return None


def _from_lists(value: Row, asked: AskedColumns | None) -> list[Row]:
    """Rows of columns that are lists of one length; a list of objects is a row's messages instead."""
    roots = [root for root in Projection(asked, value).roots or value if root in value]
    columns = {root: value[root] for root in roots if isinstance(value[root], list)}
    messages = any(isinstance(item, dict) for column in columns.values() for item in column[:1])
    if len(columns) < len(roots) or messages or len({len(column) for column in columns.values()}) != 1:
        return []
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _from_indexed(value: Row, asked: AskedColumns | None) -> list[Row]:
    """Rows of columns that map a row's number to its value: what pandas writes if nothing else is said."""
    roots = [root for root in Projection(asked, value).roots or value if root in value]
    columns = {root: value[root] for root in roots if isinstance(value[root], dict)}
    if len(columns) < len(roots) or not all(key.isdecimal() for column in columns.values() for key in column):
        return []
    numbers = dict.fromkeys(key for column in columns.values() for key in column)
    return [
        {name: column[number] for name, column in columns.items() if number in column} for number in numbers
    ]
