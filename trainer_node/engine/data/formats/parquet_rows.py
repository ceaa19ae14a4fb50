"""Rows of Parquet: only the columns that are asked for, in batches, with dates and decimals as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from shared.errors import DataError
from trainer_node.engine.data.row_set import AskedColumns, Projection, RowSet

if TYPE_CHECKING:
    import pyarrow

BATCH = 8192  # rows


def read_parquet(file: BinaryIO | Path, name: str, asked: AskedColumns | None, into: RowSet) -> None:
    """Read the asked columns. Raises DataError if it can't be read or a column is there twice."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _read_table(table, name, asked, into)
    except pyarrow.ArrowException as error:
        if isinstance(error, MemoryError):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{name} is not a readable Parquet file: {reason}") from error


def _read_table(table: Any, name: str, asked: AskedColumns | None, into: RowSet) -> None:
    fields = {field.name: field for field in table.schema_arrow}
    into.columns = [path for field in table.schema_arrow for path in _paths(field)]
    project = Projection(asked, [*fields, *into.columns])
    wanted = [root for root in project.roots or fields if root in fields or root in into.columns]
    wanted = [path for path in wanted if not any(other.startswith(f"{path}.") for other in wanted)]
    if not wanted:
        into.rows += [{}] * table.metadata.num_rows  # of nothing that is asked for; each counts
        return
    for column in wanted:
        count = table.schema_arrow.names.count(column)
        if count > 1:
            raise DataError(f"{name} has {count} columns {column!r}: rename one of them")
    for batch in table.iter_batches(batch_size=BATCH, columns=wanted, use_threads=True):
        columns = {column: _values(batch.column(column), column, name, into) for column in batch.schema.names}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        into.rows += rows if project.is_plain else map(project, rows)


def _paths(field: pyarrow.Field) -> list[str]:
    """Return a column's name, or the dotted paths of the columns inside it."""
    import pyarrow

    if pyarrow.types.is_struct(field.type):
        return [f"{field.name}.{inner.name}" for inner in field.type]
    return [field.name]


def _values(array: pyarrow.Array, column: str, name: str, into: RowSet) -> list[Any]:
    """Return a column's values as JSON would have them: text, numbers, lists, objects."""
    import pyarrow

    try:
        plain = array.cast(_as_json(array.type))
    except pyarrow.ArrowInvalid:  # a time zone that this machine doesn't know
        plain = array.cast(_without_zones(array.type)).cast(_as_json(array.type))
    try:
        values: list[Any] = plain.to_pylist()
    except UnicodeDecodeError:
        into.notice(f"{name}: the column {column!r} is not all UTF-8; damaged characters became U+FFFD")
        plain = plain.cast(
            _mapped(plain.type, lambda leaf: pyarrow.large_binary() if _is_text(leaf) else leaf)
        )
        values = plain.to_pylist()
    return [_decoded(value) for value in values] if _has_bytes(plain.type) else values


def _has_bytes(kind: pyarrow.DataType) -> bool:
    return "binary" in str(kind)


def _is_text(kind: pyarrow.DataType) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def _as_json(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Return a type of the same shape whose values Python can hold: times and decimals become text."""
    import pyarrow
    from pyarrow import types

    def leaf(kind: pyarrow.DataType) -> pyarrow.DataType:
        if types.is_dictionary(kind):
            return leaf(kind.value_type)
        if types.is_temporal(kind) or types.is_decimal(kind):
            return pyarrow.string()
        return pyarrow.large_binary() if types.is_fixed_size_binary(kind) else kind

    return _mapped(kind, leaf)


def _without_zones(kind: pyarrow.DataType) -> pyarrow.DataType:
    import pyarrow
    from pyarrow import types

    return _mapped(kind, lambda leaf: pyarrow.timestamp(leaf.unit) if types.is_timestamp(leaf) else leaf)


def _mapped(kind: pyarrow.DataType, leaf: Callable[[pyarrow.DataType], pyarrow.DataType]) -> pyarrow.DataType:
    """Return the same shape of lists and objects with other types in their leaves."""
    import pyarrow
    from pyarrow import types

    if types.is_struct(kind):
        return pyarrow.struct([pyarrow.field(field.name, _mapped(field.type, leaf)) for field in kind])
    if types.is_large_list(kind):
        return pyarrow.large_list(_mapped(kind.value_type, leaf))
    if types.is_list(kind) or types.is_fixed_size_list(kind):
        return pyarrow.list_(_mapped(kind.value_type, leaf))
    return leaf(kind)


def _decoded(value: Any) -> Any:
    """Text instead of bytes, also inside lists and objects."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    return value
