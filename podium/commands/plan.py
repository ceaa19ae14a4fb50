"""`podium plan`: show what a run would do on given hardware, and every deviation from its profile."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

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
from shared.errors import PlanError, PodiumError
from shared.messages.hardware import Hardware
from shared.planning.feasibility import ASSUMED_DATA
from shared.planning.hardware import usable_memory
from shared.planning.model_shape import ModelShape, shape_from_config, shape_from_params
from shared.planning.plan import DataStats, Plan
from shared.planning.planner import make_plan
from shared.planning.profiles import DEFAULT_PROFILE, PROFILES, family_of, resolve
from shared.planning.step_size import full_batch
from shared.planning.throughput import development_rows
from trainer_node.engine.search.strategy.budget import Budget, Speed, is_ample, is_averaged, is_low_rank
from trainer_node.engine.search.strategy.first_trial import arm_name, first_trial, trial_of
from trainer_node.engine.search.strategy.neighbours import LEAST_EPOCHS, START_EPOCHS
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.strategy.population import is_population, on_one_device
from trainer_node.engine.search.strategy.prior import is_tiny
from trainer_node.engine.search.strategy.probes import PROBE_TRIALS
from trainer_node.engine.search.strategy.short_trials import MOST_UNSEEN, SHORT_TRIALS
from trainer_node.engine.search.trial import TrialResult
from trainer_node.engine.search.winner import rate_search

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
        stats = _data_stats(args.data_stats)
        shape = _shape(args)
        recipe, budget_s = resolve(args.profile), args.hours * 3600
        plan = make_plan(recipe, shape, stats, hardware, budget_s, family=args.family)
        arms = [plan] * recipe.searches
        for name in recipe.arms:
            with suppress(PlanError):  # this one doesn't fit
                arms.append(make_plan(resolve(name), shape, stats, hardware, budget_s, family=args.family))
    except PodiumError as error:
        print(f"podium plan: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(msgspec.json.encode(plan).decode())
    else:
        show(plan, shape, stats, hardware, make_console(), arms)
    return 0


def show(
    plan: Plan,
    shape: ModelShape,
    stats: DataStats,
    hardware: Hardware,
    console: Console,
    arms: Sequence[Plan] = (),
) -> None:
    """Print a plan, what a search would try among `arms`, and the deviations."""
    console.print(
        f"[bold]{plan.profile}[/bold] on {hardware.name}: {shape.parameters / 1e9:.2f} B parameters, ", end=""
    )
    console.print(f"{stats.examples} rows of {stats.tokens / stats.examples:.0f} tokens")
    facts = Table(show_header=False, box=None)
    for name, value in facts_of(plan, hardware):
        facts.add_row(name, value)
    console.print(facts)
    if arms:
        console.print("\n[bold]Search[/bold]")
        search = probes_of if resolve(plan.profile).probes else search_of
        console.print(search(arms, stats), markup=False)
    console.print("\n[bold]Deviations from the profile[/bold]")
    for deviation in plan.deviations:
        console.print(f"- {deviation.what}: {deviation.wanted} -> {deviation.got}", markup=False)
        console.print(Padding(Text(deviation.reason), (0, 0, 0, 4)))


def search_of(arms: Sequence[Plan], stats: DataStats) -> str:
    """Return what a search would try first, and how often; `arms` has the job's own plan first."""
    plan, methods = arms[0], ", or ".join(map(arm_name, arms))
    single = frozenset(arm_name(arm) for arm in arms if not is_averaged(arm))
    low = [arm for arm in arms if is_low_rank(arm)]
    lora = frozenset(map(arm_name, low))
    ample = frozenset(arm_name(arm) for arm in low if is_ample(arm, plan, stats.label_tokens))
    mean_length = stats.tokens / stats.examples
    others = {arm_name(arm): Speed(arm.expected_tokens_per_s) for arm in arms[1:]}
    budget = replace(_budget(plan, stats), single=single, lora=lora, ample=ample, others=others)
    start = [trial_of(arm_name(arm), arm, mean_length) for arm in arms]
    slower = {arm_name(arm): Speed(on_one_device(arm).expected_tokens_per_s) for arm in arms[1:]}
    alone = replace(_budget(on_one_device(plan), stats), width=plan.devices)
    alone = replace(alone, single=single, lora=lora, ample=ample, others=slower)
    sides = all(arm.parallel != "fsdp2" for arm in arms) and is_population(start, alone)
    first = first_trial(start, alone if sides else budget)
    runs = plan.train_s / budget.cost_s(first)
    if first.main:
        after = ", then one pass over the development rows" if first.leaves_s else ""
        return f"One training run ({first.arm}, {first.epochs:.1f} epochs){after}: no time to compare."
    again = "is run again on all rows, and submitted." if budget.refits(first, 1) else "is submitted."
    if first.short:
        most = START_EPOCHS[1]
        then = f"First: {first}; then at the rate that it asks for: three short runs at most."
        if not budget.refits(first, 1) and (runs - SHORT_TRIALS) * first.epochs <= MOST_UNSEEN:
            return f"{then} One long run takes the rest of the time."
        return (
            f"{then} Then whole runs by {methods}: there "
            f"is time for about {runs * first.epochs / most:.0f} runs of {most:g} epochs. "
            f"The best one on the development rows {again}"
        )
    if first.epochs < LEAST_EPOCHS:
        probes = f"Up to {PROBE_TRIALS} short runs of {first.epochs:.2f} epochs compare rates"
        return f"{probes}; one long run takes the rest of the time."
    left = replace(budget, left_s=budget.left_s - budget.cost_s(first))
    done = TrialResult(trial=first, loss=1.0, tokens=0, train_s=0.0)
    if not sides and (after_it := next_trial(start, [done], left)) and after_it.refit:
        return f"First: {first}. It is run again on all rows, and that run is submitted: no time to compare."
    return (
        f"First: {first}. Then its neighbours in rate, epochs and batch, by {methods}: there is time for "
        f"about {runs:.0f} runs of this length. The best one on the development rows {again}"
    )


def probes_of(arms: Sequence[Plan], stats: DataStats) -> str:
    """Return how a search by probes would begin, and what comes after them."""
    if all(arm.parallel == "fsdp2" for arm in arms):
        return "One training run: with no method do the weights fit one device whole."
    plan = next(arm for arm in arms if arm.parallel != "fsdp2")
    start = rate_search.trial_of(arm_name(plan), plan, stats.tokens / stats.examples)
    first = rate_search.next_trial(start, [], _budget(plan, stats))
    if first is None or first.main:
        return "One training run at the plan's rate: there is no time to compare rates."
    steps = first.epochs * stats.examples / first.batch
    return (
        f"Probes of about {steps:.0f} steps at constant rates take at most a fifth of the time. One run "
        "takes the rest, at the highest rate whose probe is hardly worse than the best one. The rate that "
        "they begin with comes from the size of the weights, once the model is loaded."
    )


def _budget(plan: Plan, stats: DataStats) -> Budget:
    """Return what a search may cost, by the plan's estimates."""
    return Budget(
        left_s=plan.train_s,
        tokens_per_s=plan.expected_tokens_per_s,
        epoch_tokens=stats.tokens,
        examples=stats.examples,
        trial_s=0.0,
        all_s=plan.train_s,
        all_rows=1.0 + development_rows(stats.examples) / stats.examples,
        least_batch=full_batch(
            plan.devices, min(stats.max_length, plan.max_length), stats.tokens / stats.examples
        ),
        devices=plan.devices,
        tiny=is_tiny(plan),
    )


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
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f"can't read the model's config {path}: {error}") from error
    if not isinstance(config, dict):
        raise PlanError(f"the model's config {path} is not a JSON object")
    return shape_from_config(config)


def _data_stats(text: str | None) -> DataStats:
    if text is None:
        return ASSUMED_DATA
    try:
        raw = text if text.lstrip().startswith("{") else Path(text).read_text()
        return msgspec.json.decode(raw, type=DataStats)
    except (OSError, ValueError) as error:
        raise PlanError(f"can't read the data statistics: {error}") from error


def _parameter_count(text: str) -> int:
    match = _COUNT.fullmatch(text)
    count = round(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if not 0 < count <= 10**13:
        raise argparse.ArgumentTypeError(f"{text!r} is not a parameter count such as 135M or 8B")
    return count
