"""A docstring of a function is imperative: it begins with what the function does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGES = ("shared", "gateway", "trainer_node", "podium")
NO_VERB = re.compile(
    r"(?:A|All|An|At|Bytes|Every|From|Gradients|How|Of|One|Optimiser|Our|Seconds|Steps|The|This|Training|Until|"
    r"What|When|Where|Whether|Why) "
)


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """The place of each function's docstring in a file, and the docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.get_docstring(node) or ""


def test_docstrings_begin_with_a_verb() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    phrases = [
        f"{place}: {text[:60]}" for path in files for place, text in docstrings(path) if NO_VERB.match(text)
    ]
    assert phrases == [], "write `Return the ...`, `Read ...`"
