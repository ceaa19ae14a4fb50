"""Help that reads well: every command has examples, each example is a valid command line."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

from podium.__main__ import main, parser
from podium.arguments import hours, nearest


def commands(
    top: argparse.ArgumentParser | None = None, words: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """Yield each command's words, also those that have commands of their own."""
    for action in (top or parser())._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield (*words, name)
                yield from commands(command, (*words, name))


ALL = list(commands())


def help_of(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_example_is_a_command_line(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(words, capsys)
    lines = [line.strip() for line in text.partition("examples:\n")[2].splitlines() if line.strip()]
    assert lines, "each command's help ends with examples"
    for line in lines:
        name, *arguments = shlex.split(line)
        assert name == "podium"
        assert arguments[: len(words)] == list(words)
        parser().parse_args(arguments)  # raises SystemExit if it is none


def test_help_lists_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of((), capsys)
    assert all(re.search(rf"^ +{words[0]}\b", text, re.MULTILINE) for words in ALL)
    assert re.search(r"^ +3 +offer: the offer was rejected$", text, re.MULTILINE)


@pytest.mark.parametrize("words", [words for words in ALL if words[0] not in ("up", "demo")], ids=" ".join)
def test_lines_of_help_fit_80_columns(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = help_of(words, capsys).partition("options:")[2].partition("examples:")[0]
    assert max(map(len, options.splitlines()), default=0) <= 80


@pytest.mark.parametrize(
    ("text", "expected"), [("4", 4.0), ("0.5", 0.5), ("30m", 0.5), ("90s", 0.025), ("2h", 2.0), (".5H", 0.5)]
)
def test_times_are_hours_or_name_their_unit(text: str, expected: float) -> None:
    assert hours(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "0", "-1", "soon", "5 minutes", "1e9", "nan", "m"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="30m"):
        hours(text)


def test_the_nearest_name_is_suggested_or_all_are_listed() -> None:
    assert nearest("statsu", ["status", "watch"]) == "there is no 'statsu'; is 'status' meant?"
    assert nearest("hours", ["model", "hours_to_complete"], "field").endswith("is 'hours_to_complete' meant?")
    assert nearest("xyz", ["a", "b"]) == "there is no 'xyz'; choose from a, b"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_knows_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(words[0] in script for words in ALL)
    assert "preview" in script
