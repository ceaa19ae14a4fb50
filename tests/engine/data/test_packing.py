"""Packs: complete, deterministic, full, and tensors that say where documents and labels are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import WINDOW, Packs, collate, pack


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 128), max_size=300),
    capacity=st.integers(128, 512),
    epoch=st.integers(0, 3),
    limit=st.none() | st.integers(1, 5),
)
def test_every_example_once_and_no_pack_too_full(
    lengths: list[int], capacity: int, epoch: int, limit: int | None
) -> None:
    packs = pack(lengths, capacity, 7, epoch, limit)
    assert sorted(index for indices in packs for index in indices) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in indices) <= capacity for indices in packs)
    assert all(limit is None or len(indices) <= limit for indices in packs)


def test_same_arguments_same_plan_and_other_epochs_differ() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 500)
    assert pack(lengths, 256, 1, 0) == pack(lengths, 256, 1, 0)
    assert pack(lengths, 256, 1, 0) != pack(lengths, 256, 1, 1)
    assert pack(lengths, 256, 1, 0) != pack(lengths, 256, 2, 0)


def test_packs_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 5000).clip(4, 2048).astype(int)
    packs = pack(lengths, 2048, 0, 0)
    assert lengths.sum() / (2048 * len(packs)) > 0.98
    assert len(lengths) > 3 * WINDOW  # several windows took part


def test_an_example_longer_than_the_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens"):
        pack([10, 65], 64, 0, 0)


def test_a_batch_knows_its_documents_and_labels() -> None:
    examples = Examples(
        ids=np.array([5, 6, 7, 8, 9, 10, 11], np.int32),
        labels=np.array([-100, 6, 7, -100, -100, 10, -100], np.int32),
        offsets=np.array([0, 3, 5, 7]),
    )
    batch = collate(examples, [2, 0], 8)
    assert batch.ids_T.tolist() == [10, 11, 5, 6, 7, 0, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 0, 1, 2, 0, 0, 0]
    assert batch.document_lengths == [2, 3, 3]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 8]
    assert (batch.documents, batch.examples, batch.tokens, batch.max_seqlen) == (2, 2, 5, 3)


def test_labels_are_predicted_one_place_before_and_weigh_one_per_document() -> None:
    examples = Examples(
        ids=np.array([5, 6, 7, 8, 9], np.int32),
        labels=np.array([-100, 6, 7, -100, 9], np.int32),
        offsets=np.array([0, 3, 5]),
    )
    batch = collate(examples, [0, 1], 5)
    assert batch.document_lengths == [3, 2]  # no padding, no document for it
    assert batch.label_positions_N.tolist() == [0, 1, 3]
    assert batch.labels_N.tolist() == [6, 7, 9]
    assert batch.label_documents_N.tolist() == [0, 0, 1]
    assert batch.weights_N.tolist() == [0.5, 0.5, 1.0]
    assert batch.label_tokens == 3
    with pytest.raises(ValueError, match="5 tokens"):
        collate(examples, [0, 1], 4)


def test_packs_go_through_every_epoch_once() -> None:
    lengths = [5, 9, 3, 7, 7, 2, 8]
    packs = Packs(lengths, 12, seed=3)
    epoch: list[list[int]] = []
    while packs.epoch == 0:
        epoch += packs.take(1)
    assert sorted(index for pack in epoch for index in pack) == list(range(7))
    again = Packs(lengths, 12, seed=3, epoch=0, index=2)
    assert again.take(len(epoch) - 2) == epoch[2:]
    assert (again.epoch, again.index) == (1, 0)
