"""`python -m bench`: every bench is listed, and a mistyped name gets a suggestion."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import BENCHES, listing, main

BENCH = Path(__file__).parents[3] / "bench"
# Started by another bench, in a process or an environment of its own.
HELPERS = {
    "ablations.trainer",
    "arena.contestant",
    "regret.grid",
    "evaluator.compat_worker",
    "evaluator.label_worker",
    "evaluator.oracle_worker",
    "tournament.memory_taker",
    "performance.fastapi_gateway",
}


def test_every_bench_with_a_main_is_listed() -> None:
    found = {
        ".".join(path.relative_to(BENCH).with_suffix("").parts)
        for path in BENCH.rglob("*.py")
        if path.parent != BENCH
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "main"
    }
    assert found - HELPERS == {one.module for one in BENCHES.values()}


def test_the_list_names_minutes() -> None:
    assert "chaos" in listing()
    assert "50 min" in listing()


def test_a_mistyped_name_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaoss"]) == 2
    assert "Did you mean 'chaos'?" in capsys.readouterr().err


def test_a_bench_gets_its_arguments() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "structure", "--help"],
        cwd=BENCH.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "--root" in done.stdout
