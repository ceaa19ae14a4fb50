"""The four ways to damage a base: what changes, by how much, and that a seed repeats it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch
from safetensors.torch import load_file, save_file

from bench.arena import damage as damages
from bench.arena.damage import RANGES, SHARES, WAYS, Damage

ALL = tuple(f"layer.{number}.weight" for number in range(8))


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    matrices = {name: torch.randn(64, 48, generator=generator) * 0.1 for name in ALL}
    return {**matrices, "norm.weight": torch.ones(48)}


def changed(one: Damage) -> dict[str, torch.Tensor]:
    return damages.apply(weights(), one)


def test_noise_is_in_standard_deviations_of_the_matrix() -> None:
    after = changed(Damage("noise", 1, 0.2, ALL))
    for name in ALL:
        before = weights()[name]
        assert float((after[name] - before).std() / before.std()) == pytest.approx(0.2, rel=0.1)


def test_scaling_has_one_factor_for_all_matrices() -> None:
    after = changed(Damage("scaling", 1, 0.7, ALL))
    for name in ALL:
        assert torch.equal(after[name], weights()[name] * 0.7)


@pytest.mark.parametrize("way", WAYS)
def test_embeddings_are_spared_and_scopes_are_upstreams(way: damages.Way) -> None:
    names = [f"layers.{layer}.{kind}.weight" for layer in range(6) for kind in ("q_proj", "up_proj")]
    sizes = [len(damages.draw(names, seed, way).matrices) for seed in range(1000)]
    if way in ("scaling", "reinit"):
        assert set(sizes) == {3, 4, 5, 6, 7, 8}
        return
    assert sizes.count(12) / 1000 == pytest.approx(0.4, abs=0.05)
    assert sizes.count(1) / 1000 == pytest.approx(0.1, abs=0.03)
    kinds = [one for seed in range(1000) if len(one := damages.draw(names, seed, way).matrices) == 6]
    assert any(len({name.split(".")[2] for name in one}) == 1 for one in kinds)
    assert damages.matrices_of({"embed_tokens.weight": torch.ones(2, 2)}) == []


def test_pruning_zeroes_the_smallest() -> None:
    after = changed(Damage("pruning", 1, 0.25, ALL))[ALL[0]]
    before = weights()[ALL[0]]
    zero = after == 0
    assert int(zero.sum()) == before.numel() // 4
    assert before[zero].abs().max() <= before[~zero].abs().min()
    assert torch.equal(after[~zero], before[~zero])


def test_reinit_changes_a_share_of_the_entries() -> None:
    after = changed(Damage("reinit", 1, 0.1, ALL))[ALL[0]]
    before = weights()[ALL[0]]
    moved = after != before
    assert float(moved.float().mean()) == pytest.approx(0.1, abs=0.02)
    assert float(after[moved].std()) == pytest.approx(float(before.std()), rel=0.2)


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_repeats_and_spares_the_rest(way: damages.Way) -> None:
    before = weights()
    one = damages.draw(damages.matrices_of(before), 3, way)
    assert one == damages.draw(damages.matrices_of(before), 3, way)
    assert RANGES[way][0] <= one.strength <= RANGES[way][1]
    if way in ("scaling", "reinit"):
        assert 2 <= len(one.matrices) <= 6
    first, second = damages.apply(before, one), damages.apply(before, one)
    for name, tensor in before.items():
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name], tensor) == (name not in one.matrices)


def test_the_ways_are_drawn_as_often_as_upstream_does() -> None:
    drawn = [damages.draw(list(ALL), seed).way for seed in range(2000)]
    for way in WAYS:
        assert drawn.count(way) / len(drawn) == pytest.approx(SHARES[way], abs=0.04)


def test_a_folder_keeps_its_files_and_dtype(tmp_path: Path) -> None:
    source, target = tmp_path / "base", tmp_path / "damaged"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({name: one.to(torch.bfloat16) for name, one in weights().items()}, source / "model.safetensors")
    one = damages.damage_folder(source, target, 7, "noise")
    after = load_file(target / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert (target / "config.json").read_text() == "{}"
    assert one.way == "noise"
    assert (target / "damage.json").exists()
