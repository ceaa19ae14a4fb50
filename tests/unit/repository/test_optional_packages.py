"""Packages that `make setup` doesn't install: lint must pass without them, as it does in a new clone."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
OPTIONAL_GROUPS = ("bench", "oracle")


def test_mypy_does_not_need_them() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = settings["dependency-groups"]
    named = {module_of(requirement) for group in OPTIONAL_GROUPS for requirement in groups[group]}
    optional = named & imported()
    ignored = {
        module.partition(".")[0]
        for override in settings["tool"]["mypy"]["overrides"]
        if override.get("ignore_missing_imports")
        for module in override["module"]
    }
    assert {"fastapi", "uvicorn"} <= optional, "the test finds what it is about"
    assert optional <= ignored, f"mypy fails in a new clone: {sorted(optional - ignored)}"


def module_of(requirement: str) -> str:
    """Return the module's name of a requirement such as `uvicorn[standard]>=0.34`."""
    return re.split(r"[\[<>=!~; ]", requirement)[0].replace("-", "_")


def imported() -> set[str]:
    """Return the top-level names of all modules that `bench` and `tests` import."""
    found = set()
    for folder in ("bench", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.partition(".")[0])
    return found
