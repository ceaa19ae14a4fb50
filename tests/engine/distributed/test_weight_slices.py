"""A model without its weights reads the rows that it would have had with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from trainer_node.engine.distributed.process_group import SINGLE_PROCESS
from trainer_node.engine.distributed.sharding import _fill, first_values
from trainer_node.engine.distributed.weight_slices import (
    WeightFiles,
    cut,
    rows_of,
    slices_of,
    without_weights,
)
from trainer_node.engine.model.label_model import LabelModel
from trainer_node.engine.model.loading import load_model, load_unread

WORLD = 3


def _rows(folder: Path, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a process reads of each weight, in the dtype that the model has."""
    model = without_weights(load_unread(str(folder), dtype), str(folder), rank, WORLD, dtype)
    slices = slices_of(model)
    assert slices is not None
    weights = dict(model.named_parameters(remove_duplicate=False))
    assert all(weight.is_meta for weight in weights.values())
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    return {
        name: slices[name](*rows_of(len(weight), rank, WORLD)).to(weight.dtype)
        for name, weight in weights.items()
    }


@pytest.mark.parametrize("stored", ["safetensors", "pickled", "another tied name", "next to others", "parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_processes_together_read_the_whole_model(
    tiny_model: Path, tmp_path: Path, dtype: torch.dtype, stored: str
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    if stored == "pickled":
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    if stored == "another tied name":
        state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    if stored in ("next to others", "parts"):  # of a copy that is no longer what the model is
        stale = {name: value + 1.0 for name, value in state.items()}
        for name in ("model_ema", "model-00003-of-00003", "adapter_model", "training_state"):
            save_file(stale, folder / f"{name}.safetensors", {"format": "pt"})
    if stored == "next to others":  # transformers looks at the index only without a single file
        _write_index(folder, dict.fromkeys(state, "model_ema.safetensors"))
    if stored == "parts":
        _in_parts(folder, state)
    wanted = dict(load_model(str(folder), dtype).named_parameters(remove_duplicate=False))
    parts = [_rows(folder, rank, dtype) for rank in range(WORLD)]
    assert parts[0].keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), weight), name


def _in_parts(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Store a model's weights in two files and an index."""
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(state)}
    for file in set(files.values()):
        part = {name: value for name, value in state.items() if files[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    _write_index(folder, files)


def _write_index(folder: Path, files: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_folder_without_a_configuration_is_read_as_something_else(tiny_model: Path, tmp_path: Path) -> None:
    """Such as GGUF: what safetensors there are next to it is not what is loaded."""
    assert WeightFiles(str(tiny_model)).shape("model.norm.weight") == (64,)
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "config.json").unlink()
    assert WeightFiles(str(folder)).shape("model.norm.weight") is None


def test_a_file_that_the_configuration_names_is_the_one(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    save_file({name: value + 1.0 for name, value in state.items()}, folder / "another.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "another.safetensors"}))
    wanted = dict(load_model(str(folder), torch.float32).named_parameters())
    parts = [_rows(folder, rank, torch.float32) for rank in range(WORLD)]
    for name, weight in wanted.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), weight), name


def test_buffers_stay_as_they_are(tiny_model: Path) -> None:
    """Rotary frequencies are fp32 whatever the weights are."""
    model = load_unread(str(tiny_model), torch.bfloat16)
    wanted = {name: value.clone() for name, value in load_model(str(tiny_model), "bfloat16").named_buffers()}
    empty = without_weights(model, str(tiny_model), 0, WORLD, torch.bfloat16)
    assert wanted
    for name, value in empty.named_buffers():
        assert value.dtype == wanted[name].dtype
        assert torch.equal(value, wanted[name])


def test_buffers_that_are_stored_are_cast_wherever_they_are(tiny_model: Path) -> None:
    """As transformers loads them; two layers share one, and what has a dtype of its own keeps it."""
    model = load_unread(str(tiny_model), torch.bfloat16)
    layers, scale = model.model.layers, torch.rand(3)
    for layer in layers:
        layer.register_buffer("scale", scale)
        layer.register_buffer("table", torch.rand(3), persistent=False)
        layer.register_buffer("count", torch.arange(3))
        layer.register_buffer("exact", torch.rand(3).double())
    without_weights(model, str(tiny_model), 0, WORLD, torch.bfloat16)
    for layer in layers:
        kinds = [getattr(layer, name).dtype for name in ("scale", "table", "count", "exact")]
        assert kinds == [torch.bfloat16, torch.float32, torch.int64, torch.float64]
        assert torch.equal(layer.scale, scale.bfloat16())
    assert layers[0].scale is layers[1].scale


def test_a_buffer_that_two_modules_share_is_filled_in_both(tiny_model: Path) -> None:
    network = load_unread(str(tiny_model), torch.float32)
    table = torch.rand(3)
    for layer in network.model.layers:
        layer.register_buffer("table", table, persistent=False)
    empty = without_weights(network, str(tiny_model), 0, 1, torch.float32)
    slices = slices_of(empty)
    assert slices is not None
    _fill(LabelModel(empty, bf16=False), SINGLE_PROCESS, first_values(empty, slices, SINGLE_PROCESS))
    tables = [layer.table for layer in network.model.layers]
    assert all(torch.equal(found, table) for found in tables)
    assert tables[0] is tables[1]
    wanted = load_model(str(tiny_model), torch.float32)
    found = dict(network.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in wanted.named_parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_model_keeps_in_fp32_stays_so(
    dtype: torch.dtype, stored: torch.dtype, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a model that is stored in fp32 nothing shows which weights those are."""
    folder = tmp_path / "model"
    load_model(str(tiny_model), stored).save_pretrained(folder)
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    wanted = dict(load_model(str(folder), dtype).named_parameters(remove_duplicate=False))
    assert wanted["model.layers.0.input_layernorm.weight"].dtype is torch.float32
    assert wanted["model.norm.weight"].dtype is dtype
    parts = [_rows(folder, rank, dtype) for rank in range(WORLD)]
    for name, weight in wanted.items():
        assert parts[0][name].dtype is weight.dtype, name
        assert torch.equal(torch.cat([part[name] for part in parts]), weight), name


def test_a_model_with_its_weights_has_no_slices(tiny_model: Path) -> None:
    assert slices_of(load_model(str(tiny_model), "float32")) is None


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9])
def test_rows_are_cut_as_torch_cuts_them(count: int) -> None:
    whole = torch.arange(count)
    chunks = whole.chunk(4) if count else ()
    for rank in range(4):
        first, end = rows_of(count, rank, 4)
        wanted = chunks[rank] if rank < len(chunks) else whole[:0]
        assert torch.equal(cut([whole[:2], whole[2:]], first, end), wanted)
