"""Recipe + model shape + hardware + data + deadline -> plan, with every deviation and its reason.

Pure and instant, without torch: the gateway asks the same function about an offer as the engine about a job.
"""

from __future__ import annotations

from functools import lru_cache
from math import isfinite

from msgspec import Struct
from msgspec.structs import replace

from shared.errors import PlanError, SettingsError
from shared.fit import Fit, fit, round_up
from shared.messages import Hardware, TaskType
from shared.planning.deviations import Deviation, deviations
from shared.planning.memory_fit import Layout
from shared.planning.model_shape import (
    ModelShape,
    ModulePlan,
    is_mixture,
    parameters_from_name,
    shape_from_config,
    shape_from_params,
)
from shared.planning.profiles import Recipe, dense_rate, family_of, lora_rate, pair_share, resolve
from shared.planning.throughput import DISK_BYTES_PER_S, FILL, MIN_STEPS, Pace, Rows, export_bytes, pace

__all__ = [
    "DataStats",
    "Deviation",
    "Feasibility",
    "ModelShape",
    "ModulePlan",
    "Plan",
    "Step",
    "check_offer",
    "make_plan",
    "shape_from_config",
    "shape_from_params",
]

SUPPORTED_TASKS = frozenset({TaskType.INSTRUCT, TaskType.CHAT, TaskType.DPO})
MIN_BATCH = 8  # examples
MIN_OFFER_STEPS = 3  # an offer states no data, and real rows may be ten times shorter than the assumed ones
ASSUMED_PARAMETERS = 7_000_000_000
MOST_PARAMETERS = 10**13
LONGEST_HOURS = 24 * 366  # what no job takes; beyond it the arithmetic overflows in the end


class DataStats(Struct, frozen=True, kw_only=True):
    """What the planner must know of the tokenised training rows; a preference pair is one row."""

    examples: int
    tokens: int
    label_tokens: int
    max_length: int  # longest row, tokens


ASSUMED_DATA = DataStats(examples=20_000, tokens=6_000_000, label_tokens=3_000_000, max_length=1024)
ASSUMED_PAIRS = DataStats(examples=20_000, tokens=12_000_000, label_tokens=6_000_000, max_length=2048)


class Plan(Struct, frozen=True, kw_only=True):
    """Everything the engine does in one run, resolved to numbers."""

    profile: str
    modules: list[ModulePlan]
    dropout: float  # before LoRA's factors; dense deltas have none
    lr_lora: float
    lr_dense: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.03  # share of the training budget
    max_length: int  # longer rows are dropped, as the scorer drops them
    capacity: int  # tokens of one pack; every pack is padded to it
    packs_per_step: int  # packs of one optimiser step, over all devices and accumulation steps
    max_epochs: float
    dtype: str  # "bfloat16" or "float32": what matrix products run in
    parallel: str  # "single", "ddp" or "fsdp2"
    devices: int
    activation_checkpointing: bool
    compile: bool
    eval_batch: int
    expected_tokens_per_s: float
    expected_steps: int
    reserve_s: float  # kept for choose, export, verify before `ready_by`
    memory_bytes: int  # estimated peak on one device
    deviations: list[Deviation] = []
    dev_examples: int = (
        1000  # development rows that one evaluation can afford; the engine takes the first so many
    )
    ddp_bucket_mb: int = 200


class Step(Struct, frozen=True):
    """The size of one optimiser step, and how many there will be."""

    batch: int  # examples asked for, after halving
    capacity: int
    packs: int
    examples: float  # mean examples that the packs hold
    steps: int
    wanted_steps: int  # how many there would be at the recipe's batch


class Feasibility(Struct, frozen=True):
    """Whether an offer can be won here, by what it states; `cause` says why or why not in one sentence."""

    ok: bool
    cause: str
    plan: Plan | None = None


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
) -> Plan:
    """Make the recipe fit; the same arguments always give the same plan.

    `budget_s` is all the time until the outcome must be on disk. `tokens_per_s`, once measured, replaces the
    estimate. `family` (a model's name or type) overrides the shape's. `bf16`: the device computes in it.
    Preference pairs need no second model in memory, as what the reference says is computed beforehand; but
    both documents of a pair must fit one pack, and their learning rate and number of epochs are lower.
    Raises PlanError if no rung of the memory ladder fits, or if not one step would be done in time.
    """
    if stats.examples < 1 or stats.tokens < 1:
        raise PlanError("there are no rows to train on")
    pairs = task_type is TaskType.DPO
    max_length = min(recipe.max_length, scored_length)
    task = _Task(
        recipe=recipe,
        shape=replace(shape, family=family_of(family)) if family else shape,
        rows=Rows(stats.examples, stats.tokens / stats.examples, stats.label_tokens / stats.tokens, pairs),
        longest=min(stats.max_length, 2 * max_length if pairs else max_length),
        hardware=hardware,
        budget_s=budget_s,
        dtype="bfloat16" if recipe.bf16 and bf16 else "float32",
        measured=tokens_per_s,
    )
    found, speed, step = _attempt(task, recipe.device_batch * task.rows.mean_length)
    if step.capacity < found.layout.capacity:  # smaller packs need less memory: a higher rung may fit
        found, speed, step = _attempt(task, step.capacity)
    if step.steps < 1:
        raise PlanError(
            f"not one step fits: of {budget_s:.0f} s {speed.train_s:.0f} s are left to train at "
            f"{speed.tokens_per_s:.0f} tokens/s, and a step has {step.packs * step.capacity} tokens"
        )
    plan = _assemble(task, found, speed, step, max_length)
    return replace(plan, deviations=deviations(recipe, plan, step, hardware, task.shape.family, pairs=pairs))


class _Task(Struct, frozen=True, kw_only=True):
    recipe: Recipe
    shape: ModelShape
    rows: Rows
    longest: int  # the longest row that is kept
    hardware: Hardware
    budget_s: float
    dtype: str
    measured: float | None


def _attempt(task: _Task, most: float) -> tuple[Fit, Pace, Step]:
    """Fit packs of at most `most` tokens into memory, then steps into time."""
    found = fit(task.recipe, task.shape, task.hardware, task.dtype, task.longest, most)
    speed = pace(
        task.shape,
        found.modules,
        found.layout,
        task.rows,
        task.hardware,
        task.budget_s,
        compiles=task.recipe.compile,
        measured=task.measured,
    )
    return found, speed, _step(task, found.layout, speed)


def _step(task: _Task, layout: Layout, speed: Pace) -> Step:
    """Halve the batch until MIN_STEPS steps fit, or MIN_BATCH examples are reached."""
    rows, devices = task.rows, layout.devices
    wanted = batch = task.recipe.device_batch * task.recipe.accumulation * devices
    seen = epoch_limit(rows.count, pairs=rows.pairs) * rows.count * rows.mean_length
    tokens = min(speed.train_s * speed.tokens_per_s, seen)
    while True:
        share = batch * rows.mean_length / devices  # tokens of one device
        capacity = max(round_up(task.longest), min(layout.capacity, round_up(share)))
        packs = devices * max(1, round(share / (FILL * capacity)))
        examples = min(packs * capacity * FILL / rows.mean_length, float(rows.count))
        steps = int(tokens / (examples * rows.mean_length))
        if steps >= MIN_STEPS or batch <= MIN_BATCH:
            return Step(batch, capacity, packs, examples, steps, int(tokens / (wanted * rows.mean_length)))
        batch = max(MIN_BATCH, batch // 2)


def epoch_limit(examples: int, *, pairs: bool = False) -> float:
    """How often the rows are seen at most: held-out loss rises after that, on preference pairs soon."""
    if pairs:
        return 2.0 if examples < 10_000 else 1.0
    return 4.0 if examples < 10_000 else 3.0 if examples <= 100_000 else 2.0


def _assemble(task: _Task, found: Fit, speed: Pace, step: Step, max_length: int) -> Plan:
    recipe, family, hidden, pairs = task.recipe, task.shape.family, task.shape.hidden, task.rows.pairs
    share = pair_share(step.steps) if pairs else 1.0
    alphas = [module.alpha for module in found.modules if module.method == "lora"]
    return Plan(
        profile=recipe.profile,
        modules=found.modules,
        dropout=recipe.dropout,
        lr_lora=share * lora_rate(family, hidden, alphas[0] if alphas else recipe.alpha),
        lr_dense=share * dense_rate(family, hidden),
        max_length=max_length,
        capacity=step.capacity,
        packs_per_step=step.packs,
        max_epochs=epoch_limit(task.rows.count, pairs=pairs),
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
    )


@lru_cache(maxsize=1024)
def check_offer(
    model: str,
    model_params: int | None,
    task_type: TaskType,
    hours: float,
    hardware: Hardware,
    profile: str = "maximum_accuracy",
) -> Feasibility:
    """Whether a slot with `hardware` can win an offer, by what the offer states. Never raises; cached.

    The data is assumed: 20,000 rows of 300 tokens, or pairs of twice as many. A size that neither the offer
    nor the model's name states is taken as 7 billion parameters, and the cause says so.
    """
    if task_type not in SUPPORTED_TASKS:
        return Feasibility(False, f"task type {task_type} is not supported by the engine")
    if not (isfinite(hours) and hours > 0):
        return Feasibility(False, f"{hours} hours are no time to train in")
    if is_mixture(model):
        return Feasibility(False, f"{model} is a mixture of experts, which the engine does not support")
    named = model_params or parameters_from_name(model)
    parameters = named or ASSUMED_PARAMETERS
    if not 0 < parameters <= MOST_PARAMETERS:
        return Feasibility(False, f"no model has {parameters} parameters")
    size = f"{parameters / 1e9:.3g} billion parameters"
    if not model_params:
        size += (
            " by its name" if named else " assumed, as neither the offer nor the model's name states a size"
        )
    try:
        shape = shape_from_params(parameters, family_of(model))
        data = ASSUMED_PAIRS if task_type is TaskType.DPO else ASSUMED_DATA
        budget_s = min(hours, LONGEST_HOURS) * 3600
        plan = make_plan(resolve(profile), shape, data, hardware, budget_s, task_type=task_type)
    except (PlanError, SettingsError) as error:
        return Feasibility(False, f"{error} ({size})")
    if plan.expected_steps < MIN_OFFER_STEPS:
        cause = f"{hours:g} hours leave only {plan.expected_steps} steps on {hardware.name} ({size})"
        return Feasibility(False, cause)
    moving_s = (2 * shape.parameters + export_bytes(shape, plan.modules)) / DISK_BYTES_PER_S
    if moving_s > budget_s:
        cause = f"reading the model and writing the result take {moving_s:.0f} s, there are {budget_s:.0f} s"
        return Feasibility(False, f"{cause} ({size})")
    cause = f"fits {hardware.name} and leaves about {plan.expected_steps} steps ({size})"
    return Feasibility(True, cause, plan)
