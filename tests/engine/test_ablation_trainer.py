"""Variants of a training run: each changes what its name says, and nothing of the next one."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.ablations.trainer import Trainer, Weights, trained
from bench.ablations.variants import BASE, Training, Variant
from bench.regret import grid
from shared.planning.profiles import PROFILES
from trainer_node.engine.evaluate import metric

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def trainer(make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A trainer of a tiny model, and 20 rows to score."""
    for name, recipe in grid.RECIPES.items():
        monkeypatch.setitem(PROFILES, name, recipe)
    path = make_job(profile=grid.RECIPE.profile, ready_by=2000.0)
    rows = json.loads((path.parent.parent / "rows.json").read_text())
    (path.parent / "test.json").write_text(json.dumps(rows[:20]))
    return Trainer(path)


def test_variants_differ_and_do_not_change_one_another(trainer: Trainer) -> None:
    first = trainer.losses_of(BASE)
    assert len(first) == 20
    trainer._base.clear()
    assert trainer.losses_of(BASE) == first
    changed = [
        Variant("tokens", Training(per_token=True)),
        Variant("cosine", Training(decay="cosine", floor=0.25)),
        Variant("stable", Training(decay="stable")),
        Variant("betas", Training(betas=(0.9, 0.95))),
        Variant("clip", Training(clip=0.01)),
        Variant("decay", Training(weight_decay=0.1)),
        Variant("held out", Training(held_out=True)),
        Variant("last pass", Training(held_out=True, last_pass=0.25)),
        Variant("LoRA", Training(arm="LoRA r8")),
    ]
    found = {one.name: trainer.losses_of(one) for one in changed}
    assert all(len(losses) == 20 for losses in found.values())
    assert len({tuple(losses) for losses in (first, *found.values())}) == len(changed) + 1
    trainer._base.clear()
    assert trainer.losses_of(BASE) == first


def test_no_change_at_all_is_the_base_model_and_a_mean_lies_between_its_runs(trainer: Trainer) -> None:
    base = np.array(trainer.losses_of(BASE))
    none = np.array(trainer.losses_of(Variant("none", scale=0.0)))
    assert none.mean() > base.mean()
    mean = trainer.losses_of(Variant("mean", runs=2))
    assert mean != base.tolist()
    assert set(trainer._base) == {0, 1}


def test_the_hotter_the_more_alike_are_all_tokens(trainer: Trainer) -> None:
    first = trainer.losses_of(BASE)
    assert trainer.losses_of(Variant("warm", temperature=1.05)) != first
    hot = trainer.losses_of(Variant("hot", temperature=1e6))
    assert hot == pytest.approx([hot[0]] * 20, rel=1e-4)
    assert hot[0] > np.mean(first)
    assert trainer.losses_of(BASE) == first


def test_a_variant_that_diverges_has_no_losses(trainer: Trainer) -> None:
    assert trainer.losses_of(Variant("wild", Training(arm="dense", rate=1e30, batch=16, epochs=0.5))) == []


REGULARISERS = [
    Training(epochs=0.5, pull=10.0),
    Training(epochs=0.5, noise=5.0),
    Training(arm="LoRA r8", epochs=0.5, pull=10.0),
    Training(arm="LoRA r8", epochs=0.5, noise=5.0),
    Training(arm="LoRA r8", epochs=0.5, dropout=0.1),
]


@pytest.mark.parametrize("training", REGULARISERS, ids=lambda one: f"{one.arm}-{one.pull:g}-{one.noise:g}")
def test_a_regulariser_changes_what_is_trained_and_not_how_it_is_scored(
    trainer: Trainer, training: Training
) -> None:
    without = Training(arm=training.arm, epochs=training.epochs)
    plain = trained(trainer.runner, without, 0)
    mine = trained(trainer.runner, training, 0)
    assert plain is not None
    assert mine is not None
    assert any(not torch.equal(plain[name], value) for name, value in mine.items())
    again = trained(trainer.runner, training, 0)
    assert again is not None
    assert all(torch.equal(again[name], value) for name, value in mine.items())
    # The model that was trained scores as a plain one with its weights: nothing of it is left.
    adapted = trainer.runner.adapted
    assert adapted is not None
    there = metric.score(adapted.deltas.model, trainer.test).per_example
    assert there.tolist() == metric.score(adapted.deltas.model, trainer.test).per_example.tolist()
    assert there == pytest.approx(trainer._score(training.arm, mine), rel=0.02)  # one in bf16, one in fp32
    # And the next run is what it was.
    last = trained(trainer.runner, without, 0)
    assert last is not None
    assert all(torch.equal(plain[name], value) for name, value in last.items())


@pytest.mark.parametrize("arm", ["everything", "LoRA r8"])
def test_a_strong_pull_leaves_the_base_model(trainer: Trainer, arm: str) -> None:
    moved = trained(trainer.runner, Training(arm=arm), 0)
    held = trained(trainer.runner, Training(arm=arm, pull=300.0), 0)
    start = trainer.runner.start
    assert moved is not None
    assert held is not None
    assert start is not None

    def distance(weights: Weights) -> float:
        return sum(float((weights[name] - value).square().sum()) for name, value in start.items()) ** 0.5

    assert 0 < distance(held) < 0.8 * distance(moved)
