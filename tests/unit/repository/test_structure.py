"""Hold the structure to its bounds: no circle, no upward import, no crowded folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.conformance.structure import Structure, find_circles, is_upward, measure

ROOT = Path(__file__).parents[3]
MOST_FILES = 16


@pytest.fixture(scope="module")
def structure() -> Structure:
    return measure(ROOT)


def test_no_folder_is_crowded(structure: Structure) -> None:
    crowded = {folder: count for folder, count in structure.largest_folders.items() if count > MOST_FILES}
    assert not crowded


def test_no_module_imports_in_a_circle(structure: Structure) -> None:
    assert not structure.circles


def test_imports_go_down_the_layers(structure: Structure) -> None:
    assert not structure.upward_imports


def test_few_functions_are_long(structure: Structure) -> None:
    assert len(structure.long_functions) <= 0.01 * structure.functions, structure.long_functions


def test_bench_imports_no_tests() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "bench").rglob("*.py")
        if "from tests" in path.read_text() or "import tests" in path.read_text()
    ]
    assert not wrong


def test_a_circle_is_found() -> None:
    assert find_circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a <-> b <-> c"]


@pytest.mark.parametrize(
    ("importer", "imports", "upward"),
    [
        ("gateway.service", "gateway.api.v1", True),
        ("gateway.api.v1", "gateway.service", False),
        ("gateway.state.ledger", "gateway.state.mirror", False),  # inside one folder
        ("trainer_node.engine.evaluate.metric", "trainer_node.engine.train.loop", True),
        ("shared.broker.bus", "shared.errors", False),
        ("podium.commands.up", "shared.errors", False),  # another package
    ],
)
def test_layers(importer: str, imports: str, upward: bool) -> None:
    assert is_upward(importer, imports) is upward


def test_no_class_name_means_two_things(structure: Structure) -> None:
    assert not structure.two_meanings


def test_no_retired_word_is_left(structure: Structure) -> None:
    product = [word for word in structure.retired_words if not word.startswith("bench/")]
    assert not product, (
        "docs/glossary.md and RETIRED in bench/conformance/structure.py say what to write instead"
    )
