"""What the plan and the model card say of a search: what was tried, and why one trial was taken."""

from __future__ import annotations

import msgspec

from shared.planning.plan import Deviation, Plan
from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.strategy.rates import at_best_rate
from trainer_node.engine.search.trial import TrialResult


def explained(plan: Plan, done: list[TrialResult], best: TrialResult) -> Plan:
    """Return the plan with a deviation that says what was tried and why this was taken."""
    losses = [one.probe_loss if one.trial.stage else one.loss for one in done]
    tried = "; ".join(
        f"{number}: {one.trial}: {'no number' if loss is None else f'{loss:.4f}'}"
        for number, (one, loss) in enumerate(zip(done, losses, strict=True), 1)
        if not one.trial.refit
    )
    probes, count = sum(bool(one.trial.stage) for one in done), sum(one.trial.refit for one in done)
    times = "once" if count == 1 else f"{count} times"
    again = f"; run again on all rows, {times}" if count else ""
    joins = any(one.trial.with_best and one.loss is not None for one in done)
    again += ", to be averaged with it" * joins
    again += ", with noise on the embeddings" * any(one.trial.noise > 0.0 for one in done)
    rate = next((one.trial.rate for one in done if one.trial.refit), best.trial.rate)
    if best.factor is not None and rate != best.trial.rate:
        again += f", at rate x {rate:.2g}: its loss is lowest with {best.factor:.2f} times its delta"
        told = at_best_rate(best, [one for one in done if not one.trial.refit]).rate
        again += ", and averages of LoRA want more" * (rate > 1.001 * told)
    if done[-1].trial.last_pass:
        again = "; then one pass over the development rows"
    lowest = best_of(done) or best
    why = f"it has the lowest held-out loss of {len(done) - count} trials"
    if lowest.loss != best.loss:
        why = "the mean of LoRA's runs like it should end lower than any other trial's runs"
    found = Deviation(
        "training run",
        f"trial 1 ({done[0].trial})",
        f"trial {done.index(best) + 1} ({best.trial})",
        f"{why} ({tried}){again}",
    )
    if probes:
        why = f"the highest rate whose probe was hardly worse than the best of {probes} ({tried}){again}"
        found = Deviation("learning rate", "1 x the plan's", f"{best.trial.rate:.2g} x the plan's", why)
    return msgspec.structs.replace(plan, deviations=[*plan.deviations, found])
