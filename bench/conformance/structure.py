"""Measure the structure of the code: folders, circles, upward imports, long functions, names, retired words.

    python -m bench structure [--root CHECKOUT] [--list]

Nothing is imported or run: the files are parsed. `--root` measures another checkout, `--list` names each
finding. The last line is one JSON object. tests/unit/repository/test_structure.py
holds the figures to their bounds.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

PACKAGES = ("shared", "gateway", "trainer_node", "podium", "bench")
LONG_FUNCTION_LINES = 40

# Lower layers stand first. A module imports from its own name or from layers above its line, never from a
# name on the same line or below. Names are files or folders directly inside the package.
LAYERS: dict[str, tuple[str, ...]] = {
    "shared": (
        "version clock messages subjects logs aio processes",
        "errors files net",
        "self_test",
        "planning",
        "settings",
        "settings_sources",
        "broker",
    ),
    "gateway": (
        "errors connections http_request problem_details watched_file",
        "state",
        "learning operations broker_link",
        "policy views expiry",
        "telemetry offers",
        "admission nats_offers",
        "relocation",
        "parts",
        "service",
        "upstream dashboard",
        "api",
        "server",
        "__main__",
    ),
    "trainer_node": (
        "lease hardware fault_injection transfer_rates",
        "worker heartbeat",
        "context self_test",
        "artifacts",
        "job",
        "control contest",
        "node",
        "__main__",
    ),
    "trainer_node.engine": (
        "signals reporter time_budget safetensors_file",
        "limits memory",
        "data",
        "model objectives",
        "distributed",
        "context",
        "evaluate",
        "damage",
        "train",
        "export prepare failure",
        "submission",
        "assemble finish",
        "as_is",
        "search",
        "pipeline self_test early_export",
        "__main__",
    ),
    "podium": ("client console security simulation demo entry", "local tracking", "diagnostics", "commands"),
    "bench": (
        "fake_validator",
        "harness",
        "conformance deadline rows",
        "gpu",
        "performance",
        "reliability arena",
        "regret",
        "ablations",
        "slots",
    ),
}

# Words of a private vocabulary, each with what to say. Code, texts and documents must be free of them.
RETIRED: dict[str, str] = {
    r"\banew\b": "again, restart",
    r"\bwhoever\b": "name who",
    r"\bbeside\b": "next to, alongside, during",
    r"\bfor want of\b": "without",
    r"\bstands? there\b": "is, exists",
    r"\blast word\b": "outcome",
    r"\blets? go of\b": "release",
    r"\bsa(?:id|ys) so\b": "reports it",
    r"\b(?:is|are|was|were|be) (?:told|heard)\b": "reported, received",
    r"\btak(?:es?|en|ing) in\b": "apply, read",
}


class Structure(msgspec.Struct, frozen=True):
    """The figures of one checkout."""

    files: int
    largest_folders: dict[str, int]  # folder -> Python files in it, __init__.py not counted
    circles: list[str]
    upward_imports: list[str]
    long_functions: list[str]
    functions: int
    two_meanings: dict[str, list[str]]  # class name -> the modules that define it
    retired_words: list[str]


def module_of(path: Path, root: Path) -> str:
    """Return the dotted name of a file."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and name of each of our modules that a file imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                name = inner if inner in modules else node.module
                if name in modules:
                    yield node.lineno, name


def find_circles(graph: dict[str, set[str]]) -> list[str]:
    """Return the groups of modules that import each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[str] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = [stack.pop()]
            while group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(" <-> ".join(sorted(group)))

    for name in graph:
        if name not in index:
            visit(name)
    return sorted(found)


def layer_of(module: str) -> tuple[str, int, str] | None:
    """Return the package, the number of the layer and the name inside the package; None if unlayered."""
    for package in sorted(LAYERS, key=len, reverse=True):
        if module.startswith(package + "."):
            name = module[len(package) + 1 :].partition(".")[0]
            for number, line in enumerate(LAYERS[package]):
                if name in line.split():
                    return package, number, name
    return None


def is_upward(importer: str, imports: str) -> bool:
    """Return whether an import goes to the same layer or a higher one of the same package."""
    here, there = layer_of(importer), layer_of(imports)
    return bool(here and there and here[0] == there[0] and here[2] != there[2] and there[1] >= here[1])


def retired_in(path: Path, root: Path) -> Iterator[str]:
    """Yield each retired word of a file, with its line."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for pattern in RETIRED:
            for match in re.finditer(pattern, line, re.IGNORECASE):
                yield f"{path.relative_to(root)}:{number}: {match[0]}"


def measure(root: Path) -> Structure:
    """Parse every Python file of a checkout and count."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    trees = {module_of(path, root): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    modules = set(trees)
    graph: dict[str, set[str]] = {name: set() for name in modules}
    upward: list[str] = []
    functions, long_functions = 0, []
    classes: dict[str, list[str]] = defaultdict(list)
    for name, tree in trees.items():
        for line, other in imported(tree, modules):
            if other != name:
                graph[name].add(other)
            if is_upward(name, other):
                upward.append(f"{name}:{line} imports {other}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions += 1
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONG_FUNCTION_LINES:
                    long_functions.append(f"{name}.{node.name}: {lines} lines")
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not name.startswith("bench"):
                classes[node.name].append(name)
    folders = Counter(str(path.parent.relative_to(root)) for path in paths if path.name != "__init__.py")
    texts = [path for path in paths if path.name != Path(__file__).name]
    texts += [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return Structure(
        files=len(paths),
        largest_folders=dict(folders.most_common(6)),
        circles=find_circles(graph),
        upward_imports=sorted(upward),
        long_functions=sorted(long_functions),
        functions=functions,
        two_meanings={name: where for name, where in sorted(classes.items()) if len(where) > 1},
        retired_words=[word for path in texts if path.exists() for word in retired_in(path, root)],
    )


def main() -> None:
    """Print the figures, and each finding with `--list`."""
    parser = argparse.ArgumentParser(description="Measure the structure of the code.")
    parser.add_argument("--root", type=Path, default=Path(), help="a checkout (default: this one)")
    parser.add_argument("--list", action="store_true", help="name each finding")
    args = parser.parse_args()
    found = measure(args.root.resolve())
    if args.list:
        for group in (found.circles, found.upward_imports, found.long_functions, found.retired_words):
            print(*group, sep="\n")
        print(*(f"{name}: {', '.join(where)}" for name, where in found.two_meanings.items()), sep="\n")
    print(
        json.dumps(
            {
                "files": found.files,
                "largest_folders": found.largest_folders,
                "circles": len(found.circles),
                "upward_imports": len(found.upward_imports),
                "long_functions": len(found.long_functions),
                "long_functions_share": round(len(found.long_functions) / found.functions, 4),
                "two_meanings": len(found.two_meanings),
                "retired_words": len(found.retired_words),
            }
        )
    )


if __name__ == "__main__":
    main()
