"""Go back to earlier weights when training has gone wrong; in the data it goes on, past rows that are bad."""

from __future__ import annotations

from trainer_node.engine.distributed.sharding import placed
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.checkpoint import Checkpoint
from trainer_node.engine.train.health import Health
from trainer_node.engine.train.state import TrainState


def go_back(state: TrainState, reporter: Reporter) -> None:
    """Collective: take the newest checkpoint's weights, or untrained ones, and half the rate from now on."""
    group = state.process_group
    with reporter.patience(state.schedule.costs.load_s + state.schedule.costs.save_s + 60.0):
        found = group.broadcast_object(_newest(state, reporter) if group.is_main else None)
        state.optimizer.state.clear()
        if found:
            load_trained(state, found)
            then, where = found.manifest.position.health, f"step {found.manifest.position.step}"
        else:
            weights, parameters = state.untrained(), state.deltas.parameters
            state.deltas.load_state({name: placed(one, parameters[name]) for name, one in weights.items()})
            if state.average is not None:
                state.average.reset()
            then, where = Health(), "before the first step"
    bad, usual = state.health.in_a_row, state.health.mean
    state.health = state.health.returned(then)
    goes_on = f"training goes on at {state.health.rate_share} of the planned rate"
    reporter.message(
        f"{bad} steps in a row had no finite gradient or a loss far above {usual:.2f}: back to the weights "
        f"of {where}; {'training ends' if state.health.is_hopeless else goes_on}"
    )


def load_trained(state: TrainState, found: Checkpoint) -> None:
    """Take weights, optimiser moments and average from a checkpoint."""
    parameters = state.deltas.parameters
    weights = found.pieces("weights").items()
    state.deltas.load_state({name: placed(value, parameters[name]) for name, value in weights})
    for key, pieces in found.pieces("optimizer").items():
        field_name, name = key.split("/", 1)
        parameter = parameters[name]
        # Moments may be stored in 16 bits; the step counter is fp32, where fused AdamW wants it.
        if pieces[0].shape:
            value = placed(pieces, parameter, parameter.dtype)
        else:
            value = pieces[0].to(parameter.device, copy=True)
        state.optimizer.state[parameter][field_name] = value
    if state.average is not None:
        state.average.count = found.manifest.position.averaged
        state.average.weights = {
            name: placed(value, parameters[name]) for name, value in found.pieces("average").items()
        }


def _newest(state: TrainState, reporter: Reporter) -> Checkpoint | None:
    """Return the newest checkpoint of this trial from before the steps that went wrong."""
    state.saver.wait()
    for found in checkpoint.whole(state.saver.folder, reporter.message):
        position = found.manifest.position
        if position.trial == state.trial and position.health.in_a_row == 0:
            return found
    return None
