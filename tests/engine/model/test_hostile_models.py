"""A model's files were written by strangers: whatever is in them ends in a refusal that says why."""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import EngineError
from shared.messages.runs import ErrorCode
from trainer_node.engine.model.loading import load_config, load_model, load_tokenizer
from trainer_node.engine.model.shape import model_shape

Change = Callable[[Path], None]


def config(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def file(name: str, content: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def instead(name: str, content: bytes) -> Change:
    """Weights of another kind."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return change


def header(tensors: dict[str, Any]) -> Change:
    text = json.dumps(tensors).encode()
    return file("model.safetensors", struct.pack("<Q", len(text)) + text)


def gguf(content: bytes) -> Change:
    def change(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        (folder / "model.gguf").write_bytes(content)

    return change


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def tensor(shape: list[int], end: int) -> dict[str, Any]:
    return {"model.embed_tokens.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}


GGUF = b"GGUF" + struct.pack("<I", 3)
CONFIGS: dict[str, tuple[Change, str]] = {
    "text for a number": (config(hidden_size="abc"), "hidden_size"),
    "negative size": (config(hidden_size=-1), "hidden size"),
    "no heads": (config(num_attention_heads=0), "ZeroDivisionError"),
    "layers for hours": (config(num_hidden_layers=10**5), "num_hidden_layers is 100000, and more than 4,096"),
    "experts for hours": (
        config(model_type="mixtral", num_local_experts=10**9),
        "num_local_experts is 1e[+]09, and more than 4,096",
    ),
    "type is a list": (config(model_type=["llama"]), "TypeError"),
    "an unknown activation": (config(hidden_act="__import__('os').system"), "__import__"),
    "a function as dtype": (config(dtype="evil"), "AttributeError"),
    "a list": (file("config.json", b"[1]"), "Unrecognized model"),
    "nested": (file("config.json", b"[" * 200_000), "recursion"),
    "nested objects": (file("config.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "recursion"),
    "no text": (file("config.json", b"\xff\xfe\x00\x01"), "not a valid JSON file"),
    "gguf without a header": (gguf(GGUF), "unpack"),
    "gguf of nothing": (gguf(b""), "empty file"),
    "gguf with endless counts": (gguf(GGUF + struct.pack("<QQ", 2**62, 2**62)), "unpack"),
    "gguf with a huge text": (gguf(GGUF + struct.pack("<QQQ", 0, 1, 2**62) + b"a"), "unpack"),
    "gguf with a huge list": (
        gguf(GGUF + struct.pack("<QQQ", 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**40) + b"\0" * 99),
        "unpack",
    ),
}
WEIGHTS: dict[str, tuple[Change, str]] = {
    "a header beyond the file": (file("model.safetensors", struct.pack("<Q", 9**9) + b"{}"), "header"),
    "a header of 2**63": (file("model.safetensors", struct.pack("<Q", 2**63) + b"{}"), "header too large"),
    "a shape of 4 exabytes": (header(tensor([10**12, 10**6], 4 * 10**18)), "overflow"),
    "a shape that overflows": (header(tensor([2**32, 2**32], 0)), "overflow"),
    "an index outside": (
        file("model.safetensors.index.json", b'{"weight_map": {"a": "../secret.safetensors"}}'),
        "names a file outside of its folder: '../secret.safetensors'",
    ),
    "an index to the root": (
        file("model.safetensors.index.json", b'{"weight_map": {"a": "/etc/passwd"}}'),
        "names a file outside of its folder: '/etc/passwd'",
    ),
    "an index that is a list": (
        file("model.safetensors.index.json", b"[]"),
        "model.safetensors.index.json is no list of its weights",
    ),
    "a nested index": (
        file("model.safetensors.index.json", b"[" * 100_000),
        "model.safetensors.index.json is no list of its weights",
    ),
    "pickled nothing": (instead("pytorch_model.bin", b""), "EOFError"),
    "pickled noise": (instead("pytorch_model.bin", b"noise"), "Weights only load failed"),
    "a broken archive": (instead("pytorch_model.bin", b"PK\x03\x04noise"), "zip archive"),
    "a pickled list": (instead("pytorch_model.bin", saved([1, 2])), "TypeError"),
    "pickled numbers": (instead("pytorch_model.bin", saved({"a": 1})), "lack 21 of"),
    "generation settings that are a list": (file("generation_config.json", b"[]"), "TypeError"),
}
TOKENIZERS: dict[str, tuple[Change, str]] = {
    "nested": (file("tokenizer.json", b"[" * 100_000), "tokenizer|Tokenizer|invalid type"),
    "a list": (file("tokenizer.json", b"[]"), "TypeError"),
    "nothing": (file("tokenizer.json", b""), "Expecting value"),
    "settings that are a list": (file("tokenizer_config.json", b"[]"), "AttributeError"),
    "its own code": (
        file(
            "tokenizer_config.json",
            b'{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["own.Evil", null]}}',
        ),
        "needs code that Podium doesn't run",
    ),
}


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.mark.parametrize(("change", "cause"), CONFIGS.values(), ids=CONFIGS)
def test_configs(change: Change, cause: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(EngineError, match=cause) as caught:
        model_shape(load_config(str(folder)))
    assert caught.value.code in (ErrorCode.UNSUPPORTED, ErrorCode.MODEL_UNAVAILABLE)


@pytest.mark.parametrize(("change", "cause"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights(change: Change, cause: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(EngineError, match=cause) as caught:
        load_model(str(folder), "float32")
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE


@pytest.mark.parametrize(("change", "cause"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers(change: Change, cause: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(EngineError, match=cause) as caught:
        load_tokenizer(str(folder))
    assert caught.value.code in (ErrorCode.UNSUPPORTED, ErrorCode.MODEL_UNAVAILABLE)


def test_what_a_link_leads_to_is_not_told(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password 1234")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
    with pytest.raises(EngineError, match="not a valid JSON file") as caught:
        load_config(str(folder))
    assert "1234" not in str(caught.value)


def test_a_known_type_does_not_run_the_code_next_to_it(folder: Path, tmp_path: Path) -> None:
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": "own.Tokenizer"}
    config(auto_map=own)(folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    load_config(str(folder))
    load_tokenizer(str(folder))
    load_model(str(folder), "float32")
    assert not (tmp_path / "ran").exists()
