"""The dialect of a CSV file is found by the columns that are asked for."""

from __future__ import annotations

import pytest

from trainer_node.engine.data.formats.csv_rows import Dialect, dialect_of, has_header
from trainer_node.engine.data.row_set import AskedColumns

ASKED = AskedColumns(("q", "a"), ("input",))


@pytest.mark.parametrize(
    ("sample", "dialect"),
    [
        ("q,a\n1,2\n", Dialect()),
        ("q;a\n1,5;2,5\n", Dialect(";")),
        ("q,a;b\n1,2;3\n", Dialect(",")),  # `a` isn't there, but the fields are
        ("q\ta\n1,2\t3\n", Dialect("\t")),
        ("q,a\n'1, 2','3'\n", Dialect(",", "'")),
        ("q,a\nit's,don't\n", Dialect()),
        ('q,a\n"say \\"hi\\"",x\n', Dialect(",", '"', "\\")),
        ('q,a\n"C:\\","D"\n', Dialect()),  # a path, no escape
        ("", Dialect()),
    ],
)
def test_the_dialect(sample: str, dialect: Dialect) -> None:
    assert dialect_of(sample, ASKED) == (dialect, 0)


def test_excel_names_its_separator() -> None:
    assert dialect_of("sep=;\r\nq,a\r\n", ASKED) == (Dialect(";"), 1)


def test_a_dialect_is_described() -> None:
    assert str(Dialect(";", "'", "\\")) == (
        "fields separated by semicolons in single quotes with backslashes before quotes"
    )
    assert str(Dialect("^")) == "fields separated by '^'"


@pytest.mark.parametrize(
    ("sample", "there"), [("q,a\n", True), ("a;b;q", True), ("q,b\n", False), ("", False)]
)
def test_a_header_is_known_by_its_columns(sample: str, there: bool) -> None:
    assert has_header(sample, ASKED) is there
