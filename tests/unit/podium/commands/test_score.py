"""`podium score` names a model's configuration that it can't use."""

from __future__ import annotations

from pathlib import Path

import pytest

from podium.commands.score import tokenizer_of
from shared.errors import EngineError


@pytest.mark.parametrize("content", [b"", b"[]", b'{"more": ' + b"[" * 100_000, b'{"_name_or_path": "\xff"}'])
def test_a_damaged_configuration_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(EngineError, match=r"config\.json is no configuration"):
        tokenizer_of(str(tmp_path))


@pytest.mark.parametrize("content", [b"{}", b'{"_name_or_path": 7}'])
def test_a_configuration_without_a_base_model_asks_for_the_tokenizer(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(EngineError, match="with --tokenizer"):
        tokenizer_of(str(tmp_path))
