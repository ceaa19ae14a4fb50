"""Imports point one way, and what must boot fast doesn't carry torch."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OURS = {"shared", "gateway", "trainer_node", "podium", "bench"}
ALLOWED = {
    "shared": {"shared"},
    "gateway": {"gateway", "shared"},
    "trainer_node": {"trainer_node", "shared"},
    "podium": {"podium", "gateway", "trainer_node", "shared"},
}
ENGINE_MAY = {
    "shared.messages",
    "shared.clock",
    "shared.errors",
    "shared.files",
    "shared.json_files",
    "shared.net",
    "shared.planning",
    "shared.processes",
    "shared.self_test",
}
SHARED_MAY = set(sys.stdlib_module_names) | {"shared", "msgspec", "nats", "nkeys", "structlog"}
MOST_IMPORT_S = 1.0  # .5 to .8 s with eight processes on two cores
TRAINING_LIBRARIES = {"torch", "transformers", "peft", "safetensors", "gguf"}
CLIENTS = {"aiohttp", "nats"}  # half of the time; a command loads them when it runs


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_packages_import_in_one_direction(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files(package)
        for module in imports(path)
        if (top := module.partition(".")[0]) in OURS and top not in ALLOWED[package]
    ]
    assert not wrong


def test_shared_needs_little() -> None:
    wrong = {m.partition(".")[0] for path in files("shared") for m in imports(path)} - SHARED_MAY
    assert not wrong


def test_engine_knows_nothing_of_services() -> None:
    wrong = [
        f"{path.name} imports {module}"
        for path in files("trainer_node/engine")
        for module in imports(path)
        if module.startswith(("shared", "trainer_node", "nats", "aiohttp"))
        and not module.startswith("trainer_node.engine")
        and not any(module == allowed or module.startswith(allowed + ".") for allowed in ENGINE_MAY)
    ]
    assert not wrong


def test_only_the_engine_imports_training_libraries_at_the_top() -> None:
    # podium's commands load them inside run(), in a process that is there for nothing else
    for package in ("shared", "gateway", "trainer_node"):
        for path in files(package):
            if path.is_relative_to(ROOT / "trainer_node" / "engine"):
                continue
            assert not {m.partition(".")[0] for m in imports(path)} & TRAINING_LIBRARIES, path


def cpu_seconds() -> float:
    """CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.alone
@pytest.mark.parametrize(
    "modules",
    ["gateway.__main__, gateway.server", "trainer_node.__main__, trainer_node.node", "podium.__main__"],
)
def test_services_load_without_torch_and_fast(modules: str) -> None:
    commands = modules == "podium.__main__"
    code = f"import sys, {modules}\n" + ("podium.__main__.parser()\n" if commands else "")
    code += f"print(sorted(set(sys.modules) & {TRAINING_LIBRARIES | (CLIENTS if commands else set())!r}))"
    seconds = []
    # The best of three, in CPU time: this machine may be busy, the first one writes caches.
    for _ in range(3):
        began = cpu_seconds()
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        seconds.append(cpu_seconds() - began)
        assert done.stdout.strip() == "[]"
        if seconds[-1] < MOST_IMPORT_S:
            break
    assert min(seconds) < MOST_IMPORT_S
