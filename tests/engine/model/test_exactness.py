"""How a step is computed changes nothing: packed or alone, in one pass or eight, compiled, in TRL instead."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.messages.offers import TaskType
from shared.planning.plan import Plan
from trainer_node.engine.data.examples import IGNORED, Examples
from trainer_node.engine.data.packing import collate
from trainer_node.engine.evaluate.metric import reference_logprobs
from trainer_node.engine.model import label_model
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.loading import load_model, load_tokenizer
from trainer_node.engine.model.logprobs import label_logprobs
from trainer_node.engine.objectives import Loss, loss_for

KINDS = [TaskType.INSTRUCT, TaskType.DPO]
LENGTHS = [9, 30, 4, 17, 12, 25, 7, 14, 11, 6, 22, 8, 19, 5, 10, 16]  # 16 rows, or 8 pairs


@pytest.fixture
def deltas(tiny_model: Path, make_plan: Callable[..., Plan]) -> Deltas:
    """Dense weights and LoRA factors, moved away from where they begin."""
    return _moved(add_deltas(load_model(str(tiny_model), torch.float32), make_plan("mixed"), seed=3))


def _moved(deltas: Deltas) -> Deltas:
    random = torch.Generator().manual_seed(1)
    for parameter in deltas.parameters.values():
        parameter.data.add_(torch.empty(parameter.shape).normal_(0, 0.05, generator=random))
    return deltas


@pytest.fixture
def make_rows(make_examples: Callable[..., Examples], tiny_model: Path) -> Callable[..., Examples]:
    def _rows(task_type: TaskType, lengths: list[int] = LENGTHS) -> Examples:
        rows = make_examples(lengths, group=2 if task_type is TaskType.DPO else 1)
        base = load_model(str(tiny_model), torch.float32)
        return rows.with_reference(reference_logprobs(base, rows)) if rows.group == 2 else rows

    return _rows


def _gradients(
    deltas: Deltas, loss: Loss, rows: Examples, packs: list[list[int]], capacity: int
) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over the examples of all packs, and its gradients accumulated pack by pack."""
    examples, total = sum(map(len, packs)), 0.0
    for indices in packs:
        part = loss(deltas.model, collate(rows, indices, capacity)) / examples
        part.backward()
        total += part.item()
    found = {name: parameter.grad for name, parameter in deltas.parameters.items()}
    for parameter in deltas.parameters.values():
        parameter.grad = None
    return total, found


def _assert_equal(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=2e-6)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("task_type", KINDS)
def test_one_pack_eight_packs_and_one_by_one_give_the_same_step(
    task_type: TaskType, deltas: Deltas, make_rows: Callable[..., Examples]
) -> None:
    rows, loss = make_rows(task_type), loss_for(task_type)
    together = _gradients(deltas, loss, rows, [list(range(len(rows)))], sum(LENGTHS))
    size = len(rows) // 8
    eighths = [list(range(start, start + size)) for start in range(0, len(rows), size)]
    _assert_equal(_gradients(deltas, loss, rows, eighths, 64), together)
    _assert_equal(_gradients(deltas, loss, rows, [[i] for i in reversed(range(len(rows)))], 64), together)


@pytest.mark.parametrize("task_type", KINDS)
def test_a_document_knows_nothing_of_its_neighbours(
    task_type: TaskType, deltas: Deltas, make_rows: Callable[..., Examples]
) -> None:
    """A canary next to a row may be anything: the row's log-probabilities stay bit-equal."""
    rows = make_rows(task_type)
    batch = collate(rows, [1, 0, 2], 128)
    last = rows.take([1]).group  # documents of the first row in the pack
    mine = batch.label_documents_N < last
    with torch.no_grad():
        before = deltas.model(batch)[mine]
        ids = batch.ids_T.clone()
        start = sum(batch.document_lengths[:last])
        batch.ids_T[start:] = (ids[start:] + 17) % 900 + 2
        after = deltas.model(batch)
    assert torch.equal(after[mine], before)
    assert not torch.equal(after[~mine], deltas.model(collate(rows, [1, 0, 2], 128))[~mine])


@pytest.mark.parametrize("task_type", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_the_size_of_a_chunk_of_logits_does_not_matter(
    chunk: int,
    task_type: TaskType,
    deltas: Deltas,
    make_rows: Callable[..., Examples],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, loss = make_rows(task_type), loss_for(task_type)
    packs = [list(range(len(rows)))]
    wanted = _gradients(deltas, loss, rows, packs, 256)

    def chunked(hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor) -> Tensor:
        return label_logprobs(hidden_NH, head_VH, labels_N, chunk)

    monkeypatch.setattr(label_model, "label_logprobs", chunked)
    _assert_equal(_gradients(deltas, loss, rows, packs, 256), wanted)


# --- TRL's trainers, on the same weights and tokens


def _stock(tiny_model: Path, deltas: Deltas) -> torch.nn.Module:
    """A stock model with the weights of dense deltas; those alone have gradients."""
    model = load_model(str(tiny_model), torch.float32).requires_grad_(False)
    for name, parameter in deltas.parameters.items():
        weight = model.get_parameter(name)
        weight.data.copy_(parameter.data)
        weight.requires_grad_(True)
    return model


def _options() -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "max_length": None,
        "disable_tqdm": True,
    }


def _documents(rows: Examples) -> list[tuple[list[int], list[int]]]:
    """Ids of every document, cut where its labels begin."""
    found = []
    for start, end in zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist(), strict=True):
        ids, labels = rows.ids[start:end].tolist(), rows.labels[start:end]
        cut = int(np.argmax(labels != IGNORED))
        found.append((ids[:cut], ids[cut:]))
    return found


def _compare(trainer: Any, rows: list[dict[str, Any]], ours: tuple[float, dict[str, Tensor]]) -> None:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    theirs = {name: trainer.model.get_parameter(name).grad for name in ours[1]}
    _assert_equal(ours, (loss.item(), theirs))


@pytest.fixture
def dense(tiny_model: Path, make_plan: Callable[..., Plan]) -> Deltas:
    return _moved(add_deltas(load_model(str(tiny_model), torch.float32), make_plan("dense"), seed=3))


@pytest.mark.filterwarnings("ignore")  # TRL's and its parts'
@pytest.mark.parametrize("lengths", [[21], [20, 20, 20]])  # TRL weighs tokens, the scorer and we weigh rows
def test_loss_and_gradients_are_those_of_trl_sft(
    lengths: list[int], dense: Deltas, tiny_model: Path, make_rows: Callable[..., Examples]
) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = make_rows(TaskType.INSTRUCT, lengths)
    ours = _gradients(dense, loss_for(TaskType.INSTRUCT), rows, [list(range(len(rows)))], 64)
    table = [
        {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)}
        for prompt, answer in _documents(rows)
    ]
    trainer = trl.SFTTrainer(
        model=_stock(tiny_model, dense),
        args=trl.SFTConfig(**_options(), completion_only_loss=True),
        train_dataset=datasets.Dataset.from_list(table),
        processing_class=load_tokenizer(str(tiny_model)),
    )
    _compare(trainer, list(trainer.train_dataset), ours)  # with the labels that TRL made of the masks


@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_are_those_of_trl_dpo(
    dense: Deltas, tiny_model: Path, make_rows: Callable[..., Examples]
) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = make_rows(TaskType.DPO, [length for length in LENGTHS for _ in "cr"])
    starts = rows.offsets[:-1].tolist()
    for chosen, rejected, length in zip(starts[::2], starts[1::2], LENGTHS, strict=True):
        prompt = max(1, length // 2)  # TRL has one prompt for both
        rows.ids[rejected : rejected + prompt] = rows.ids[chosen : chosen + prompt]
    base = load_model(str(tiny_model), torch.float32)
    rows = rows.with_reference(reference_logprobs(base, rows))
    ours = _gradients(dense, loss_for(TaskType.DPO), rows, [[*range(9)], [*range(9, 16)]], 300)
    documents = _documents(rows)
    table = [
        {"prompt_ids": chosen[0], "chosen_ids": chosen[1], "rejected_ids": rejected[1]}
        for chosen, rejected in zip(documents[::2], documents[1::2], strict=True)
    ]

    class Tokenised(trl.DPOTrainer):  # type: ignore[misc, name-defined]
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

    trainer = Tokenised(
        model=_stock(tiny_model, dense),
        ref_model=load_model(str(tiny_model), torch.float32),
        args=trl.DPOConfig(**_options(), beta=0.1),
        train_dataset=datasets.Dataset.from_list(table),
        processing_class=load_tokenizer(str(tiny_model)),
    )
    _compare(trainer, table, ours)


# --- compiled


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute on an idle core
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_compiled_equals_eager(deltas: Deltas, make_rows: Callable[..., Examples]) -> None:
    rows, loss = make_rows(TaskType.INSTRUCT), loss_for(TaskType.INSTRUCT)
    packs = [list(range(8)), list(range(8, 16))]
    wanted = _gradients(deltas, loss, rows, packs, 128)
    for layer in deltas.model.base.model.layers:
        layer.compile()
    _assert_equal(_gradients(deltas, loss, rows, packs, 128), wanted)
