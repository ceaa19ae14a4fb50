"""Averages of weights: the mean of several, and the greedy one of a run's snapshots."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from trainer_node.engine.evaluate.candidates import TrainProgress
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.search.soup import greedy_soup, mean_of
from trainer_node.engine.train.dev_curve import DevCurve
from trainer_node.engine.train.health import Health
from trainer_node.engine.train.state import TrainState


class Model:
    """One weight of two numbers, as the engine's deltas hold them."""

    def __init__(self) -> None:
        self.parameters = {"w": torch.zeros(2)}

    def state(self) -> dict[str, torch.Tensor]:
        return self.parameters

    def load_state(self, weights: dict[str, torch.Tensor]) -> None:
        self.parameters["w"].copy_(weights["w"])

    def score(self) -> Evaluation:
        """The distance from (1, 1)."""
        losses = ((self.parameters["w"] - 1.0) ** 2).double().numpy()
        return Evaluation(float(losses.mean()), losses)


def trained(*places: tuple[float, float]) -> tuple[TrainState, Model]:
    """A run whose snapshots lie at these places, one every ten steps."""
    model, curve, snapshots = Model(), DevCurve(), {}
    for number, place in enumerate(places, 1):
        losses = (np.array(place) - 1.0) ** 2
        curve = curve.extended(10 * number, 100 * number, losses.tolist(), 0.0)
        snapshots[10 * number] = {"w": torch.tensor(place)}
    state = SimpleNamespace(
        curve=curve,
        snapshots=snapshots,
        deltas=model,
        train_s=60.0,
        tokens=100 * len(places),
        health=Health(skipped=2),
    )
    return cast(TrainState, state), model


def test_the_mean_is_over_every_set_of_weights() -> None:
    several = [{"w": torch.tensor([value], dtype=torch.bfloat16)} for value in (1.0, 2.0, 6.0)]
    mean = mean_of(iter(several))
    assert mean["w"].dtype == torch.float32
    assert mean["w"].tolist() == pytest.approx([3.0])


def test_snapshots_around_the_optimum_are_averaged_and_one_that_harms_is_left_out() -> None:
    state, model = trained((9.0, 9.0), (2.0, 1.0), (0.0, 1.0))
    found = greedy_soup(state, model.score, lambda: True)
    assert found is not None
    soup, steps = found
    assert sorted(steps) == [20, 30]
    assert soup.score is not None
    assert soup.score.loss == pytest.approx(0.0)
    with soup.weights_applied():
        assert model.parameters["w"].tolist() == pytest.approx([1.0, 1.0])
    assert model.parameters["w"].tolist() == [0.0, 0.0]  # the run's last weights are back


def test_its_progress_is_that_of_the_lowest_point() -> None:
    state, model = trained((2.0, 1.0), (-0.5, 1.0))
    found = greedy_soup(state, model.score, lambda: True)
    assert found is not None
    assert found[0].reached == TrainProgress(step=10, tokens=100, train_s=30.0, skipped=2)


def test_there_is_no_soup_if_no_second_snapshot_helps_or_there_is_no_time() -> None:
    state, model = trained((1.0, 1.0), (2.0, 2.0))
    assert greedy_soup(state, model.score, lambda: True) is None
    state, model = trained((2.0, 1.0), (0.0, 1.0))
    asked: list[None] = []

    def once() -> bool:
        asked.append(None)
        return len(asked) < 2

    assert greedy_soup(state, model.score, once) is None
    assert greedy_soup(trained()[0], model.score, lambda: True) is None
