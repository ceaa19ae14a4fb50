"""How a search begins: by the time there is, with which arm, batch and rate."""

import pytest
from msgspec.structs import replace

from tests.engine.search.strategy.surfaces import START, bowl, plenty, searched
from trainer_node.engine.search.strategy.budget import TRIAL_SAFETY
from trainer_node.engine.search.strategy.first_trial import first_trial
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.strategy.prior import LORA_ONCE
from trainer_node.engine.search.trial import Trial


@pytest.mark.parametrize(
    ("step_s", "batch", "epochs"), [(0.0, 2, 1.6), (0.01, 4, 1.42), (0.05, 8, 1.22), (1.0, 16, 0.39)]
)
def test_steps_that_take_time_of_their_own_are_larger(step_s: float, batch: int, epochs: float) -> None:
    """90 rows and time for 1.6 epochs of them: 100 steps need a batch of 1."""
    budget = plenty(left_s=2.88, all_s=2.88, trial_s=0.0, epoch_tokens=1_800, examples=90, step_s=step_s)
    trial = first_trial((replace(START[0], batch=16),), budget)
    assert (trial.batch, trial.epochs) == (batch, pytest.approx(epochs, abs=0.01))


def test_two_runs_share_the_time_where_none_is_left_to_search() -> None:
    # 2.6 epochs of 120 rows: 60 steps of batch 2 an epoch, too few for short trials that compare rates.
    done, left = searched(bowl(1.0, 2.0, 4), 26.5, examples=120, all_rows=1.25)
    first, second = (result.trial for result in done)
    assert (first.main, first.refit, second.refit, first.batch) == (False, False, True, 2)
    assert 1.0 <= first.epochs == second.epochs < 1.2
    assert left >= 0


@pytest.mark.parametrize(
    ("rows", "seconds", "all_rows", "tiny"),
    [
        (40, 26.5, 1.25, False),  # 22 steps each are too few
        (120, 20.0, 1.25, False),  # less than an epoch each
        (120, 26.5, 1.25, True),  # small models want to see their rows more often
        (4000, 26.5, 1.11, False),  # few rows are held out
    ],
)
def test_one_run_takes_the_time_that_is_not_for_two(
    rows: int, seconds: float, all_rows: float, tiny: bool
) -> None:
    done, _ = searched(bowl(1.0, 2.0, 4), seconds, examples=rows, all_rows=all_rows, tiny=tiny)
    assert done[0].trial.main
    assert not any(result.trial.refit and not result.trial.last_pass for result in done)


def test_without_time_for_short_trials_there_is_one_run() -> None:
    done, _ = searched(bowl(3.0, 2.0, 32), 20.0, epoch_tokens=100_000, examples=500)
    (main,) = done
    assert main.trial.main
    assert main.trial.arm == "dense"


def test_few_rows_get_a_small_batch_so_that_there_are_enough_steps() -> None:
    def first(examples: int, least_batch: float = 1.0, seconds: float = 1e6) -> Trial | None:
        budget = plenty(examples=examples, least_batch=least_batch, left_s=seconds, all_s=seconds)
        return next_trial(START, [], budget)

    for examples, batch in ((10_000, 32), (700, 16), (400, 8), (200, 4), (100, 2), (20, 2)):
        trial = first(examples)
        assert trial
        assert trial.batch == batch
    # Fewer than fill the smallest packs cost as much as full ones: only if there is time for them.
    for seconds, batch in ((1e6, 2), (60.0, 8)):
        trial = first(50, least_batch=8.0, seconds=seconds)
        assert trial
        assert trial.batch == batch


def test_the_first_trial_is_given_whatever_the_time() -> None:
    done, _ = searched(bowl(1.0, 2.0, 32), 0.0)
    assert len(done) == 1


def test_lora_comes_first_where_its_runs_are_averaged() -> None:
    both = frozenset({"lora"})
    # A run of 1.5 epochs takes 15 s, one on all rows 18.75 s.
    for seconds, rows, lora, arm in (
        (60.0, 1.25, both, "lora"),
        (50.0, 1.25, both, "dense"),  # two don't fit
        (60.0, 1.02, both, "dense"),  # as many rows, a second run is worth less
        (60.0, 1.25, frozenset[str](), "dense"),
    ):
        budget = plenty(left_s=seconds, all_s=seconds, all_rows=rows, trial_s=0.0, lora=lora)
        assert first_trial(START, budget).arm == arm
    for least_batch, batch in ((1.0, 2), (4.0, 4)):  # halved to 2, batches cost twice as much
        small = plenty(left_s=130.0, all_s=130.0, all_rows=1.25, trial_s=0.0, lora=both, examples=120)
        first = first_trial(START, replace(small, least_batch=least_batch))
        assert (first.arm, first.batch) == ("lora", batch)
    alone = plenty(left_s=60.0, all_s=60.0, all_rows=1.25, trial_s=0.0, lora=both, single=both)
    assert first_trial(START, alone).arm == "dense"
    for examples, arm in ((90, "lora"), (70, "dense")):  # 1.6 epochs of the smallest batches: 73 and 57 steps
        few = plenty(left_s=60.0, all_s=60.0, all_rows=1.25, trial_s=0.0, lora=both, examples=examples)
        assert first_trial(START, few).arm == arm


def test_with_many_rows_lora_comes_first_if_it_has_weights_and_steps_enough() -> None:
    lora = frozenset({"lora"})
    many = plenty(lora=lora, ample=lora, all_rows=1.03, trial_s=0.0, examples=5_000)
    # An epoch takes 10 s, and 156 steps of batch 32.
    for seconds, changes, arm in (
        (200.0, {}, "lora"),
        (25.0, {}, "lora"),
        (11.0, {}, "lora"),
        (9.0, {}, "dense"),  # less than an epoch
        (25.0, {"examples": 1_800}, "dense"),  # 141 steps
        (25.0, {"ample": frozenset()}, "dense"),
        (25.0, {"single": lora}, "dense"),
        (25.0, {"tiny": True}, "dense"),
        (25.0, {"all_rows": 1.1}, "dense"),
    ):
        budget = replace(many, left_s=seconds, all_s=seconds, **changes)
        assert first_trial(START, budget).arm == arm, (seconds, changes)


def test_a_tiny_model_begins_with_lora_where_its_trial_and_one_run_are_averaged() -> None:
    both = frozenset({"lora"})
    # A run of an epoch takes 10 s, one on all rows 12.5 s; both at their best 5% longer.
    for seconds, rows, tiny, single, arm in (
        (24.0, 1.25, True, frozenset[str](), "lora"),
        (23.0, 1.25, True, frozenset[str](), "dense"),  # less than an epoch each
        (23.6, 1.25, True, frozenset[str](), "dense"),
        (24.0, 1.25, False, frozenset[str](), "dense"),
        (24.0, 1.1, True, frozenset[str](), "dense"),  # hardly more rows
        (24.0, 1.25, True, both, "dense"),  # not averaged
    ):
        left = plenty(left_s=seconds, all_s=seconds, all_rows=rows, trial_s=0.0, lora=both, tiny=tiny)
        first = first_trial(START, replace(left, single=single))
        assert first.arm == arm
        if arm == "lora":
            assert first.epochs == pytest.approx(24.0 / TRIAL_SAFETY / 22.5)
            assert first.rate == pytest.approx(LORA_ONCE / first.epochs)


def test_a_tiny_model_averages_runs_of_lora_of_an_epoch() -> None:
    left = plenty(left_s=48.0, all_s=48.0, all_rows=1.25, trial_s=0.0, lora=frozenset({"lora"}))
    for tiny, arm, epochs in (
        (True, "lora", 48.0 / TRIAL_SAFETY / 35.0),
        (False, "dense", 48.0 / TRIAL_SAFETY / 22.5),
    ):
        first = first_trial(START, replace(left, tiny=tiny))
        assert (first.arm, first.epochs) == (arm, pytest.approx(epochs))


def test_a_finer_batch_of_lora_that_takes_longer_shortens_its_runs() -> None:
    start = tuple(replace(trial, batch=4) for trial in START)
    for seconds in range(25, 90, 5):  # 2.4 to 8.1 epochs; a step takes 2% longer than its tokens
        left = plenty(left_s=seconds, all_s=seconds, all_rows=1.25, trial_s=0.0, step_s=0.002, examples=200)
        budget = replace(left, lora=frozenset({"lora"}), tiny=True)
        first = first_trial(start, budget)
        assert first.arm == "lora"
        assert budget.fits_with(replace(first, epochs=0.999 * first.epochs), 1 if seconds < 38 else 2)


def test_a_finer_batch_that_takes_longer_leaves_time_for_both_runs_on_all_rows() -> None:
    left = plenty(left_s=60.0, all_s=60.0, all_rows=1.25, trial_s=0.0, step_s=0.01, examples=200)
    first = first_trial((replace(START[0], batch=4),), left)
    assert first.batch == 2
    assert left.fits_with(replace(first, epochs=0.999 * first.epochs), 2)


def test_many_rows_of_a_tiny_model_begin_with_dense_deltas() -> None:
    left = plenty(left_s=48.0, all_s=48.0, all_rows=1.25, trial_s=0.0, lora=frozenset({"lora"}), tiny=True)
    for examples, arm, epochs in (
        (600, "lora", 48.0 / TRIAL_SAFETY / 35.0),
        (601, "dense", 48.0 / TRIAL_SAFETY / 22.5),
    ):
        first = first_trial(START, replace(left, examples=examples))
        assert (first.arm, first.epochs) == (arm, pytest.approx(epochs))
    real = replace(left, left_s=60.0, all_s=60.0, examples=601, tiny=False)
    assert first_trial(START, real).arm == "lora"


def test_lora_comes_first_however_the_time_is_rounded() -> None:
    for count in range(200):
        seconds = 60.0 + 0.137 * count
        budget = plenty(
            left_s=seconds, all_s=seconds, all_rows=1.23, trial_s=0.3, lora=frozenset({"lora"}), examples=250
        )
        assert first_trial(START, budget).arm == "lora"
