"""Noise of tokens: uniform, as large as its document is short, and the same wherever the document is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer_node.engine.data.token_noise import Noise, scrambled, uniform

NOISE = Noise(alpha=5.0, seed=3, step=7)


def test_neighbours_draw_numbers_that_look_random() -> None:
    seeds = torch.from_numpy(scrambled(np.arange(2000)))
    drawn = uniform(seeds, 64)
    assert float(drawn.min()) >= -1.0
    assert float(drawn.max()) <= 1.0
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(drawn.var()) == pytest.approx(1 / 3, rel=0.02)
    for one, other in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):
        assert float((one * other).mean()) == pytest.approx(0.0, abs=0.01)


def test_arrays_and_tensors_are_scrambled_alike() -> None:
    numbers = np.array([0, 1, 2**31, 2**32 - 1])
    found = scrambled(numbers)
    assert torch.equal(scrambled(torch.from_numpy(numbers)), torch.from_numpy(found))
    assert ((found >= 0) & (found < 2**32)).all()
    assert len(set(found.tolist())) == 4


def test_a_document_has_its_noise_in_any_pack() -> None:
    seeds, most = NOISE.of_documents(np.array([4, 9]), np.array([3, 5]), 10)
    alone, most_alone = NOISE.of_documents(np.array([9]), np.array([5]), 5)
    assert (seeds[3:8] == alone).all()
    assert (most[3:8] == most_alone).all()
    assert most.tolist() == pytest.approx([5.0 / 3**0.5] * 3 + [5.0 / 5**0.5] * 5 + [0.0] * 2)
    assert len(set(seeds[:8].tolist())) == 8


def test_steps_orders_and_documents_differ() -> None:
    def seeds(noise: Noise, document: int) -> list[int]:
        found: list[int] = noise.of_documents(np.array([document]), np.array([6]), 6)[0].tolist()
        return found

    others = [(Noise(5.0, 3, 8), 4), (Noise(5.0, 4, 7), 4), (NOISE, 5), (Noise(5.0, 2, 7), 5)]
    for noise, document in others:
        assert not set(seeds(NOISE, 4)) & set(seeds(noise, document))
    assert seeds(NOISE, 4) == seeds(Noise(1.0, 3, 7), 4)
