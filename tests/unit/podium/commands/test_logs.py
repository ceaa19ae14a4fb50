from __future__ import annotations

from gateway.views.run import RunPoint, run_view
from podium.commands.logs import lines_of
from shared.messages import Phase


def test_the_base_models_loss_is_told_from_those_of_training() -> None:
    points = [
        RunPoint(at=0.0, phase=Phase.BASELINE),
        RunPoint(at=1.0, phase=Phase.TRAIN, base_loss=3.0, dev_loss=3.0),
        RunPoint(at=2.0, phase=Phase.TRAIN, step=8, dev_loss=2.5),
        RunPoint(at=2.0, phase=Phase.TRAIN, step=8, dev_loss=2.5, message="so far"),
    ]
    lines = [(line.phase, line.step, line.text) for line in lines_of(run_view("t", points, 10))]
    assert lines == [
        ("baseline", 0, "begins"),
        ("baseline", 0, "held-out loss of the base model 3.0000"),
        ("train", 0, "begins"),
        ("train", 8, "held-out loss 2.5000"),
        ("train", 8, "so far"),
    ]
