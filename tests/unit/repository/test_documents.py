"""What the documents name exists: files, links, benches and commands with their options, settings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.__main__ import BENCHES
from podium.__main__ import parser
from shared.settings import Settings
from shared.settings_sources import PREFIX

ROOT = Path(__file__).parents[3]
FOLDERS = ("bench", "deploy", "docs", "examples", "gateway", "podium", "shared", "tests", "trainer_node")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
PATHS = {path.relative_to(ROOT).as_posix() for path in (*FILES, *ROOT.glob("*")) if path.is_file()}
DOCUMENTS = sorted(path for path in PATHS if path.endswith(".md"))
COMPOSE = "".join(path.read_text() for path in ROOT.glob("docker-compose*.yml"))
SETTINGS = {PREFIX + name.upper() for name in Settings.__struct_fields__} | {f"{PREFIX}CONFIG"}
SETTINGS |= set(re.findall(rf"\$\{{({PREFIX}[A-Z_]+)", COMPOSE))  # variables of compose alone

CODE = re.compile(r"(?s:```.*?```)|`[^`\n]+`|^    \S.*$", re.MULTILINE)
FILE = re.compile(r"(?<![\w/.*-])[\w./-]+\.(?:py|md|sh|yml|toml)(?!\w)")
MODULE = re.compile(r"(?<![\w.$])(?:bench|gateway|shared|trainer_node)(?:\.[a-z]\w*)+(?![\w.*:])")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def code_in(document: str) -> Iterator[str]:
    """Each line of code in a document; a line that ends in a backslash goes on."""
    for match in CODE.finditer(text_of(document)):
        yield from match[0].strip("`").replace("\\\n", " ").splitlines()


def names_a_file(name: str) -> bool:
    """A file by its path from the root, or by the end of its path."""
    return name in PATHS or any(path.endswith(f"/{name}") for path in PATHS)


def commands_in(document: str, program: str) -> Iterator[list[str]]:
    """The words after each mention of a program, up to the end of its command."""
    for line in code_in(document):
        command = line.partition("#")[0]
        for match in re.finditer(rf"(?<![\w./-]){program} +((?:[a-z]|--\w)[^|;&]*)", command):
            yield match[1].split()


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def subcommands(of: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    named = {match[0] for line in code_in(document) for match in FILE.finditer(line)}
    assert [name for name in sorted(named) if not names_a_file(name)] == []


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_modules_that_are_named_exist(document: str) -> None:
    spans = {match[1] for match in re.finditer(r"`([^`\n]+)`", text_of(document))}
    named = {match[0] for span in spans for match in MODULE.finditer(span) if "/" not in span}
    known = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in PATHS}
    known |= {path.rpartition("/")[0].replace("/", ".") for path in PATHS}
    assert sorted(named - known) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    dead = []
    for target in LINK.findall(text_of(document)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        page = (ROOT / document).parent / path if path else ROOT / document
        headings = re.findall(r"(?m)^#+ (.*)$", page.read_text()) if heading and page.is_file() else []
        if not page.exists() or (heading and heading not in map(anchor, headings)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_benches_have_the_options_that_are_named(document: str) -> None:
    wrong = []
    for words in commands_in(document, "python -m bench"):
        name = words[0]
        source = ROOT / "bench" / f"{BENCHES[name].module.replace('.', '/')}.py" if name in BENCHES else None
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        defined = set(re.findall(r'"(--[\w-]+)"', source.read_text())) if source else set()
        wrong += [f"{name} {option}" for option in options - defined]
        wrong += [name] if source is None else []
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_have_the_options_that_are_named(document: str) -> None:
    wrong = []
    for words in commands_in(document, "podium"):
        known: argparse.ArgumentParser = parser()
        of, rest = "podium", list(words)
        while rest and (below := subcommands(known)):
            word = rest.pop(0)
            if word not in below and not word.startswith("-"):
                wrong.append(f"{of} {word}")
                break
            known, of = below.get(word, known), f"{of} {word}"
        options = {word.partition("=")[0] for word in rest if word.startswith("--")}
        wrong += [f"{of} {option}" for option in options - set(known._option_string_actions)]
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_settings_that_are_named_exist(document: str) -> None:
    named = set(re.findall(rf"(?<!\w){PREFIX}[A-Z_]*[A-Z]", text_of(document)))
    assert named <= SETTINGS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_targets_of_make_exist(document: str) -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    named = {words[0] for words in commands_in(document, "make") if words}
    assert named <= targets


def test_the_index_lists_every_page() -> None:
    listed = set(LINK.findall(text_of("docs/README.md")))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in listed if "/" not in name} == pages
