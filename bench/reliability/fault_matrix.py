"""Run the fault matrix of docs/guarantees.md: the tests of each row, repeated.

    python -m bench faults                          # every row, each of its tests 10 times
    python -m bench faults --rows F2,F9 --times 100

The tests use real processes: nats-server, gateways, nodes, workers. A row's N is the number of its tests
that ran to a verdict; a skipped test gives its reason. For thousands of random faults: python -m bench
chaos. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
import pytest
from msgspec import Struct

ROOT = Path(__file__).parents[2]
REPETITION = "fault_repetition"
ROWS = [f"F{number}" for number in range(1, 20)]


class Row(Struct):
    """Counts of one row."""

    runs: int = 0
    violations: int = 0
    skipped: int = 0
    failed: list[str] = []
    reasons: list[str] = []


class Matrix:
    """A pytest plugin that keeps only the wanted rows' tests, repeats them, and counts by row."""

    def __init__(self, wanted: set[str], times: int) -> None:
        self.wanted = wanted
        self.times = times
        self.rows = {row: Row() for row in ROWS if row in wanted}
        self._rows_of: dict[str, list[str]] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run every marked test so many times."""
        if any(metafunc.definition.iter_markers("fault")):
            metafunc.fixturenames.append(REPETITION)
            metafunc.parametrize(REPETITION, range(self.times), ids=lambda number: f"#{number + 1}")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Drop what belongs to no wanted row."""
        for item in items:
            rows = [row for marker in item.iter_markers("fault") for row in marker.args]
            if found := [row for row in rows if row in self.wanted]:
                self._rows_of[item.nodeid] = found
        dropped = [item for item in items if item.nodeid not in self._rows_of]
        items[:] = [item for item in items if item.nodeid in self._rows_of]
        config.hook.pytest_deselected(items=dropped)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one test's end."""
        for name in self._rows_of[report.nodeid]:
            row = self.rows[name]
            if report.skipped:
                row.skipped += 1
                reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
                row.reasons += [reason] if reason not in row.reasons else []
            elif report.failed:
                row.violations += 1
                row.failed.append(report.nodeid)
            if report.when == "call" and not report.skipped:
                row.runs += 1


def table(matrix: Matrix) -> str:
    """Return the rows as a table."""
    lines = ["| row | N | violations | skipped |", "| --- | --- | --- | --- |"]
    for name, row in matrix.rows.items():
        lines.append(f"| {name} | {row.runs} | {row.violations} | {row.skipped} |")
    return "\n".join(lines)


def main() -> int:
    """Run the wanted rows; 1 if any fault did what it must not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="such as F2,F9 (default: all)")
    parser.add_argument("--times", type=int, default=10, help="runs of each test (default: 10)")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    args = parser.parse_args()
    matrix = Matrix(set(args.rows.split(",")), args.times)
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *args.pytest]
    status = pytest.main(
        [*options, str(ROOT / "tests" / "integration"), str(ROOT / "tests" / "e2e")], [matrix]
    )
    for name, row in matrix.rows.items():
        for test in row.failed:
            print("VIOLATION", name, test)
        for reason in row.reasons:
            print("SKIPPED", name, reason)
    print(table(matrix))
    violations = sum(row.violations for row in matrix.rows.values())
    summary = {
        "rows": {name: row.runs for name, row in matrix.rows.items() if row.runs},
        "faults": sum(row.runs for row in matrix.rows.values()),
        "skipped": sum(row.skipped for row in matrix.rows.values()),
        "violations": violations,
    }
    print(msgspec.json.encode(summary).decode())
    return int(violations > 0 or status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED))


if __name__ == "__main__":
    sys.exit(main())
