"""Files of CSV: separators, quotes, headers and damage."""

from __future__ import annotations

from bench.rows.case import Case
from bench.rows.json_cases import FRENCH, QA, ROWS, dumped
from shared.messages.offers import DatasetType


def table(separator: str = ",", end: str = "\r\n", quote: str = "") -> str:
    """Return the rows as CSV."""
    lines = [("q", "a"), *QA]
    return "".join(separator.join(f"{quote}{field}{quote}" for field in line) + end for line in lines)


MIXED = (("one", "two"), ("three", "four"), ("five", "six"))
CASES = (
    Case(name="plain.csv", content=table().encode(), right=QA),
    Case(name="unix.csv", content=table(end="\n").encode(), right=QA),
    Case(name="cr_only.csv", content=table(end="\r").encode(), right=QA),
    Case(name="bom.csv", content=table().encode("utf-8-sig"), right=QA),
    Case(name="utf16.csv", content=table("\t").encode("utf-16"), right=QA, notices=("UTF-16", "tabs")),
    Case(
        name="semicolon.csv",
        content=table(";").encode(),
        right=QA,
        notices=("is read as CSV with fields separated by semicolons",),
    ),
    Case(name="tab.tsv", content=table("\t").encode(), right=QA, notices=("separated by tabs",)),
    Case(name="bar.csv", content=table("|").encode(), right=QA, notices=("separated by vertical bars",)),
    Case(
        name="excel.csv",
        content=b"sep=^\r\n" + table("^").encode(),
        right=QA,
        notices=("separated by '^'",),
    ),
    Case(
        name="commas_inside.csv",
        content=b'q,a\n"One, two; three","Four, five"\n',
        right=(("One, two; three", "Four, five"),),
    ),
    Case(
        name="lines_inside.csv",
        content=b'q,a\n"One\ntwo","Four ""five"""\n',
        right=(("One\ntwo", 'Four "five"'),),
    ),
    Case(
        name="single_quotes.csv",
        content=b"q,a\n'One, two','Four'\n'Five, six','Seven'\n",
        right=(("One, two", "Four"), ("Five, six", "Seven")),
        notices=("in single quotes",),
    ),
    Case(
        name="spaces_before_quotes.csv",
        content=b'q, a\n"One, two", "Four"\n"Five, six", "Seven"\n',
        right=(("One, two", "Four"), ("Five, six", "Seven")),
        notices=("with spaces before quotes",),
    ),
    Case(
        name="backslashes.csv",
        content=b'q,a\n"He said \\"hi\\", twice","Four"\n"Five","Six"\n',
        right=(('He said "hi", twice', "Four"), ("Five", "Six")),
        notices=("with backslashes before quotes",),
    ),
    Case(
        name="quote_inside.csv",
        content=b'q,a\n"he said "hi" 0",ok then\n"he said ""hi"" 1",ok then\n',
        right=(('he said hi" 0"', "ok then"), ('he said "hi" 1', "ok then")),
        notices=("1 rows have a quote in a quoted field that isn't doubled",),
    ),
    Case(
        name="unclosed_quote.csv",
        content=b'q,a\n"never closed,x\n' + table(end="\n").encode()[4:],
        right=QA,
        dropped={"a quote that never closes": 1},
        notices=("row 1: a quote never closes",),
    ),
    Case(
        name="too_many_fields.csv",
        content=table(end="\n").encode() + b"Hello, world,Hi\nYes,No,,\n",
        right=(*QA, ("Yes", "No")),
        dropped={"more fields than the header has": 1},
        notices=("row 5: 3 fields, and the header has 2",),
    ),
    Case(
        name="too_few_fields.csv",
        content=table(end="\n").encode() + b"alone\n",
        right=QA,
        dropped={"column 'a' is missing": 1},
    ),
    Case(
        name="dup_columns.csv",
        content=b"q,a,q\none,two,WRONG\n",
        right=(("one", "two"),),
        notices=("has 2 columns 'q': the first one is read",),
    ),
    Case(name="header_spaces.csv", content=b" q , a\none,two\n", right=(("one", "two"),)),
    Case(name="blank_lines.csv", content=b"\nq,a\n\none,two\n\n", right=(("one", "two"),)),
    Case(
        name="index_column.csv",
        content=b",q,a\n0,one,two\n1,three,4\n",
        right=(("one", "two"), ("three", "4")),
    ),
    Case(
        name="missing_values.csv",
        content=b"q,a\none,two\nthree,NaN\nfour,\nfive,null\nsix,N/A\n",
        right=(("one", "two"),),
        dropped={"column 'a' is missing": 4},
    ),
    Case(
        name="latin1.csv",
        content="".join(f"{q};{a}\n" for q, a in (("q", "a"), *FRENCH)).encode("latin-1"),
        right=FRENCH,
        notices=("it is read as cp1252", "semicolons"),
    ),
    Case(
        name="one_column.csv",
        content=b'text\nHello there\n"Yes, you"\n',
        settings=DatasetType(field_instruction="text"),
        right=(("H", "ello there"), ("Y", "es, you")),
    ),
    Case(
        name="no_such_column.csv",
        content=b"question,a\none,two\n",
        refusal="no row has the column 'q'; the columns of row 1 are 'question', 'a'",
    ),
    Case(
        name="long_field.csv",
        content=b"q,a\n" + b"x" * 200_000 + b",y\none,two\n",
        right=(("one", "two"),),
        dropped={"longer than 4096 tokens": 1},
    ),
    Case(name="mixed_ends.csv", content=b"q,a\r\none,two\nthree,four\rfive,six\n", right=MIXED),
    Case(name="comma_at_end.csv", content=b"q,a,\none,two,\n", right=(("one", "two"),)),
    Case(name="only_header.csv", content=b"q,a\n", refusal="holds no rows"),
    Case(name="really_json.csv", content=dumped(ROWS), right=QA),
    Case(name="called_json.json", content=table().encode(), right=QA, notices=("is CSV, though",)),
    Case(
        name="called_parquet.parquet",
        content=table(";").encode(),
        right=QA,
        notices=("is CSV, though its format is called parquet", "semicolons"),
    ),
    Case(
        name="unnamed_in_json.json",
        content=b"question,a\none,two\n",
        refusal="it begins with 'question,a\\none,two\\n', not with [ or {; if it is CSV or Parquet, name",
    ),
)
