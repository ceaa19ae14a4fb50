"""Recipe + model shape + hardware + data + deadline -> plan, with every deviation and its reason.

Pure and instant, without torch: the gateway asks the same function about an offer as the engine about a job.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from shared.errors import PlanError
from shared.messages.hardware import Hardware
from shared.messages.offers import TaskType
from shared.planning.deviations import deviations
from shared.planning.hardware import device_count, is_cpu, usable_memory
from shared.planning.memory_fit import Fit, Layout, fit, with_extras
from shared.planning.model_shape import ModelShape, ModulePlan
from shared.planning.plan import DataStats, Plan, Step
from shared.planning.profiles import dense_rate, family_of, lora_rate, pair_share
from shared.planning.recipe import Recipe
from shared.planning.step_size import step_size
from shared.planning.throughput import FILL, MIN_STEPS, Measured, Pace, Rows, moving_s, pace

MIN_BATCH = 8  # examples
LEAST_BATCH_SHARE = 0.8  # of the batch that is wanted: above it is the same batch, rounded to packs


def make_plan(
    recipe: Recipe,
    shape: ModelShape,
    stats: DataStats,
    hardware: Hardware,
    budget_s: float,
    *,
    scored_length: int = 4096,
    tokens_per_s: float | None = None,
    family: str = "",
    bf16: bool = True,
    task_type: TaskType = TaskType.INSTRUCT,
    divergence: bool = False,
    closing: Measured | None = None,
) -> Plan:
    """Make the recipe fit; the same arguments always give the same plan.

    `budget_s` is all the time until the outcome must be on disk. `tokens_per_s`, once measured with layers
    that aren't compiled, replaces the estimate, and so does `closing`. `family` (a model's name or type)
    overrides the shape's. `bf16`: the device computes in it. `divergence`: a distance from the base model is
    scored, which is computed with the output matrix as it was.
    Preference pairs need no second model in memory, as the reference's outputs are computed beforehand; but
    both documents of a pair must fit one pack, and their learning rate and number of epochs are lower.
    Raises PlanError if no rung of the memory ladder fits, or if not one step would be done in time.
    """
    if stats.examples < 1 or stats.tokens < 1:
        raise PlanError("there are no rows to train on")
    pairs = task_type is TaskType.DPO
    recipe = recipe.sized(shape.parameters, device_count(hardware), pairs=pairs)
    max_length = min(recipe.max_length, scored_length)
    task = _Task(
        recipe=recipe,
        shape=replace(shape, family=family_of(family)) if family else shape,
        rows=Rows(
            stats.examples,
            stats.tokens / stats.examples,
            stats.label_tokens / stats.tokens,
            pairs,
            divergence,
        ),
        longest=min(stats.max_length, 2 * max_length if pairs else max_length),
        hardware=hardware,
        budget_s=budget_s,
        dtype="bfloat16" if recipe.bf16 and bf16 else "float32",
        measured=tokens_per_s,
        closing=closing,
    )
    found, speed, step = _best_attempt(task)
    plan = _assemble(task, found, speed, step, max_length)
    return replace(plan, deviations=deviations(recipe, plan, step, hardware, task.shape, task.rows))


class _Task(Struct, frozen=True, kw_only=True):
    recipe: Recipe
    shape: ModelShape
    rows: Rows
    longest: int  # the longest row that is kept
    hardware: Hardware
    budget_s: float
    dtype: str
    measured: float | None
    closing: Measured | None


def _best_attempt(task: _Task) -> tuple[Fit, Pace, Step]:
    """Return the best fit; raise PlanError if not one step would be done in time."""
    found, speed, step = _attempt(task, task.recipe.device_batch * task.rows.mean_length)
    if step.capacity < found.layout.capacity:  # smaller packs need less memory: a higher rung may fit
        found, speed, step = _attempt(task, step.capacity)
    if step.steps < 1:
        raise PlanError(
            f"not one step fits: of {task.budget_s:.0f} s {speed.train_s:.0f} s are left to train at "
            f"{speed.tokens_per_s:.0f} tokens/s, and a step has {step.packs * step.capacity} tokens"
        )
    return found, speed, step


def _attempt(task: _Task, most: float) -> tuple[Fit, Pace, Step]:
    """Fit packs of at most `most` tokens into memory, then steps into time."""

    def is_moved(modules: Sequence[ModulePlan]) -> bool:
        return moving_s(task.shape, modules) <= task.budget_s

    found = fit(task.recipe, task.shape, task.hardware, task.dtype, task.longest, most, is_moved)
    if task.recipe.rate is not None or not task.rows.pairs:  # for pairs their own rates aren't known
        found = _with_extras(task, found)
    speed = _pace(task, found)
    return found, speed, _step(task, found.layout, speed)


def _with_extras(task: _Task, found: Fit) -> Fit:
    """Add norms and embeddings; on a CPU embeddings only with time for the epochs that the recipe wants."""
    recipe, limit, head = task.recipe, usable_memory(task.hardware), not task.rows.divergence
    if recipe.embedding_epochs and is_cpu(task.hardware):
        frozen = with_extras(found, replace(recipe, embedding_rate=0.0), task.shape, limit, head=head)
        speed = _pace(task, frozen)
        if task.rows.epochs(speed.train_s * speed.tokens_per_s) < recipe.embedding_epochs:
            return frozen
    return with_extras(found, recipe, task.shape, limit, head=head)


def _pace(task: _Task, found: Fit) -> Pace:
    dropout = task.recipe.dropout if any(one.method == "lora" for one in found.modules) else 0.0
    return pace(
        task.shape,
        found.modules,
        found.layout,
        task.rows,
        task.hardware,
        task.budget_s,
        compiles=task.recipe.compile,
        dropout=dropout,
        extras=found.extras,
        measured=task.measured,
        closing=task.closing,
    )


def _step(task: _Task, layout: Layout, speed: Pace) -> Step:
    """Halve the batch until enough steps fit, or MIN_BATCH examples are reached."""
    rows, devices = task.rows, layout.devices
    wanted = batch = batch_of(task.recipe, devices)
    seen = _epochs(task) * rows.count * rows.mean_length
    tokens = min(speed.train_s * speed.tokens_per_s, seen)
    most = task.recipe.most_steps or math.inf
    while True:
        capacity, packs = step_size(batch, rows.mean_length, task.longest, layout.capacity, devices)
        examples = min(packs * capacity * FILL / rows.mean_length, float(rows.count))
        steps = int(min(most, tokens / (examples * rows.mean_length)))
        if steps >= min(MIN_STEPS, most) or batch <= MIN_BATCH:
            return Step(batch, capacity, packs, examples, steps, int(tokens / (wanted * rows.mean_length)))
        batch = max(MIN_BATCH, batch // 2)


def batch_of(recipe: Recipe, devices: int) -> int:
    """Examples of one optimiser step, as the recipe wants it."""
    return recipe.device_batch * recipe.accumulation * devices


def _epochs(task: _Task) -> float:
    return task.recipe.epochs or epoch_limit(task.rows.count, pairs=task.rows.pairs)


def epoch_limit(examples: int, *, pairs: bool = False) -> float:
    """Return the most epochs: held-out loss rises after that, on preference pairs soon."""
    if pairs:
        return 2.0 if examples < 10_000 else 1.0
    return 4.0 if examples < 10_000 else 3.0 if examples <= 100_000 else 2.0


def _assemble(task: _Task, found: Fit, speed: Pace, step: Step, max_length: int) -> Plan:
    recipe, family, hidden, pairs = task.recipe, task.shape.family, task.shape.hidden, task.rows.pairs
    share = pair_share(step.steps) if pairs else 1.0
    alphas = [module.alpha for module in found.modules if module.method == "lora"]
    given, batch_share = recipe.rate, step.examples / batch_of(recipe, found.layout.devices)
    if given and recipe.rate_by_batch and batch_share < LEAST_BATCH_SHARE:
        given *= math.sqrt(batch_share)
    lr_dense = given or share * dense_rate(family, hidden)
    warmup = min(1.0, recipe.warmup_steps / step.steps) if recipe.warmup_steps else recipe.warmup
    return Plan(
        profile=recipe.profile,
        modules=found.modules,
        dropout=recipe.dropout,
        lr_lora=given or share * lora_rate(family, hidden, alphas[0] if alphas else recipe.alpha),
        lr_dense=lr_dense,
        lr_norms=recipe.norm_rate * lr_dense if found.extras.norms else 0.0,
        lr_embeddings=(given or recipe.embedding_rate) if found.extras.embeddings else 0.0,
        extras=found.extras,
        betas=recipe.betas,
        max_length=max_length,
        capacity=step.capacity,
        packs_per_step=step.packs,
        decay=recipe.decay,
        rate_floor=recipe.rate_floor,
        curve=recipe.curve,
        warmup=warmup,
        max_epochs=_epochs(task),
        most_steps=recipe.most_steps,
        dtype=found.layout.dtype,
        parallel=found.layout.parallel,
        devices=found.layout.devices,
        activation_checkpointing=found.layout.checkpointing,
        compile=speed.compile,
        eval_batch=recipe.eval_batch,
        expected_tokens_per_s=speed.tokens_per_s,
        expected_steps=step.steps,
        reserve_s=speed.reserve_s,
        memory_bytes=found.memory.total,
        dev_examples=speed.dev_examples,
        ddp_bucket_mb=recipe.ddp_bucket_mb,
        train_s=speed.train_s,
    )
