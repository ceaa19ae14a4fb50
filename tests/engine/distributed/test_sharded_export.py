"""Submissions that several processes write: as one would, and what one of them can't all of them know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.architectures.samples import SAMPLES
from bench.architectures.zoo import build
from tests.engine.distributed.sharded_run import run_together

SIDE = Path(__file__).with_name("export_side.py")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny GPT-2, whose matrices are held the other way round."""
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    build(next(sample for sample in SAMPLES if sample.name == "gpt2")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def uneven(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model, with norms that aren't 1."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("uneven") / "model"))
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(2)
    changed = {name: one + 0.1 * torch.rand(len(one)) for name, one in tensors.items() if one.dim() == 1}
    save_file({**tensors, **changed}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Mixtral, whose experts are published one by one."""
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    build(next(sample for sample in SAMPLES if sample.name == "mixtral")).save_pretrained(folder)
    return folder


def _said(model: Path, folder: Path, cases: Sequence[str]) -> dict[str, list[str]]:
    """What both processes say of each case."""
    run_together(2, [str(SIDE), str(model), str(folder), *cases])
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {case: [said[case] for said in ranks] for case in cases}


def test_matrices_that_are_held_the_other_way_round_are_written_as_by_one(gpt2: Path, tmp_path: Path) -> None:
    _said(gpt2, tmp_path, ["alike-lora-float32", "alike-dense-float32", "alike-mixed-bfloat16"])


def test_a_repaired_model_is_written_as_by_one(uneven: Path, tmp_path: Path) -> None:
    """An adapter can't hold weights that were repaired and aren't trained whole; here up_proj may be."""
    said = _said(uneven, tmp_path, ["repaired-lora-up_proj", "repaired-mixed-up_proj", "repaired-dense-norm"])
    assert said == {
        "repaired-lora-up_proj": ["model", "model"],
        "repaired-mixed-up_proj": ["adapter", "adapter"],
        "repaired-dense-norm": ["model", "model"],
    }


def test_what_a_model_keeps_in_fp32_is_written_so(uneven: Path, tmp_path: Path) -> None:
    cases = ["kept-lora-float32", "kept-mixed-bfloat16"]
    assert _said(uneven, tmp_path, cases) == {case: ["torch.float32"] * 2 for case in cases}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_what_an_export_loads_is_what_time_is_kept_for(
    kind: str, tiny_model: Path, mixtral: Path, tmp_path: Path
) -> None:
    """Once to gather sharded weights in, once to compare dense matrices with: if names are others."""
    said = _said(mixtral if kind == "mixtral" else tiny_model, tmp_path, ["loads-lora", "loads-dense"])
    lora, dense = ("1", "2") if kind == "mixtral" else ("0", "0")
    assert said == {"loads-lora": [lora, "0"], "loads-dense": [dense, "0"]}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_one_process_can_not_all_raise(kind: str, tiny_model: Path, gpt2: Path, tmp_path: Path) -> None:
    """`finish` deletes checkpoints on a full disk, and all processes write again."""
    found = _said(gpt2 if kind == "gpt2" else tiny_model, tmp_path, list(ERRORS))
    assert found == {case: [error] * 2 for case, error in ERRORS.items()}


ERRORS = {
    "failing-config": "OSError: [Errno 28] No space left on device",
    "failing-room": "OSError: [Errno 28] No space left on device",
    "failing-rows": "OSError: [Errno 5] Input/output error",
    "failing-memory": "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB",
}
