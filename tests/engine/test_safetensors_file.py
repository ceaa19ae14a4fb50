"""Safetensors files, as they are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.files import file_digest
from trainer_node.engine import safetensors_file


def test_the_hash_made_while_writing_is_the_file_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "PIECE", 64)  # many pieces
    path = tmp_path / "x.safetensors"
    entry = safetensors_file.write_tensors(
        path, {"x": torch.randn(100), "y": torch.ones(3, dtype=torch.int32)}
    )
    assert entry.bytes == path.stat().st_size
    assert entry.sha256 == file_digest(path)
    assert load_file(path)["x"].shape == (100,)
