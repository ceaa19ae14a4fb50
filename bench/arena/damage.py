"""Damage a base model's weights in the four ways that upstream does before a tournament.

Upstream (validator/tasks/prep and trainer/model_prep, read in 2026-11) draws one way and one strength for all
matrices that it hits: Gaussian noise, one factor, magnitude pruning, or entries redrawn. Factors and new
entries hit a random 25-75% of the matrices; noise and pruning one, all of one kind, such a share, or all.
Embeddings, norms and biases stay. Numbers are computed in fp32 and stored in the model's own precision.
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
# Noise in standard deviations of the matrix; the factor; share of entries pruned or redrawn.
RANGES: dict[Way, tuple[float, float]] = {
    "noise": (0.01, 0.3),
    "scaling": (0.5, 1.5),
    "pruning": (0.25, 0.5),
    "reinit": (0.01, 0.1),
}
Scope = Literal["one", "kind", "several", "all"]
SCOPES: dict[Scope, float] = {"one": 0.1, "kind": 0.15, "several": 0.35, "all": 0.4}
MATRIX_SHARE = 0.25, 0.75  # of several


class Damage(msgspec.Struct, frozen=True):
    """What to do to which matrices; `strength` has the unit of RANGES."""

    way: Way
    seed: int
    strength: float
    matrices: tuple[str, ...]


def draw(names: list[str], seed: int, way: Way | None = None) -> Damage:
    """Draw a damage to matrices of these names; the way too if it is not given."""
    dice = random.Random(f"damage {seed}")
    drawn = dice.choices(WAYS, [SHARES[one] for one in WAYS])[0]
    way = way or drawn
    scope = dice.choices(list(SCOPES), list(SCOPES.values()))[0]
    chosen = _hit(sorted(names), "several" if way in ("scaling", "reinit") else scope, dice)
    return Damage(way, seed, dice.uniform(*RANGES[way]), tuple(sorted(chosen)))


def _hit(names: list[str], scope: Scope, dice: random.Random) -> list[str]:
    """Draw the matrices of a scope."""
    if scope == "all":
        return names
    if scope == "kind":
        kind = dice.choice(names).rsplit(".", 2)[-2]
        return [name for name in names if name.rsplit(".", 2)[-2] == kind]
    return dice.sample(
        names, max(1, int(len(names) * dice.uniform(*MATRIX_SHARE))) if scope == "several" else 1
    )


def _damaged(matrix: torch.Tensor, damage: Damage, generator: torch.Generator) -> torch.Tensor:
    values = matrix.float()
    if damage.way == "noise":
        values = values + torch.randn(values.shape, generator=generator) * values.std() * damage.strength
    elif damage.way == "scaling":
        values = values * damage.strength
    elif damage.way == "pruning":
        count = int(values.numel() * damage.strength)
        smallest = values.abs().flatten().argsort(stable=True)[:count]
        values = values.flatten().index_fill(0, smallest, 0.0).view(values.shape)
    else:
        hit = torch.rand(values.shape, generator=generator) < damage.strength
        drawn = values.mean() + torch.randn(values.shape, generator=generator) * values.std()
        values = torch.where(hit, drawn, values)
    return values.to(matrix.dtype)


def matrices_of(weights: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the weights that upstream may damage."""
    return sorted(name for name, tensor in weights.items() if tensor.dim() == 2 and "embed" not in name)


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
