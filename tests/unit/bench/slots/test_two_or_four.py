"""The same box as two halves or four quarters: who is accepted, how far each job gets, who wins."""

import pytest

from bench.slots.box import Offer, play
from bench.slots.two_or_four import HALF_EPOCHS, Ended, ended, figures, report, wanted_epochs, wins

AT_ONCE = [Offer(f"job {number}", 0.0, 3600.0, 1000) for number in range(4)]


def test_a_half_trains_twice_as_far_as_a_quarter_and_refuses_what_it_has_no_slot_for() -> None:
    two, refused = play(AT_ONCE, 2, 2.0, most_epochs=10.0)
    four, none = play(AT_ONCE, 4, 2.0, most_epochs=10.0)
    assert (len(two), len(refused), len(four), len(none)) == (2, 2, 4, 0)
    assert {run.epochs for run in two} == {3.6}
    assert {run.epochs for run in four} == {1.8}
    assert {run.slot for run in four} == {0, 1, 2, 3}


def test_a_job_that_needs_no_more_epochs_ends_early_and_frees_its_slot() -> None:
    offers = [AT_ONCE[0], Offer("later", 1000.0, 3600.0, 1000)]
    runs, refused = play(offers, 1, 2.0, most_epochs=2.0)
    assert not refused
    assert [run.ends_s for run in runs] == [1000.0, 2000.0]
    assert [run.took_s for run in runs] == [1000.0, 1000.0]
    assert play(offers, 1, 1.9, most_epochs=2.0)[1] == offers[1:]


def test_every_load_of_the_bench_keeps_both_divisions_busy() -> None:
    for half in HALF_EPOCHS:
        together, apart = ended(half, at_once=True), ended(half, at_once=False)
        assert [one.refused for one in together] == [2, 0]
        assert [one.refused for one in apart] == [0, 0]
    assert wanted_epochs() == [0.5, 1.0, 2.0, 4.0]


def test_a_refused_job_counts_as_the_base_models_loss_and_as_a_lost_task() -> None:
    two, four = ended(2.0, at_once=True)
    losses = {0.0: [4.0, 4.0], 1.0: [2.5, 2.5], 2.0: [2.0, 2.0]}
    assert figures(two, [losses])["loss"] == 2.0
    assert figures(two, [losses])["as_base"] == 3.0
    assert figures(two, [losses])["delivery_rate"] == 0.5
    assert figures(four, [losses])["as_base"] == 2.5
    assert figures(two, [losses])["minutes"] == pytest.approx(60.0)
    assert wins(two, four, [losses]) == {"two": 2, "four": 2, "none": 0}


def test_equal_losses_are_won_by_nobody() -> None:
    runs, _ = play(AT_ONCE[:1], 2, 2.0, 1.0)
    same = Ended(2, runs, 0)
    assert wins(same, same, [{1.0: [2.0, 3.0]}]) == {"two": 0, "four": 0, "none": 1}


def test_the_report_names_every_load() -> None:
    losses = {epochs: [4.0 - epochs / 2] for epochs in (0.0, *wanted_epochs())}
    assert len(report([losses, losses])) == 2 * len(HALF_EPOCHS)
