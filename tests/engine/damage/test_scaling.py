"""Which matrices were multiplied, and by what, told from their numbers alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer_node.engine.damage.scaling import find_scaling


def matrices(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        f"layers.{layer}.q_proj.weight": (torch.randn(96, 160, generator=random) * 0.03).bfloat16()
        for layer in range(10)
    }


def scaled(weights: dict[str, Tensor], factor: float, names: list[str]) -> dict[str, Tensor]:
    return {
        name: (one.float() * factor).to(one.dtype) if name in names else one for name, one in weights.items()
    }


@pytest.mark.parametrize("factor", np.random.default_rng(1).uniform(0.52, 1.5, 12))
def test_the_factor_and_its_matrices_are_found(factor: float) -> None:
    weights = matrices()
    names = list(weights)[1:6]
    found = find_scaling(scaled(weights, factor, names))
    assert found is not None
    assert found.weights == names
    # As near as one step of bfloat16; with many gaps, far nearer.
    assert found.factor == pytest.approx(factor if factor >= 1 else 2 * factor, rel=2**-7)


def test_what_is_divided_again_is_as_before() -> None:
    weights = matrices()
    damaged = scaled(weights, 0.637, list(weights))
    found = find_scaling(damaged)
    assert found is not None
    for name, before in weights.items():
        after = (damaged[name].float() * 2 / found.factor).bfloat16()
        # Two mantissas that became one can't be told apart again: they are neighbours.
        assert torch.allclose(after.float(), before.float(), rtol=2**-7, atol=0)
        assert float((after == before).float().mean()) > 0.5


def test_untouched_noisy_pruned_and_small_matrices_have_no_gaps() -> None:
    weights = matrices()
    assert find_scaling(weights) is None
    noisy = {
        name: (one.float() + 0.003 * torch.randn_like(one.float())).bfloat16()
        for name, one in weights.items()
    }
    assert find_scaling(noisy) is None
    pruned = {name: one * (one.abs() > 0.01) for name, one in weights.items()}
    assert find_scaling(pruned) is None
    assert find_scaling({"q_proj.weight": weights["layers.0.q_proj.weight"][:16, :100] * 0.7}) is None
    assert find_scaling({}) is None


def test_weights_that_hold_few_numbers_are_no_scaled_ones() -> None:
    # What 4-bit formats leave after they are unpacked: 15 numbers, and gaps everywhere.
    weights = {name: ((one * 200).round().clamp(-7, 7) / 200) for name, one in matrices().items()}
    assert find_scaling(weights) is None


def test_a_scaled_matrix_in_fp32_is_found_as_well() -> None:
    weights = matrices()
    widened = {name: one.float() * 1.234 for name, one in weights.items()}
    found = find_scaling(widened)
    assert found is not None
    assert found.factor == pytest.approx(1.234, rel=1e-3)


def test_a_real_model_s_matrices_are_told_apart(smollm2: Path) -> None:
    state = load_file(smollm2 / "model.safetensors")
    weights = {name: one for name, one in state.items() if one.dim() == 2 and "layers." in name}
    weights = {name: one for name, one in weights.items() if int(name.split(".")[2]) < 6}
    assert find_scaling(weights) is None
    for number, factor in enumerate((0.571, 0.83, 1.31)):
        names = [name for place, name in enumerate(weights) if (place + number) % 3]
        found = find_scaling(scaled(weights, factor, names))
        assert found is not None
        assert found.weights == names
