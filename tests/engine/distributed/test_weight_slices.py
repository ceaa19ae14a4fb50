"""A model without its weights reads the rows that it would have had with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer_node.engine.distributed.weight_slices import cut, rows_of, slices_of, without_weights
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


@pytest.mark.parametrize("stored", ["safetensors", "pickled", "another tied name"])
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
    wanted = dict(load_model(str(folder), dtype).named_parameters(remove_duplicate=False))
    parts = [_rows(folder, rank, dtype) for rank in range(WORLD)]
    assert parts[0].keys() == wanted.keys()
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
