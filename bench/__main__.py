"""List the benches, or run one: `python -m bench [NAME [ARGUMENTS]]`."""

from __future__ import annotations

import difflib
import runpy
import sys

import msgspec


class Bench(msgspec.Struct, frozen=True):
    """One bench: its module below `bench`, its usual duration on two cores, and what it shows."""

    module: str
    minutes: float
    shows: str


BENCHES: dict[str, Bench] = {
    "scorer_parity": Bench("conformance.scorer_parity", 1, "the metric equals the upstream scorer's"),
    "contract": Bench("conformance.contract", 0.5, "validators are answered as their protocol says"),
    "compat": Bench("evaluator.compat", 10, "submissions load in the versions that upstream used"),
    "oracle_2026": Bench("evaluator.oracle_2026", 1, "the metric equals the trainers of contests"),
    "labels": Bench("evaluator.label_parity", 2, "tokens and labels equal the evaluator's own"),
    "fuzz": Bench("conformance.fuzz", 3, "no HTTP request gets a 5xx"),
    "permissions": Bench("conformance.permissions", 1, "each broker user can do only its own work"),
    "offers": Bench("conformance.offers", 1, "offers that can't be finished are refused"),
    "plans": Bench("conformance.plans", 1, "the plans of the profile; writes docs/plans.md"),
    "rows": Bench("rows.table", 0.2, "data files of every kind are read right or refused clearly"),
    "models": Bench("architectures.table", 15, "tiny models of every architecture, trained and reloaded"),
    "structure": Bench("conformance.structure", 0.1, "folders, circles, layers, long functions, words"),
    "deadline": Bench("deadline.runs", 45, "a submission is on disk at the deadline"),
    "deliveries": Bench(
        "reliability.deliveries", 30, "jobs of auto end in time and resume alike, under kills"
    ),
    "stage_costs": Bench("deadline.stage_costs", 6, "seconds of each stage of a real run"),
    "upstream_sim": Bench("fake_validator.simulator", 1, "make or play a trace of upstream's offers"),
    "gateway_load": Bench("performance.gateway_load", 3, "offers per second against FastAPI"),
    "gateway_latency": Bench("performance.gateway_latency", 1, "milliseconds from offer to answer"),
    "overhead": Bench("performance.overhead", 3, "seconds from an accepted job to its first step"),
    "throughput": Bench("performance.throughput", 10, "tokens per second against TRL"),
    "dense_vs_lora": Bench("performance.dense_vs_lora", 30, "dense deltas against LoRA of the same freedom"),
    "memory": Bench("performance.memory", 8, "the planner's estimate against traced peaks of memory"),
    "host_memory": Bench(
        "performance.host_memory", 2, "main memory of 8 processes that load and export a model once"
    ),
    "gpu": Bench("gpu.suite", 9, "the engine on real GPUs; --dry: on a CPU, 2 minutes"),
    "arena": Bench("arena.arena", 90, "which profile ends lowest on real rows at equal tokens"),
    "planner_regret": Bench("regret.planner_regret", 80, "loss of the planner's choice over a grid's best"),
    "ablations": Bench("ablations.ablations", 60, "what each choice of a training run is worth"),
    "two_or_four": Bench(
        "slots.two_or_four", 20, "the same jobs on two halves of a box and on four quarters"
    ),
    "step_costs": Bench("regret.step_costs", 3, "what a step and a score cost on this machine"),
    "arena_data": Bench("arena.data_table", 1, "data sets of the accuracy arena: sizes and licences"),
    "arena_models": Bench("arena.models", 25, "pre-train the arena's base models on the CPU"),
    "tournament": Bench("tournament.play", 15, "contest containers leave valid submissions, also killed"),
    "chaos": Bench("reliability.chaos", 50, "no job is lost or submitted twice; --ci: 2 minutes"),
    "faults": Bench("reliability.fault_matrix", 30, "each row of the fault matrix, repeated"),
    "resume": Bench("reliability.resume", 8, "a killed run ends bit-equal to an undisturbed one"),
    "recovery": Bench("reliability.recovery", 5, "seconds until a killed process works again"),
    "compose": Bench("reliability.compose", 10, "the containers survive kills and restarts"),
    "starts": Bench("reliability.gateway_restarts", 1, "a restarted gateway refuses no connection"),
    "soak": Bench("reliability.soak", 6, "a day of upstream in minutes, with kills"),
    "slow_clients": Bench("performance.slow_clients", 2, "slow and stuck clients delay no offer"),
    "burst": Bench("reliability.burst", 1, "thousands of offers at once, as many accepted as slots"),
}


def listing() -> str:
    """Return one line for each bench: name, minutes, what it shows."""
    lines = [f"  {name:16} {one.minutes:5g} min  {one.shows}" for name, one in BENCHES.items()]
    return "\n".join(["python -m bench NAME [ARGUMENTS]; NAME --help shows the arguments.", "", *lines])


def main(arguments: list[str]) -> int:
    """Run the named bench in this process; 2 if there is no such bench."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return 0
    name = arguments[0]
    if name not in BENCHES:
        near = difflib.get_close_matches(name, BENCHES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(f"There is no bench {name!r}.{hint} `python -m bench` lists all of them.", file=sys.stderr)
        return 2
    module = f"bench.{BENCHES[name].module}"
    sys.argv = [name, *arguments[1:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
