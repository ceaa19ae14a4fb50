"""The search for the best training run, on loss surfaces that are known."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.engine.search.strategy.surfaces import START, bowl, plenty, searched
from trainer_node.engine.search.strategy.best_trial import AFTER_LOWEST, best_of, most_promising, repeated_of
from trainer_node.engine.search.strategy.neighbours import BATCH_RATE, is_like
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.strategy.prior import rate_factor
from trainer_node.engine.search.trial import FILE, SearchRecord, Trial, TrialResult, read_search, write_search

LORA = frozenset({"lora"})
LORA_TRIAL = Trial(arm="lora", epochs=2.0)


@pytest.mark.parametrize("rate", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("epochs", [1.0, 4.0])
@pytest.mark.parametrize("batch", [8, 64])
def test_with_time_the_search_comes_close_to_the_lowest_point(rate: float, epochs: float, batch: int) -> None:
    done, left = searched(bowl(rate, epochs, batch), 3000.0)
    best = best_of(done)
    assert best
    assert best.loss is not None
    assert best.loss < 2.02
    assert left > 0


def test_the_better_arm_is_found() -> None:
    done, _ = searched(bowl(1.0, 2.0, 32, lora=-0.3), 3000.0)
    best = best_of(done)
    assert best
    assert best.trial.arm == "lora"


def test_the_other_arm_is_tried_early() -> None:
    done, _ = searched(bowl(1.0, 2.0, 32, lora=-0.3), 3000.0)
    assert "lora" in [result.trial.arm for result in done if not result.trial.short][:3]


def test_no_trial_is_run_twice() -> None:
    done, _ = searched(bowl(1.0, 2.0, 32), 10_000.0)
    trials = [result.trial for result in done]
    assert len(set(trials)) == len(trials)


def test_the_search_ends_by_itself() -> None:
    _, left = searched(bowl(1.0, 2.0, 32), 1e9)
    assert left > 0.99e9


def test_trials_keep_within_the_time() -> None:
    for seconds in range(20, 400, 7):
        _, left = searched(bowl(3.0, 4.0, 16), float(seconds))
        assert left >= -1e-6


def test_a_diverged_trial_is_left_behind() -> None:
    def loss(trial: Trial) -> float | None:
        return None if trial.rate > 0.9 else bowl(0.3, 2.0, 32)(trial)

    done, _ = searched(loss, 3000.0)
    best = best_of(done)
    assert best
    assert best.trial.rate < 0.9


def test_a_slower_machine_gets_fewer_trials() -> None:
    many, _ = searched(bowl(1.0, 2.0, 32), 600.0)
    few, _ = searched(bowl(1.0, 2.0, 32), 200.0)
    assert len(few) < len(many)


def test_a_batch_that_does_not_fill_the_smallest_packs_is_tried_if_there_is_time() -> None:
    for seconds, least in ((1e9, 2), (60.0, 16)):
        done: list[TrialResult] = []
        while trial := next_trial(START, done, plenty(least_batch=20.0, left_s=seconds, all_s=seconds)):
            done.append(TrialResult(trial=trial, loss=bowl(1.0, 2.0, 4)(trial), tokens=1, train_s=1.0))
        assert min(result.trial.batch for result in done) == least


def test_after_a_turn_the_next_run_ends_there_and_none_is_longer() -> None:
    budget = plenty()
    done = [TrialResult(trial=START[0], loss=2.0, tokens=1, train_s=1.0, lowest_epochs=1.2)]
    first = next_trial(START, done, budget)
    assert first == replace(START[0], epochs=AFTER_LOWEST * 1.2)
    while trial := next_trial(START, done, budget):
        assert trial.epochs <= START[0].epochs
        done.append(TrialResult(trial=trial, loss=3.0, tokens=1, train_s=1.0))


def test_a_turn_within_the_first_epoch_asks_for_a_lower_rate() -> None:
    budget = plenty()
    early = TrialResult(trial=START[0], loss=2.0, tokens=1, train_s=1.0, lowest_epochs=0.8)
    first = next_trial(START, [early], budget)
    assert first
    assert (first.rate, first.epochs) == (1 / 3, 2.0)
    worse = TrialResult(trial=first, loss=2.1, tokens=1, train_s=1.0)
    assert next_trial(START, [early, worse], budget) == replace(START[0], epochs=AFTER_LOWEST * 0.8)


def test_a_main_run_that_turned_early_leaves_time_for_a_better_one() -> None:
    budget = plenty(left_s=20.0, all_s=40.0)
    main = replace(START[0], epochs=4.0, main=True, leaves_s=5.0)
    done = [TrialResult(trial=main, loss=2.0, tokens=1, train_s=1.0, lowest_epochs=1.0)]
    again = next_trial(START, done, budget)
    assert again
    assert again.refit
    assert again.epochs == AFTER_LOWEST
    assert again.leaves_s == 0.0  # or it would end before its planned epochs
    done.append(TrialResult(trial=again, loss=1.0, tokens=1, train_s=1.0))
    assert best_of(done) == done[0]


def test_a_search_of_an_older_version_goes_on_as_it_began(tmp_path: Path) -> None:
    whole = TrialResult(trial=replace(START[0], epochs=4.0), loss=2.0, tokens=1, train_s=1.0)
    record = SearchRecord(began_at=0.0, all_s=1e6, plans={}, done=[whole])
    write_search(tmp_path, record)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes().replace(b'"short":false,', b""))
    assert b"short" not in path.read_bytes()
    found = read_search(tmp_path)
    assert found == record
    budget = plenty()
    trial = next_trial(START, found.done, budget)
    assert trial
    assert not trial.short
    assert trial.epochs == 4.0


@pytest.mark.parametrize("rate", [0.1, 0.3, 1.0, 3.0, 10.0])
def test_a_run_that_tells_how_far_it_should_have_gone_leads_to_the_best_rate(rate: float) -> None:
    done, _ = searched(bowl(rate, 2.0, 32), 250.0, best_rate=rate)
    refit = next(result.trial for result in done if result.trial.refit)
    assert refit.rate == pytest.approx(rate, rel=0.6)
    without, _ = searched(bowl(rate, 2.0, 32), 250.0)
    best, other = best_of(done), best_of(without)
    assert best
    assert other
    assert (best.loss or 9.0) <= (other.loss or 9.0) + 0.005


def test_at_the_best_rate_no_other_one_is_tried_early() -> None:
    first = Trial(arm="dense", epochs=2.0)
    done = [TrialResult(trial=first, loss=2.0, tokens=1, train_s=1.0, factor=1.05)]
    trial = next_trial(START, done, plenty())
    assert trial == replace(first, rate=1.05**3, epochs=4.0)


def test_a_rate_that_was_worse_is_not_asked_for_again() -> None:
    first = Trial(arm="dense", epochs=2.0)
    results = [
        TrialResult(trial=first, loss=2.0, tokens=1, train_s=1.0, factor=0.7),
        TrialResult(trial=replace(first, rate=0.4), loss=2.1, tokens=1, train_s=1.0, factor=1.2),
    ]
    trial = next_trial(START, results, plenty(left_s=30.0, all_s=90.0, all_rows=1.25))
    assert trial == replace(first, refit=True, of=0)


def test_a_rate_near_one_that_was_worse_is_not_tried_at_full_length() -> None:
    first = Trial(arm="dense", epochs=2.0)
    results = [
        TrialResult(trial=first, loss=2.0, tokens=1, train_s=1.0, factor=0.75),  # asks for .42
        TrialResult(trial=replace(first, rate=1 / 3), loss=2.1, tokens=1, train_s=1.0, factor=1.2),
    ]
    trial = next_trial(START, results, plenty())
    assert trial
    assert (trial.arm, trial.rate, trial.epochs) == ("dense", 1.0, 4.0)


def test_a_rate_that_is_told_and_near_needs_no_trial_if_two_runs_on_all_rows_fit_without() -> None:
    first = Trial(arm="dense", epochs=2.0)
    # A trial takes 21 s, and a run on all rows 26 s.
    near = [TrialResult(trial=first, loss=2.0, tokens=1, train_s=1.0, factor=0.77)]
    budget = plenty(left_s=60.0, all_s=81.0, all_rows=1.25)
    assert next_trial(START, near, budget) == replace(first, rate=0.77**3, refit=True, of=0)
    far = [replace(near[0], factor=0.6)]
    assert next_trial(START, far, budget) == replace(first, rate=0.6**3)
    unknown = [replace(near[0], factor=None)]
    assert next_trial(START, unknown, budget) == replace(first, rate=3.0)


def test_with_time_a_near_rate_that_is_told_gets_its_trial() -> None:
    first = Trial(arm="dense", epochs=2.0)
    near = [TrialResult(trial=first, loss=2.0, tokens=1, train_s=1.0, factor=0.77)]
    assert next_trial(START, near, plenty(all_rows=1.25)) == replace(first, rate=0.77**3)


def test_once_a_rate_is_told_the_trials_are_about_other_things() -> None:
    done, _ = searched(bowl(1.0, 4.0, 64), 1e6, best_rate=1.0)
    long = [result.trial for result in done if not result.trial.short and not result.trial.refit]
    dense = [trial for trial in long if trial.arm == "dense"]
    assert all(0.6 < trial.rate < 1.5 * BATCH_RATE**2 for trial in dense)
    alike = [(one, other) for one in dense for other in dense if is_like(one, other) and one is not other]
    assert all(one.epochs != other.epochs for one, other in alike)


def test_other_trials_have_the_rate_that_is_told() -> None:
    first = Trial(arm="dense", epochs=2.0)
    done = [TrialResult(trial=first, loss=2.0, tokens=1, train_s=1.0, factor=0.9)]  # a rate of .729
    assert next_trial(START, done, plenty()) == replace(first, rate=0.9**3, epochs=4.0)


def test_after_a_run_of_lora_that_tells_no_rate_dense_deltas_are_tried() -> None:
    trial = Trial(arm="lora", epochs=2.0)
    for factor, arm in ((1.0, "dense"), (1.02, "lora")):
        best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=factor)
        budget = plenty(all_rows=1.25, lora=frozenset({"lora"}))
        second = next_trial(START, [best], budget)
        assert second
        assert second.arm == arm


def test_next_to_lora_dense_deltas_are_tried_if_there_is_time() -> None:
    first = Trial(arm="lora", epochs=2.0)
    done = [TrialResult(trial=first, loss=2.0, tokens=1, train_s=1.0)]
    budget = plenty(all_rows=1.25, lora=frozenset({"lora"}))
    tried: list[Trial] = []
    for _ in range(4):
        trial = next_trial(START, done, budget)
        assert trial
        tried.append(trial)
        done.append(TrialResult(trial=trial, loss=3.0, tokens=1, train_s=1.0))
    assert "dense" in {trial.arm for trial in tried}


def test_next_to_lora_the_other_arms_begin_at_the_rate_of_their_prior() -> None:
    trial = Trial(arm="lora", epochs=2.0, batch=4)
    best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=1.0)
    budget = plenty(all_rows=1.25, lora=LORA)
    second = next_trial(START, [best], budget)
    assert second == replace(trial, arm="dense", rate=rate_factor(trial, budget))
    assert second.rate != 1.0


def test_a_real_models_lora_gains_nothing_where_one_run_on_all_rows_fits() -> None:
    lora = TrialResult(trial=LORA_TRIAL, loss=2.0, tokens=1, train_s=1.0, factor=0.95)
    dense = TrialResult(
        trial=replace(LORA_TRIAL, arm="dense"), loss=1.985, tokens=1, train_s=1.0, factor=0.95
    )
    for left, arm in ((30.0, "dense"), (60.0, "lora")):  # a run on all rows takes 26 s
        refit = next_trial(START, [lora, dense], plenty(left_s=left, all_s=100.0, all_rows=1.25, lora=LORA))
        assert refit
        assert (refit.refit, refit.arm) == (True, arm)


def test_how_far_a_rate_is_off_is_no_matter_of_another_arm() -> None:
    trial = Trial(arm="lora", rate=0.2, epochs=2.0)
    best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=1.05)
    # A trial takes 21 s, and two runs on all rows 52 s.
    for seconds, searched_on in ((60.0, False), (90.0, True)):
        budget = plenty(left_s=seconds, all_s=seconds + 30.0, all_rows=1.25, lora=LORA, tiny=True)
        second = next_trial(START, [best], budget)
        assert second
        assert second.refit is not searched_on


def test_a_real_models_lora_whose_rate_is_told_has_all_its_runs_on_all_rows_before_other_trials() -> None:
    # A trial of one epoch takes 11 s, and six runs of two epochs on all rows 156 s.
    best = TrialResult(trial=LORA_TRIAL, loss=2.0, tokens=1, train_s=1.0, factor=0.95)
    for left, refit in ((100.0, True), (170.0, True), (180.0, False)):
        budget = plenty(left_s=left, all_s=left + 30.0, all_rows=1.25, lora=LORA)
        second = next_trial(START, [best], budget)
        assert second
        assert second.refit is refit


def test_a_real_models_lora_counts_for_what_the_mean_of_its_runs_will_gain() -> None:
    short = TrialResult(trial=replace(LORA_TRIAL, epochs=1.0), loss=1.995, tokens=1, train_s=1.0, factor=0.95)
    long = TrialResult(trial=LORA_TRIAL, loss=2.0, tokens=1, train_s=1.0, factor=0.95)
    dense = TrialResult(
        trial=replace(LORA_TRIAL, arm="dense"), loss=1.985, tokens=1, train_s=1.0, factor=0.95
    )
    for done, tiny, repeated in (
        ([short, long, dense], False, long),  # the mean of longer runs is lower
        ([short, long, replace(dense, loss=1.97)], False, replace(dense, loss=1.97)),
        ([replace(short, loss=1.98), long, dense], False, replace(short, loss=1.98)),
        ([short, long, dense], True, dense),  # measured on a tiny model's jobs: no gain on the mean
    ):
        budget = plenty(left_s=60.0, all_s=90.0, all_rows=1.25, lora=LORA, tiny=tiny)
        refit = next_trial(START, done, budget)
        assert refit
        assert refit.of is not None
        assert done[refit.of] == repeated
        again = TrialResult(trial=refit, loss=1.5, tokens=1, train_s=1.0)
        assert repeated_of([*done, again]) == most_promising([*done, again], budget.gains) == repeated
        second = next_trial(START, [*done, again], budget)
        assert second
        assert (second.of, second.seed) == (refit.of, 1)


def test_every_search_of_a_tiny_model_that_begins_with_lora_ends_with_a_run_on_all_rows() -> None:
    for rate in (0.3, 1.5, 6.0):
        for seconds in range(24, 200, 3):
            done, left = searched(
                bowl(rate, 2.0, 2, lora=-0.1),
                float(seconds),
                all_rows=1.25,
                trial_s=0.0,
                tiny=True,
                lora=LORA,
                best_rate=rate,
            )
            assert left >= 0.0
            assert done[0].trial.arm == "lora"
            assert done[-1].trial.refit
