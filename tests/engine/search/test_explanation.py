"""What the model card says of a search."""

from collections.abc import Callable

from msgspec.structs import replace

from shared.planning.plan import Plan
from trainer_node.engine.search.explanation import explained
from trainer_node.engine.search.trial import Trial, TrialResult, last_pass_of


def test_the_model_card_says_the_rate_of_the_runs_on_all_rows(make_plan: Callable[..., Plan]) -> None:
    trial = Trial(arm="dense")
    best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=0.7)
    again = TrialResult(trial=replace(trial, rate=0.343, refit=True), loss=1.9, tokens=1, train_s=1.0)
    why = explained(make_plan("dense"), [best, again], best).deviations[-1].reason
    assert "run again on all rows, once, at rate x 0.34: its loss is lowest with 0.70 times its delta" in why
    same = replace(again, trial=replace(trial, refit=True))
    assert "at rate" not in explained(make_plan("dense"), [best, same], best).deviations[-1].reason
    joined = replace(again, trial=replace(again.trial, with_best=True))
    why = explained(make_plan("dense"), [best, joined], best).deviations[-1].reason
    assert "once, to be averaged with it, at rate x 0.34" in why
    assert "averages of LoRA want more" not in why
    higher = replace(joined, trial=replace(joined.trial, rate=0.5))
    noisy = replace(higher, trial=replace(higher.trial, noise=5.0))
    why = explained(make_plan("lora"), [best, noisy], best).deviations[-1].reason
    assert ", with noise on the embeddings" in why
    why = explained(make_plan("lora"), [best, higher], best).deviations[-1].reason
    assert "noise" not in why
    assert "at rate x 0.5" in why
    assert "averages of LoRA want more" in why
    failed = replace(joined, loss=None)
    assert "averaged" not in explained(make_plan("dense"), [best, failed], best).deviations[-1].reason
    without = replace(best, factor=None)  # a search by probes
    last = replace(again, trial=last_pass_of(trial))
    why = explained(make_plan("dense"), [without, last], without).deviations[-1].reason
    assert why.endswith("then one pass over the development rows")


def test_the_model_card_says_why_a_trial_with_a_higher_loss_is_repeated(
    make_plan: Callable[..., Plan],
) -> None:
    lora = TrialResult(trial=Trial(arm="lora"), loss=2.0, tokens=1, train_s=1.0)
    dense = TrialResult(trial=Trial(arm="dense"), loss=1.99, tokens=1, train_s=1.0)
    again = TrialResult(trial=Trial(arm="lora", refit=True, of=0), loss=1.5, tokens=1, train_s=1.0)
    why = explained(make_plan("lora"), [lora, dense, again], lora).deviations[-1].reason
    assert why.startswith("the mean of LoRA's runs like it should end lower")
    why = explained(make_plan("dense"), [lora, dense], dense).deviations[-1].reason
    assert why.startswith("it has the lowest held-out loss of 2 trials")
