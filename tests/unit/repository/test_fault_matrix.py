"""The fault matrix in docs/guarantees.md names the tests there are, and all of them."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[3]
ROWS = [f"F{number}" for number in range(1, 20)]
CAN_NOT_RUN = {"F11"}


def marked() -> dict[str, set[str]]:
    """Row -> the tests that carry its mark."""
    found = defaultdict(set)
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.fault":
                    for row in call.args:
                        found[ast.literal_eval(row)].add(node.name)
    return found


def test_the_table_names_every_rows_tests() -> None:
    lines = re.findall(r"(?m)^\| (F\d+) \|(.*)\|$", (ROOT / "docs" / "guarantees.md").read_text())
    documented = {row: set(re.findall(r"`(test_\w+)`", cells)) for row, cells in lines}
    assert list(documented) == ROWS
    assert {row: names for row, names in documented.items() if names} == marked()
    assert {row for row, names in documented.items() if not names} == CAN_NOT_RUN
    assert "can't run here" in dict(lines)["F11"]
