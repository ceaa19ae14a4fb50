"""A tiny random Llama on disk, the scorer oracle, and examples: what the engine's tests share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shared.messages.encoding import encode
from shared.messages.offers import DatasetType
from shared.messages.runs import OutcomeStatus, decode_worker_job
from shared.planning.model_shape import ModulePlan
from shared.planning.plan import Plan
from tests.engine.worker_run import finish, start_worker, wait_for_checkpoint, write_job, write_rows
from trainer_node.engine.data.examples import IGNORED, Examples

ORACLE = Path(__file__).parents[1] / "data" / "oracle"
SMOLLM2 = Path("~/.cache/podium/smollm2-135m-instruct").expanduser()
VOCAB = 1000

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a 2-layer random Llama (hidden 64, grouped heads) in fp32 with the oracle's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,  # far from uniform predictions, so that an error shows
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ORACLE / "base").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oracle() -> dict[str, Any]:
    """The oracle's cases by name, dataset types decoded."""
    cases = json.loads((ORACLE / "expected.json").read_text())["cases"]
    return {
        case["name"]: {**case, "dataset_type": msgspec.convert(case["dataset_type"], DatasetType)}
        for case in cases
    }


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., Examples]:
    """Makes examples of given lengths: `make_examples([9, 4], seed=0, group=1)`."""
    return _examples


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    """Makes plans for the tiny model: `make_plan("lora" | "dense" | "mixed", rank=4, dtype="float32")`."""
    return _plan


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the converted SmolLM2; skips where `make setup` hasn't run."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip("no converted SmolLM2: run `make setup`")
    return SMOLLM2


@pytest.fixture
def make_job(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a job on the tiny model into a folder of its own; the path of its job.json."""
    data = write_rows(tmp_path)
    return lambda name="run", **changes: write_job(tmp_path / name, tiny_model, data, **changes)


@pytest.fixture(scope="session")
def finished_job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs a job to its end, once for all tests that ask for the same; they read it, or change a copy."""
    folder = tmp_path_factory.mktemp("finished")
    data, jobs = write_rows(folder), dict[str, Path]()

    def run(**changes: Any) -> Path:
        key = repr(sorted(changes.items()))
        if key not in jobs:
            job = write_job(folder / str(len(jobs)), tiny_model, data, **changes)
            outcome = finish(job)
            assert outcome.status is OutcomeStatus.READY, outcome.error
            jobs[key] = job
        return jobs[key]

    return run


@pytest.fixture(scope="session")
def killed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after its first checkpoint, its data inside."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    folder.mkdir()
    job = write_job(folder, tiny_model, write_rows(folder))
    worker = start_worker(job)
    wait_for_checkpoint(job, worker)
    worker.kill()
    worker.wait()
    return folder


@pytest.fixture
def killed_job(killed: Path, tmp_path: Path) -> Path:
    """A copy of the killed run, to go on with."""
    job = Path(shutil.copytree(killed, tmp_path / "run")) / "job.json"
    old = decode_worker_job(job.read_bytes())
    job.write_bytes(encode(msgspec.structs.replace(old, dataset=str(job.parent / "rows.json"))))
    return job


def _examples(lengths: list[int], seed: int = 0, group: int = 1) -> Examples:
    """Random documents of the given lengths, the second half of each (at least one token) labelled."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = random.integers(2, VOCAB, offsets[-1], dtype=np.int32)
    labels = np.full_like(ids, IGNORED)
    for start, end in pairwise(offsets.tolist()):
        middle = max(start + 1, (start + end) // 2)
        labels[middle:end] = ids[middle:end]
    return Examples(ids, labels, offsets, group)


def _plan(
    method: str = "lora", *, rank: int = 4, dtype: str = "float32", dropout: float = 0.0, **changes: Any
) -> Plan:
    """A plan for the tiny model: all seven kinds of modules by one method, or `mixed`."""
    shapes = {
        "q_proj": (64, 64),
        "k_proj": (64, 32),
        "v_proj": (64, 32),
        "o_proj": (64, 64),
        "gate_proj": (64, 128),
        "up_proj": (64, 128),
        "down_proj": (128, 64),
    }
    modules = []
    for index, (name, (inputs, outputs)) in enumerate(shapes.items()):
        lora = method == "lora" or (method == "mixed" and index % 2 == 0)
        modules.append(
            ModulePlan(
                name=name,
                in_features=inputs,
                out_features=outputs,
                count=2,
                method="lora" if lora else "dense",
                rank=rank + index if lora else 0,  # ranks differ, as they do where a matrix is too small
                alpha=2.0 * (rank + index) if lora else 0.0,
            )
        )
    fields: dict[str, Any] = {
        "profile": "test",
        "modules": modules,
        "dropout": dropout,
        "lr_lora": 1e-2,
        "lr_dense": 1e-3,
        "max_length": 256,
        "capacity": 64,
        "packs_per_step": 1,
        "max_epochs": 1.0,
        "dtype": dtype,
        "parallel": "single",
        "devices": 1,
        "activation_checkpointing": False,
        "compile": False,
        "eval_batch": 8,
        "expected_tokens_per_s": 1000.0,
        "expected_steps": 10,
        "reserve_s": 0.0,
        "memory_bytes": 0,
    }
    return Plan(**{**fields, **changes})
