"""Which files of Podium a contest container needs: the runner, the engine, and what they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PACKAGES: Final = ("shared", "trainer_node")
# Processes of a contest container: the runner, the worker, and the process that exports early.
STARTED: Final = (
    "trainer_node.contest.__main__",
    "trainer_node.engine.__main__",
    "trainer_node.engine.early_export",
)


def needed_files(root: Path) -> list[Path]:
    """Return the files that the started modules need, relative to `root`; each package's own file too."""
    waiting = [root / file for name in STARTED if (file := _file(root, name))]
    found = set[Path]()
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        found.update(_packages(path, root))
        waiting += [root / file for name in imported(path) if (file := _file(root, name))]
    return sorted(path.relative_to(root) for path in found)


def missing_modules(root: Path) -> list[str]:
    """Return `file imports module` for each module of ours that a repository's files import and it lacks."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return [
        f"{path.relative_to(root)} imports {name}"
        for path in paths
        for name in _modules(path)
        if not _file(root, name)
    ]


def imported(path: Path) -> Iterator[str]:
    """Yield every module of ours that a file may import: `from a import b` may mean the module a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] in PACKAGES)


def _modules(path: Path) -> Iterator[str]:
    """Yield the modules of ours that a file surely imports."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # reported as such
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in PACKAGES:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in PACKAGES)


def _file(root: Path, module: str) -> Path | None:
    """Return a module's file relative to `root`; None if there is no such module."""
    path = Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (root / candidate).is_file():
            return candidate
    return None


def _packages(path: Path, root: Path) -> Iterator[Path]:
    """Yield the `__init__.py` of every package around a file."""
    for folder in path.parents:
        if folder == root:
            return
        if (folder / "__init__.py").is_file():
            yield folder / "__init__.py"
