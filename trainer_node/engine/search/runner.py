"""Run the trials of a search: one model, set back before each; the best trials' weights stay on disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch

from shared.clock import TokenClock
from shared.errors import EngineError
from shared.messages.runs import ErrorCode, Phase
from shared.planning.plan import Plan
from shared.planning.step_size import pack_limit, step_size
from trainer_node.engine.assemble import Adapted, Place, adapt, load_base, make_state, untrained_weights
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.data.examples import Examples, joined
from trainer_node.engine.distributed.sharding import as_held, load_rows, placed
from trainer_node.engine.distributed.weight_slices import slices_of
from trainer_node.engine.evaluate.candidates import Weights
from trainer_node.engine.evaluate.moved_weights import scaled
from trainer_node.engine.finish import free_optimizer
from trainer_node.engine.memory.oom import release
from trainer_node.engine.search.held_copies import copy_that_fits
from trainer_node.engine.search.kept_trials import kept_blocks, staying, trial_folder
from trainer_node.engine.search.scoring import probed, scored
from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.time_left import (
    after_s,
    are_factors_scored,
    averaged_arms,
    end_at,
    factors_s,
)
from trainer_node.engine.search.trial import (
    SearchRecord,
    Trial,
    TrialResult,
    factor_to_apply,
    write_search,
)
from trainer_node.engine.search.winner.rate_search import RAMP_STEPS
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.async_saver import Saver
from trainer_node.engine.train.checkpoint import Checkpoint
from trainer_node.engine.train.oom_fallback import smaller_by, train_or_stop
from trainer_node.engine.train.saved_state import snapshot_name
from trainer_node.engine.train.state import TrainState


@dataclass(frozen=True)
class Trained:
    """What a process has to say of a trial that it trained."""

    result: TrialResult
    steps: int
    plan: Plan  # as it was carried out
    size: int  # bytes of the trained weights in fp32


@dataclass
class TrialRunner:
    """The model that all trials of one arm train, and what is known so far."""

    run: RunContext
    record: RunRecord
    data: JobData
    dev: Examples
    known: SearchRecord
    saver: Saver
    models: list[torch.nn.Module]  # the base model, until an arm is added to it: then nobody else keeps it
    arm: str = ""
    adapted: Adapted | None = None
    start: dict[str, torch.Tensor] | None = None  # this process's part of the weights before the first step
    unsaved: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)  # by trial: this process's rows
    place: int = 0  # of this process's trial among those that run at once
    untouched: bool = False  # the model's weights are those before the first step

    @property
    def number(self) -> int:
        """Return the number of the trial that this process runs now."""
        return self.known.number + self.place

    def note(self, known: SearchRecord) -> None:
        """Record the state of the search, in memory and on disk."""
        self.known = known
        write_known(self.run, known)

    def run_trial(self, trial: Trial, found: Checkpoint | None) -> bool:
        """Train and score one trial; return False if the job was asked to stop."""
        number = self.number
        self.run.reporter.message(f"trial {number + 1}: {trial}")
        trained = self.train(trial, found)
        if trained is None:
            return False
        self.plan_again(trial.arm, trained.plan)
        self.note(self.known.finished(trained.result, trained.steps, clock_tokens(self.run)))
        self.prune(trained.size)
        self.tell(number)
        return True

    def train(self, trial: Trial, found: Checkpoint | None) -> Trained | None:
        """Train and score one trial, and keep its weights; return None if the job was asked to stop."""
        run, begun_at = self.run, self.run.clock.time()
        set_back = self.adapted is not None and not self.untouched
        run.reporter.restarted()
        state = self.prepared(trial, found)
        # Of what the first trial takes to begin, the next one has to read sharded weights only, if it must.
        reads_again = state.plan.parallel == "fsdp2" and self.start is None
        begun_s = self.record.costs.load_s if reads_again else 0.0
        begun_s = run.clock.time() - begun_at if set_back else begun_s
        run.reporter.phase(Phase.TRAIN)  # another arm's model may have been loaded
        if not train_or_stop(run, state):
            return None
        if state.step == 0 and not self.known.done:
            raise EngineError(ErrorCode.TOO_LATE, "not one step could be trained in the time that was left")
        trained_at = run.clock.time()
        free_optimizer(state)
        with run.patience():
            self.saver.wait()  # from here on the weights change
        if trial.stage:
            result = probed(run, self.record, self.dev, trial, state)
        else:
            first, saved = best_of(self.known.done) is None, self.saved(state)
            until = end_at(run, self.record, self.known.plans.values()) + factors_s(run, self.record)
            start = self.start if are_factors_scored(run, trial) else None
            result = scored(
                run, self.record, self.dev, trial, state, saved, first=first, start=start, factors_until=until
            )
        other_s = begun_s + run.clock.time() - trained_at
        result = msgspec.structs.replace(result, other_s=other_s, devices=state.plan.devices)
        if not trial.stage:
            result = self.keep(result, state, saved)
        size = 4 * sum(value.numel() for value in state.deltas.parameters.values())
        return Trained(result, state.step, state.plan, size)

    def tell(self, number: int) -> None:
        """Report what a finished trial showed."""
        result, best = self.known.done[number], best_of(self.known.done)
        if result.trial.stage:
            probe = "no number" if result.probe_loss is None else f"{result.probe_loss:.4f}"
            self.run.reporter.message(f"trial {number + 1}: loss of the probe {probe}")
            return
        loss = "no number" if result.loss is None else f"{result.loss:.4f}"
        kind = "loss on rows that it was trained on" if result.trial.refit else "held-out loss"
        leads = f"; best so far: {best.loss:.4f}" if best and best is not result else ""
        part = (
            f", lowest with {result.factor:.2f} times its delta" if result.factor not in (None, 1.0) else ""
        )
        self.run.reporter.message(f"trial {number + 1}: {kind} {loss}{part}{leads}")

    def prepared(self, trial: Trial, found: Checkpoint | None) -> TrainState:
        """Return the state of a trial, fresh or as a checkpoint left it; its weights may change."""
        adapted = self.with_arm(trial.arm)
        self.untouched = False
        arm = msgspec.structs.replace(self.known.plans[trial.arm], compile=adapted.plan.compile)
        record, data = rows_of(trial, self.record, self.data)
        plan = plan_of(trial, arm, record, int(data.train.lengths.max()))
        if trial.stage:
            plan = as_probe(plan)
        if trial.last_pass and found is None:
            parameters = adapted.deltas.parameters
            with self.run.patience():
                weights = self.weights_of(self.known.done[-1])
                factor = factor_to_apply(self.known.done[-1])
                if self.start is not None and factor:
                    adapted.deltas.load_state(scaled(weights, self.start, factor, parameters))
                else:
                    adapted.deltas.load_state(
                        {name: placed(value, parameters[name]) for name, value in weights.items()}
                    )
        place = Place(
            trial=self.number,
            steps_before=self.known.steps_before,
            tokens_before=self.known.tokens_before,
            seed=trial.seed,
            search_at=self.known.began_at,
            saves=not trial.stage or not self.known.done,  # one probe is there if the node comes back late
            keeps_losses=bool(trial.stage),
            curve=not trial.refit,
            leaves_s=trial.leaves_s + after_s(self.run, self.record, self.known.plans.values()),
        )
        return make_state(self.run, record, replace(adapted, plan=plan), data, found, self.saver, place)

    def with_arm(self, arm: str) -> Adapted:
        """Return the model with the arm's weights as they are before the first step.

        Processes that trained alone may have models of other arms, or none: if not all have what is wanted,
        all of them load it, together.
        """
        plan, adapted = self.known.plans[arm], self.adapted
        # Sharded weights can do without a copy: their rows are read again.
        can_go_back = self.untouched or self.start is not None or plan.parallel == "fsdp2"
        kept = arm == self.arm and adapted is not None and can_go_back
        held = self.run.process_group.gather_objects((kept, bool(self.models), self.start is not None))
        if not all(has_start for _, _, has_start in held):
            self.start = None  # all must score the same factors
        if adapted is not None and all(kept for kept, _, _ in held):
            if self.untouched:
                return adapted
            if self.start is not None:
                load_rows(adapted.deltas, self.start)
                return adapted
            with self.run.patience():
                adapted.deltas.load_state(untrained_weights(self.run, adapted.plan, adapted.deltas))
            return adapted
        adapted = None  # or the old model would be in memory next to the new one
        if not all(unused for _, unused, _ in held):
            self.forget()
        self.adapted, self.arm = adapt(self.run, plan, self.base(plan), fixed_steps=False), arm
        self.untouched = True
        self.start = copy_that_fits(self.run, self.adapted)
        return self.adapted

    def base(self, plan: Plan) -> torch.nn.Module:
        """Return the base model for a plan: the one that is loaded, unless it is to be sharded otherwise."""
        model = self.models.pop() if self.models else None
        if model is not None and (plan.parallel == "fsdp2" or slices_of(model) is None):
            return model
        del model  # it has no weights, which this plan wants
        return load_base(self.run, plan)

    def forget(self) -> None:
        """Free the model: the next one would be in memory at the same time."""
        self.models.clear()
        self.adapted = self.start = None
        self.untouched = False
        release()

    def saved(self, state: TrainState) -> frozenset[str]:
        """Return the groups of tensors in the last step's checkpoint: few or none if the disk is short."""
        group = self.run.process_group
        here = checkpoint.groups(self.last_step(state)) if group.is_main else frozenset[str]()
        return group.broadcast_object(here)

    def keep(self, result: TrialResult, state: TrainState, saved: frozenset[str]) -> TrialResult:
        """Keep the trial's best weights under a name of their own, without a checkpoint in main memory.

        If they don't fit there either, the trial has no loss.
        """
        if not saved:
            held = self.known.width == 1 and self.hold(result, state)
            return result if held else msgspec.structs.replace(result, loss=None, losses=[])
        if self.run.process_group.is_main:
            kept = {result.weights, *map(snapshot_name, result.snapshots)}
            checkpoint.link(self.last_step(state), trial_folder(self.run.folder, self.number), kept)
        return result

    def hold(self, result: TrialResult, state: TrainState) -> bool:
        """Hold a copy of the weights in main memory, if they are of the best trial or of a first refit.

        Return False, in all processes, if one has no room.
        """
        best, again = best_of(self.known.done), result.trial.refit
        is_best = best is None or (result.loss or 0.0) < (best.loss or 0.0)
        if result.loss is None or (len(self.unsaved) > 1 if again else not is_best):
            return True
        copy = copy_that_fits(self.run, state)
        if copy is not None:
            self.unsaved = {**(self.unsaved if again else {}), self.number: copy}
        return copy is not None

    def last_step(self, state: TrainState) -> Path:
        """Return where the checkpoint of the last step is, if there is one."""
        return self.saver.folder / f"step-{state.steps_before + state.step:08d}"

    def weights_of(self, result: TrialResult) -> Weights:
        """Return the best weights of a trial that was kept; sharded ones as they are on disk, mapped."""
        number = self.known.done.index(result)
        if number in self.unsaved:
            assert self.adapted is not None
            return as_held(self.unsaved[number], self.adapted.deltas.parameters)
        return kept_blocks(trial_folder(self.run.folder, number), result)()

    def prune(self, size: int) -> None:
        """Free the weights, of `size` bytes each, of all but the best trials."""
        done = self.known.done
        kept = staying(done, size, averaged_arms(self.run, self.known))
        for number, one in enumerate(done):
            if one not in kept and self.run.process_group.is_main:
                shutil.rmtree(trial_folder(self.run.folder, number), ignore_errors=True)

    def plan_again(self, arm: str, carried_out: Plan) -> None:
        """Let later trials need as little memory as this one came to need."""
        plan = self.known.plans[arm]
        if len(carried_out.deviations) > len(plan.deviations):  # memory ran out
            plans = {**self.known.plans, arm: smaller_by(plan, carried_out)}
            self.known = msgspec.structs.replace(self.known, plans=plans)


def rows_of(trial: Trial, record: RunRecord, data: JobData) -> tuple[RunRecord, JobData]:
    """Return the record and rows of a trial: some train on the development rows too, or on these alone."""
    if not trial.refit:
        return record, data
    train = data.dev if trial.last_pass else joined([data.train, data.dev], data.train.group)
    record = msgspec.structs.replace(record, train_examples=len(train), train_tokens=int(train.lengths.sum()))
    return record, msgspec.structs.replace(data, train=train)


def plan_of(trial: Trial, plan: Plan, record: RunRecord, longest: int) -> Plan:
    """Return the arm's plan with the trial's rate, length and batch."""
    mean_length = record.train_tokens / record.train_examples
    capacity, packs = step_size(trial.batch, mean_length, longest, plan.capacity, plan.devices)
    return msgspec.structs.replace(
        plan,
        lr_lora=plan.lr_lora * trial.rate,
        lr_dense=plan.lr_dense * trial.rate,
        lr_norms=plan.lr_norms * trial.rate,
        lr_embeddings=plan.lr_embeddings * trial.rate,
        noise=trial.noise,
        max_epochs=max(trial.epochs, 1.0) if trial.main else trial.epochs,  # new rows: the clock ends it
        capacity=capacity,
        packs_per_step=packs,
        pack_examples=pack_limit(trial.batch, mean_length, capacity, plan.devices),
        expected_steps=max(1, int(trial.epochs * record.train_examples / trial.batch)),
    )


def as_probe(plan: Plan) -> Plan:
    """Return the plan of a probe: a constant rate after a short ramp, and no development curve."""
    return msgspec.structs.replace(
        plan,
        decay="constant",
        warmup=min(0.5, RAMP_STEPS / plan.expected_steps),
        curve=msgspec.structs.replace(plan.curve, rows=0),
    )


def write_known(run: RunContext, known: SearchRecord) -> None:
    """Write down where the search stands."""
    if run.process_group.is_main:
        write_search(run.folder, known)


def clock_tokens(run: RunContext) -> int:
    """Return the token clock's tokens; 0 on another clock."""
    return run.own_clock.tokens if isinstance(run.own_clock, TokenClock) else 0
