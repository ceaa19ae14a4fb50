"""Decide whether a slot can win an offer, from the offer's own statements."""

from __future__ import annotations

from functools import lru_cache
from math import isfinite

from msgspec import Struct
from msgspec.structs import replace

from shared.errors import PlanError, SettingsError
from shared.messages.hardware import Hardware
from shared.messages.offers import TaskType
from shared.planning.architectures import Batching, ModelFacts, facts_from_name
from shared.planning.model_name import parameters_from_name
from shared.planning.model_shape import ModelShape, shape_from_params
from shared.planning.plan import SUPPORTED_TASKS, DataStats, Plan
from shared.planning.planner import make_plan
from shared.planning.profiles import DEFAULT_PROFILE, family_of, resolve
from shared.planning.throughput import export_bytes, is_submitted_whole, moving_s
from shared.planning.transfers import HERE, UPLOAD_SHARE, Transfers

MIN_OFFER_STEPS = 3  # an offer states no data, and real rows may be ten times shorter than the assumed ones
ASSUMED_PARAMETERS = 7_000_000_000
BY_NAME = " by its name"
ASSUMED = " assumed, as neither the offer nor the model's name states a size"
MOST_PARAMETERS = 10**13
LONGEST_HOURS = 24 * 366  # no job takes this long; far beyond it the arithmetic overflows
ASSUMED_DATA = DataStats(examples=20_000, tokens=6_000_000, label_tokens=3_000_000, max_length=1024)
ASSUMED_PAIRS = DataStats(examples=20_000, tokens=12_000_000, label_tokens=6_000_000, max_length=2048)


class Feasibility(Struct, frozen=True):
    """Whether an offer can be won here, by its own statements; `cause` is the reason in one sentence."""

    ok: bool
    cause: str
    plan: Plan | None = None
    submission_bytes: int = 0  # about, and at most: of what the plan exports


@lru_cache(maxsize=1024)
def check_offer(
    model: str,
    model_params: int | None,
    task_type: TaskType,
    hours: float,
    hardware: Hardware,
    profile: str = DEFAULT_PROFILE,
    known: ModelFacts | None = None,
    transfers: Transfers = HERE,
) -> Feasibility:
    """Return whether a slot with `hardware` can win an offer, by what the offer states. Never raises; cached.

    `known` is what the model's config says, if there is a copy of it; else its name has to do.
    The data is assumed: 20,000 rows of 300 tokens, or pairs of twice as many. A size that neither the offer
    nor the model's name states is taken as 7 billion parameters, and the cause states it. What `transfers`
    take is no time to train in.
    """
    if task_type not in SUPPORTED_TASKS:
        return Feasibility(False, f"task type {task_type} is not supported by the engine")
    if not (isfinite(hours) and hours > 0):
        return Feasibility(False, f"{hours} hours are no time to train in")
    facts = known or facts_from_name(model)
    if facts.refusal:
        return Feasibility(False, f"{model[:100]} can't be trained: {facts.refusal}")
    named = model_params or facts.parameters or parameters_from_name(model)
    parameters = named or ASSUMED_PARAMETERS
    if not 0 < parameters <= MOST_PARAMETERS:
        return Feasibility(False, f"no model has {parameters} parameters")
    size = _size(parameters, _source(model_params, facts, named))
    try:
        why_whole = _whole_only(model, facts)
        shape = _shape(model, parameters, facts)
        data = ASSUMED_PAIRS if task_type is TaskType.DPO else ASSUMED_DATA
        whole_s = min(hours, LONGEST_HOURS) * 3600
        recipe, down_s = resolve(profile), transfers.download_s(parameters)
        plan = make_plan(recipe, shape, data, hardware, whole_s, task_type=task_type)
        restores = recipe.repairs and task_type is not TaskType.DPO and is_submitted_whole(shape.parameters)
        kept_s = UPLOAD_SHARE * whole_s
        up_s = transfers.upload_s(export_bytes(shape, plan.modules, whole=restores))
        budget_s = whole_s - down_s - min(up_s, kept_s)  # as the node plans
        if budget_s <= 0:
            what = f"the model's download takes {down_s:.0f} s and the submission's upload {up_s:.0f} s"
            return Feasibility(False, f"{what}, there are {whole_s:.0f} s ({size})")
        if budget_s < whole_s:
            plan = make_plan(recipe, shape, data, hardware, budget_s, task_type=task_type)
    except (PlanError, SettingsError) as error:
        return Feasibility(False, f"{error} ({size})")
    if plan.parallel == "fsdp2" and why_whole:
        return Feasibility(False, f"{why_whole}, which no device here has room for ({size})")
    if why := _too_short(plan, shape, budget_s, f"{hours:g} hours", hardware):
        return Feasibility(False, f"{why} ({size})")
    submission_bytes = export_bytes(shape, plan.modules, whole=restores)
    if (up_s := transfers.upload_s(submission_bytes)) > kept_s:
        what = f"the submission's upload takes {up_s:.0f} s, and at most {kept_s:.0f} s are kept for it"
        return Feasibility(False, f"{what} ({size})")
    cause = f"fits {hardware.name} and leaves about {plan.expected_steps} steps ({size})"
    return Feasibility(True, cause, plan, submission_bytes)


def _too_short(plan: Plan, shape: ModelShape, budget_s: float, hours: str, hardware: Hardware) -> str | None:
    """Return why the time is too short for a few steps, or for moving the weights; None if it isn't."""
    if plan.expected_steps < MIN_OFFER_STEPS:
        return f"{hours} leave only {plan.expected_steps} steps on {hardware.name}"
    if (needed_s := moving_s(shape, plan.modules)) > budget_s:
        return f"reading the model and writing the result take {needed_s:.0f} s, there are {budget_s:.0f} s"
    return None


def _source(stated: int | None, facts: ModelFacts, named: int | None) -> str:
    if stated:
        return ""
    return " by its config" if facts.parameters else BY_NAME if named else ASSUMED


def _size(parameters: int, source: str) -> str:
    return f"{parameters / 1e9:.3g} billion parameters{source}"


def _shape(model: str, parameters: int, facts: ModelFacts) -> ModelShape:
    """Return a typical shape; of a mixture only the attention is trained, as experts are not linear."""
    shape = replace(shape_from_params(parameters, family_of(model)), whole=facts.whole)
    if not facts.experts:
        return shape
    return replace(shape, own_linears=shape.linears[:4], own_parameters=shape.parameters)


def _whole_only(model: str, facts: ModelFacts) -> str | None:
    """Return why a model is not cut over several devices; None if it is."""
    if facts.batching is Batching.PADDED:
        return f"documents of {model[:100]} can't share a row, so that each device must hold it whole"
    if facts.experts:
        return f"{model[:100]} is a mixture of experts, which each device must hold whole"
    return None
