"""Upstream's hash, by its definition: which files count, in which order, how they are joined."""

from __future__ import annotations

import hashlib
from pathlib import Path

from trainer_node.artifacts.model_hash import model_hash


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_weights_and_configuration_count_in_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "README.md").write_bytes(b"a card")
    (tmp_path / "config.json").write_bytes(b"")  # an empty file counts as none
    joined = f"adapter_config.json:{sha(b'{}')}adapter_model.safetensors:{sha(b'weights')}"
    assert model_hash(tmp_path) == sha(joined.encode())


def test_the_parts_of_a_large_model_count_each(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    assert model_hash(tmp_path) == sha("".join(f"{name}:{sha(name.encode())}" for name in names).encode())


def test_a_folder_without_weights_has_none(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing here")
    assert model_hash(tmp_path) is None
