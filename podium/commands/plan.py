"""`podium plan`: show what a run would do on given hardware, and every deviation from its profile."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from podium.arguments import examples, hours
from podium.console import make_console
from podium.own_hardware import AUTO, hardware_of
from podium.own_hardware import HELP as HARDWARE_HELP
from podium.planned_search import TEXT, Scoring, probes_of, search_of
from shared.errors import PlanError, PodiumError
from shared.messages.encoding import decode
from shared.messages.hardware import Hardware
from shared.messages.offers import TaskType
from shared.planning.architectures import is_held_whole
from shared.planning.feasibility import ASSUMED_DATA, ASSUMED_PAIRS
from shared.planning.hardware import usable_memory
from shared.planning.model_shape import ModelShape, shape_from_config, shape_from_params
from shared.planning.plan import SUPPORTED_TASKS, DataStats, Plan
from shared.planning.planner import make_plan
from shared.planning.profiles import DEFAULT_PROFILE, PROFILES, family_of, resolve
from shared.planning.recipe import Recipe

_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kmb]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan` to the command line."""
    parser = subparsers.add_parser(
        "plan",
        help="show what a run would do, and why",
        description=__doc__,
        epilog=examples(
            "podium plan --params 8B --hours 4",
            "podium plan --model-config config.json --hardware 4xH100-80GB --hours 30m",
            "podium plan --params 8B --hardware cpu-16x64GB --hours 2 --json --data-stats "
            """'{"examples": 5000, "tokens": 900000, "label_tokens": 400000, "max_length": 900}'""",
            f"podium plan --params 1B --hours 1 --task-type {TaskType.DPO}",
        ),
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model-config", type=Path, metavar="FILE", help="the model's config.json, or its folder"
    )
    model.add_argument(
        "--params", type=_parameter_count, metavar="N", help="parameter count, such as 135M or 8B"
    )
    parser.add_argument("--hardware", default=AUTO, help=HARDWARE_HELP)
    parser.add_argument(
        "--hours",
        type=hours,
        required=True,
        metavar="TIME",
        help="until the result must be on disk: hours, or 30m, 90s",
    )
    parser.add_argument(
        "--data-stats", metavar="JSON", help="examples, tokens, label_tokens, max_length; or a file"
    )
    types = [str(kind) for kind in TaskType if kind in SUPPORTED_TASKS]
    parser.add_argument(
        "--task-type", choices=types, default=str(TaskType.INSTRUCT), help="default: %(default)s"
    )
    parser.add_argument(
        "--kl-coef",
        type=float,
        default=0.0,
        metavar="NUMBER",
        help="weight of the divergence from the base model in the score (default: 0)",
    )
    parser.add_argument(
        "--profile",
        default=DEFAULT_PROFILE,
        help=f"one of {', '.join(sorted(PROFILES))} (default: %(default)s)",
    )
    parser.add_argument("--family", default="", help="model name or type; sets the learning rate")
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; exit code 1 if nothing fits or an argument is invalid."""
    try:
        hardware = hardware_of(args.hardware)
        scoring = _scoring(args)
        stats = _data_stats(args.data_stats, scoring)
        shape = _shape(args)
        recipe, draw = resolve(args.profile), partial(_plan, shape, stats, hardware, scoring, args)
        plan = draw(recipe)
        arms = [plan] * recipe.searches
        for name in recipe.arms:
            with suppress(PlanError):  # this one doesn't fit
                arms.append(draw(resolve(name)))
    except PodiumError as error:
        print(f"podium plan: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(msgspec.json.encode(plan).decode())
    else:
        show(plan, shape, stats, hardware, make_console(), arms, scoring)
    return 0


def _scoring(args: argparse.Namespace) -> Scoring:
    """Return how the job is scored. Raises PlanError."""
    pairs = args.task_type == TaskType.DPO
    if not 0.0 <= args.kl_coef < math.inf:
        raise PlanError(f"--kl-coef must be a number from 0 on, got {args.kl_coef}")
    if pairs and args.kl_coef:
        raise PlanError("--kl-coef is for instruct and chat tasks: preference pairs have no divergence")
    return Scoring(TaskType(args.task_type), args.kl_coef > 0.0)


def _plan(
    shape: ModelShape,
    stats: DataStats,
    hardware: Hardware,
    scoring: Scoring,
    args: argparse.Namespace,
    recipe: Recipe,
) -> Plan:
    return make_plan(
        recipe,
        shape,
        stats,
        hardware,
        args.hours * 3600,
        family=args.family,
        task_type=scoring.task_type,
        divergence=scoring.divergence,
    )


def show(
    plan: Plan,
    shape: ModelShape,
    stats: DataStats,
    hardware: Hardware,
    console: Console,
    arms: Sequence[Plan] = (),
    scoring: Scoring = TEXT,
) -> None:
    """Print a plan, what a search would try among `arms`, and the deviations."""
    console.print(
        f"[bold]{plan.profile}[/bold] on {hardware.name}: {shape.parameters / 1e9:.2f} B parameters, ", end=""
    )
    rows = "preference pairs" if scoring.pairs else "rows"
    scored = ", scored with a divergence from the base model" * scoring.divergence
    console.print(f"{stats.examples} {rows} of {stats.tokens / stats.examples:.0f} tokens{scored}")
    facts = Table(show_header=False, box=None)
    for name, value in facts_of(plan, hardware):
        facts.add_row(name, value)
    console.print(facts)
    if arms:
        console.print("\n[bold]Search[/bold]")
        search = probes_of if resolve(plan.profile).probes else search_of
        console.print(search(arms, stats, scoring), markup=False)
    console.print("\n[bold]Deviations from the profile[/bold]")
    for deviation in plan.deviations:
        console.print(f"- {deviation.what}: {deviation.wanted} -> {deviation.got}", markup=False)
        console.print(Padding(Text(deviation.reason), (0, 0, 0, 4)))


def facts_of(plan: Plan, hardware: Hardware) -> list[tuple[str, str]]:
    """Return the plan's numbers as pairs of label and text."""
    dense = [module.name for module in plan.modules if module.method == "dense"]
    lora = [f"{module.name} r{module.rank}" for module in plan.modules if module.method == "lora"]
    rates = [f"dense {plan.lr_dense:.2e}"] * bool(dense) + [f"LoRA {plan.lr_lora:.2e}"] * bool(lora)
    rates += [f"norms {plan.lr_norms:.2e}"] * plan.extras.norms
    rates += [f"embeddings {plan.lr_embeddings:.2e}"] * plan.extras.embeddings
    switches = [
        f"checkpointing {'on' if plan.activation_checkpointing else 'off'}",
        f"compile {'on' if plan.compile else 'off'}",
    ]
    used, usable = plan.memory_bytes / 2**30, usable_memory(hardware) / 2**30
    methods = [f"dense: {', '.join(dense)}"] * bool(dense) + [f"LoRA: {', '.join(lora)}"] * bool(lora)
    methods += ["norms"] * plan.extras.norms + ["embeddings and output matrix"] * plan.extras.embeddings
    return [
        ("trained", f"{plan.trained_parameters / 1e6:.1f} M weights; {'; '.join(methods)}"),
        ("learning rate", ", ".join(rates)),
        (
            "step",
            f"{plan.packs_per_step} packs of {plan.capacity} tokens; rows up to {plan.max_length} tokens",
        ),
        ("layout", f"{plan.parallel} on {plan.devices} device(s), {plan.dtype}, {', '.join(switches)}"),
        ("memory", f"{used:.1f} of {usable:.1f} GiB usable per device"),
        ("speed", f"{plan.expected_tokens_per_s:,.0f} tokens/s, about {plan.expected_steps} steps"),
        ("reserve", f"{plan.reserve_s:.0f} s to select a candidate, export and verify"),
    ]


def _shape(args: argparse.Namespace) -> ModelShape:
    if args.params is not None:
        return shape_from_params(args.params, family_of(args.family))
    path = args.model_config / "config.json" if args.model_config.is_dir() else args.model_config
    try:
        config = decode(path.read_bytes(), Any)
    except (OSError, ValueError) as error:
        raise PlanError(f"can't read the model's config {path}: {error}") from error
    if not isinstance(config, dict):
        raise PlanError(f"the model's config {path} is not a JSON object")
    return replace(shape_from_config(config), whole=is_held_whole(config))


def _data_stats(text: str | None, scoring: Scoring) -> DataStats:
    if text is None:
        return ASSUMED_PAIRS if scoring.pairs else ASSUMED_DATA
    try:
        raw = text.encode() if text.lstrip().startswith("{") else Path(text).read_bytes()
        return decode(raw, DataStats)
    except (OSError, ValueError) as error:
        raise PlanError(f"can't read the data statistics: {error}") from error


def _parameter_count(text: str) -> int:
    match = _COUNT.fullmatch(text)
    count = round(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if not 0 < count <= 10**13:
        raise argparse.ArgumentTypeError(f"{text!r} is not a parameter count such as 135M or 8B")
    return count
