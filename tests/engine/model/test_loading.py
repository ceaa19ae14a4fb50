"""Loading from what is safe, clear refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import EngineError
from shared.messages.runs import ErrorCode
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.evaluate.metric import score_sft
from trainer_node.engine.model.loading import load_config, load_model, load_tokenizer
from trainer_node.engine.model.shape import model_shape

SENTENCEPIECE = Path(__file__).parents[2] / "data" / "sentencepiece" / "tokenizer.model"


def test_config_tokenizer_and_shape(tiny_model: Path) -> None:
    shape = model_shape(load_config(str(tiny_model)))
    assert (shape.hidden, shape.layers, shape.kv_heads, shape.head_dim) == (64, 2, 2, 16)
    assert shape.tied
    assert shape.max_positions == 512
    assert load_tokenizer(str(tiny_model)).eos_token_id == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_come_in_the_asked_dtype(tiny_model: Path, dtype: str) -> None:
    model = load_model(str(tiny_model), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "nowhere.gguf"])
def test_no_such_model(path: str) -> None:
    with pytest.raises(EngineError, match="doesn't exist; name its folder in PODIUM_MODELS") as caught:
        load_model(path, "float32")
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE


def test_an_id_that_no_hub_answers_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EngineError, match=r"nobody/nothing is not on this machine") as caught:
        load_config("nobody/nothing")
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE
    assert "PODIUM_MODELS" in str(caught.value)


def _pickled(tiny_model: Path, folder: Path, content: object) -> str:
    shutil.copytree(tiny_model, folder)
    torch.save(content, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return str(folder)


def test_pickled_tensors_are_loaded(tiny_model: Path, tmp_path: Path) -> None:
    state = load_model(str(tiny_model), "float32").state_dict()
    found = load_model(_pickled(tiny_model, tmp_path / "pickled", state), "float32").state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_quantised_weights_are_refused_by_their_config(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"its weights are quantised \(gptq\)") as caught:
        load_config(str(tmp_path))
    assert caught.value.code is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize("kind", ["mistral3", "qwen2_5_vl", "t5"])
def test_models_without_a_causal_form_are_refused_by_their_config(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(EngineError, match=f"models of type '{kind}' have no causal form") as caught:
        load_config(str(tmp_path))
    assert caught.value.code is ErrorCode.UNSUPPORTED


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.marker), "w")


def test_pickled_code_is_not_run(tiny_model: Path, tmp_path: Path) -> None:
    state = load_model(str(tiny_model), "float32").state_dict()
    path = _pickled(tiny_model, tmp_path / "pickled", {**state, "more": Evil(tmp_path / "ran")})
    with pytest.raises(EngineError) as caught:
        load_model(path, "float32")
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_missing_are_not_made_up(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError, match=r"lack 1 .* such as model.layers.1.mlp.up_proj.weight") as caught:
        load_model(str(folder), "float32")
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE


def test_weights_of_another_size_are_named(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"intermediate_size": 128', '"intermediate_size": 96'))
    with pytest.raises(EngineError, match=f"can't load {folder}") as caught:
        load_model(str(folder), "float32")
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE


def test_cut_weights_are_named(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EngineError, match=f"can't load {folder}") as caught:
        load_model(str(folder), "float32")
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE


def test_a_tokenizer_that_is_sentencepiece_alone(tiny_model: Path, tmp_path: Path) -> None:
    """As older models have it; the ids are those of the sentencepiece library itself."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    shutil.copy(SENTENCEPIECE, folder)
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = load_tokenizer(str(folder))("What is number 17?")["input_ids"]
    assert found == [1, 39, 28, 44, 45, 57]


def test_remote_code_is_not_run(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "custom"
    shutil.copytree(tiny_model, folder)
    text = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "own"')
    text = text.replace(
        "{", '{"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},', 1
    )
    (folder / "config.json").write_text(text)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(EngineError) as caught:
        load_model(str(folder), "float32")
    assert caught.value.code is ErrorCode.UNSUPPORTED
    assert not (tmp_path / "ran").exists()


@pytest.mark.real_model
@pytest.mark.slow
def test_gguf(smollm2: Path, make_examples: Callable[..., Examples]) -> None:
    from podium.demo.model import find_gguf

    gguf = find_gguf()
    assert model_shape(load_config(str(gguf))).layers == 30
    assert load_tokenizer(str(gguf.parent)).eos_token == "<|im_end|>"
    examples = make_examples([20, 40])
    loss = score_sft(load_model(str(gguf), "bfloat16"), examples).loss
    assert loss == pytest.approx(score_sft(load_model(str(smollm2), "bfloat16"), examples).loss, abs=1e-6)
