"""Damage a base model's weights in the four ways that upstream does before a tournament.

Upstream (validator/tasks/prep/constants.py) draws one of: Gaussian noise, scaled weights, magnitude pruning,
re-initialised entries. Scaling and re-initialisation change a random 25-75% of the matrices; noise and
pruning change from one matrix to all of them. Vectors (norms, biases) stay.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import torch
from safetensors.torch import load_file, save_file

Way = Literal["noise", "scaling", "pruning", "reinit"]
WAYS: tuple[Way, ...] = get_args(Way)
# How often upstream draws each way.
SHARES: dict[Way, float] = {"noise": 0.2, "scaling": 0.4, "pruning": 0.25, "reinit": 0.15}
# Noise in standard deviations of the matrix; factor of scaling; share of entries pruned or re-initialised.
RANGES: dict[Way, tuple[float, float]] = {
    "noise": (0.01, 0.3),
    "scaling": (0.5, 1.5),
    "pruning": (0.25, 0.5),
    "reinit": (0.01, 0.1),
}
MATRIX_SHARE = 0.25, 0.75
INIT_STD = 0.02


class Damage(msgspec.Struct, frozen=True):
    """What to do to which matrices; `strength` has the unit of RANGES, and scaling draws one per matrix."""

    way: Way
    seed: int
    strength: float
    matrices: tuple[str, ...]


def draw(names: list[str], seed: int, way: Way | None = None) -> Damage:
    """Draw a damage to matrices of these names; the way too if it is not given."""
    dice = random.Random(f"damage {seed}")
    drawn = dice.choices(WAYS, [SHARES[one] for one in WAYS])[0]
    way = way or drawn
    if way in ("scaling", "reinit"):
        count = round(len(names) * dice.uniform(*MATRIX_SHARE))
    else:
        count = dice.randint(1, len(names))
    chosen = tuple(sorted(dice.sample(sorted(names), max(1, count))))
    return Damage(way, seed, dice.uniform(*RANGES[way]), chosen)


def _damaged(matrix: torch.Tensor, damage: Damage, generator: torch.Generator) -> torch.Tensor:
    values = matrix.float()
    if damage.way == "noise":
        values = values + torch.randn(values.shape, generator=generator) * values.std() * damage.strength
    elif damage.way == "scaling":
        low, high = RANGES["scaling"]
        values = values * (low + (high - low) * torch.rand((), generator=generator))
    elif damage.way == "pruning":
        count = int(values.numel() * damage.strength)
        smallest = values.abs().flatten().argsort(stable=True)[:count]
        values = values.flatten().index_fill(0, smallest, 0.0).view(values.shape)
    else:
        hit = torch.rand(values.shape, generator=generator) < damage.strength
        values = torch.where(hit, torch.randn(values.shape, generator=generator) * INIT_STD, values)
    return values.to(matrix.dtype)


def matrices_of(weights: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the weights that upstream may damage."""
    return sorted(name for name, tensor in weights.items() if tensor.dim() == 2)


def apply(weights: dict[str, torch.Tensor], damage: Damage) -> dict[str, torch.Tensor]:
    """Return the damaged weights; those that are not named are the same tensors."""
    changed = dict(weights)
    for name in damage.matrices:
        generator = torch.Generator().manual_seed(random.Random(f"{damage.seed} {name}").getrandbits(63))
        changed[name] = _damaged(weights[name], damage, generator)
    return changed


def damage_folder(source: Path, target: Path, seed: int, way: Way | None = None) -> Damage:
    """Write a damaged copy of a model folder that has one safetensors file; record the damage next to it."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name != "model.safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    weights: dict[str, Any] = load_file(source / "model.safetensors")
    damage = draw(matrices_of(weights), seed, way)
    save_file(apply(weights, damage), target / "model.safetensors", metadata={"format": "pt"})
    record = json.dumps(msgspec.to_builtins(damage), indent=1)
    (target / "damage.json").write_text(record + "\n", encoding="utf-8")
    return damage
