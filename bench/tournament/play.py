"""Play upstream's validator for contest containers: run them, kill them, upload, load, score, judge.

    python -m bench tournament [--cases NAME ...] [--model tiny] [--minutes M] [--kills N] [--image TAG]
    python -m bench tournament --entries auto lora_r16 --cases instruct        # two entries, judged

Each case runs in a private folder with upstream's mounts: anonymous model names, rows and statistics at their
fixed paths. Without --image the runner is a process with a namespace of its own; with it, a Docker container
without network and capabilities. What is left after the end, or after a kill, must pass upstream's upload
rules and load with stock libraries; its loss on rows that it never saw is compared with the base model's, and
with the engine's own metric. With two --entries the verdict of each of upstream's rules is printed. With
--kills, further containers are killed in training, at random moments after the first tenth of their time, and
within exports and replacements; with --replacement-kills, a process that does nothing but replace. With
--faults, containers whose worker is killed, that have too little memory or disk, or whose data or model is
broken: each must end with status 0, a valid submission and a clear line in its log. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from bench.arena.judge import duel
from bench.tournament.container import Docker, Namespace, run
from bench.tournament.faults import FAULTS, Fault, spoilt
from bench.tournament.kills import AIMS, Aim, Kill, KilledAt, run_and_kill
from bench.tournament.memory_group import memory_group
from bench.tournament.mounts import Mounted, prepare
from bench.tournament.replacements import kill_replacements
from bench.tournament.scoring import Score, score
from bench.tournament.tasks import CASES, MODELS
from bench.tournament.uploader import upload
from trainer_node.contest.validity import objections

FIRST_SHARE = 0.1  # of the time, after which a kill must leave a valid submission
MOST_TRIES = 2  # containers for each kill that is asked for: one may end by itself before


class Played(Struct, frozen=True):
    """What one container left."""

    case: str
    entry: str
    status: int | None
    seconds: float
    first_s: float | None  # when the first submission was in place
    trained_s: float | None  # when the first trained one was
    objections: list[str]
    score: Score | None
    fault: str = ""
    killed: KilledAt | None = None


def play(
    runtime: Docker | Namespace,
    case: str,
    entry: str,
    options: argparse.Namespace,
    *,
    fault: str = "",
    kill: Kill | None = None,
) -> Played:
    """Run one container for its time, or until a kill; take what it leaves, score it."""
    seconds, killed = 60.0 * options.minutes, None
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="contest-"))
        mounted = prepare(Path(name), case, options.model, options.rows, options.minutes / 60.0)
        wanted = FAULTS.get(fault)
        stack.enter_context(spoilt(wanted, mounted))
        if wanted and wanted.memory:
            runtime = limited(runtime, wanted.memory, stack)
        if kill:
            ended, killed = run_and_kill(runtime, mounted, entry, seconds, kill)
        else:
            ended = run(runtime, mounted, entry, seconds, worker_ends=wanted.worker_ends if wanted else ())
        uploaded = Path(name) / "uploaded"
        wrong = [] if ended.uploads else [f"exit status {ended.status}"]
        wrong += objections(mounted.submission, mounted.model)
        if refused := upload(mounted.submission, uploaded, str(mounted.model)):
            wrong.append(refused)
        first, trained = first_times(mounted)
        if wanted:
            wrong += unmet(wanted, (mounted.root / "log").read_text(), trained)
        # Without a tokenizer upstream, which has the model's own, could score it; this machine can't.
        scorable = not wrong and fault != "no tokenizer"
        scored = score(mounted.model, uploaded, mounted.test, case) if scorable else None
        if wrong or options.verbose:
            print((mounted.root / "log").read_text()[-4000:])
        return Played(case, entry, ended.status, ended.seconds, first, trained, wrong, scored, fault, killed)


def limited(runtime: Docker | Namespace, memory: str, stack: ExitStack) -> Docker | Namespace:
    """Return a runtime whose containers have so little memory."""
    if isinstance(runtime, Docker):
        return replace(runtime, memory=memory)
    return Namespace(runtime.folder, stack.enter_context(memory_group(memory)))


def unmet(fault: Fault, log: str, trained_s: float | None) -> list[str]:
    """Return what a container under a fault lacks: a line in its log, or a trained submission."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log)
    wrong = [] if re.search(fault.says, text) else [f"the log has nothing like {fault.says!r}"]
    return wrong + (["nothing trained was submitted"] if fault.trains and trained_s is None else [])


def first_times(mounted: Mounted) -> tuple[float | None, float | None]:
    """Return the seconds until the first submission, and until the first trained one, from the log."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", (mounted.root / "log").read_text())
    found = re.findall(r"submission in place +(?=.*after_s=([\d.]+))(?=.*source=(\w+))", text)
    times = [float(seconds) for seconds, _ in found]
    trained = [float(seconds) for seconds, source in found if source != "untrained"]
    return min(times, default=None), min(trained, default=None)


def kills(runtime: Docker | Namespace, options: argparse.Namespace) -> list[Played]:
    """Kill so many containers, of every kind of task in turn; those that end by themselves aren't counted."""
    killed, aims = list[Played](), [aim for aim in AIMS if aim in options.aims]
    earliest_s = FIRST_SHARE * 60.0 * options.minutes
    for number in range(MOST_TRIES * options.kills):
        if len(killed) == options.kills:
            break
        # As many tasks as aims would give each kind of task the same aim.
        case = options.cases[(number + number // len(aims)) % len(options.cases)]
        seed = options.seed * 1_000_000 + number
        kill = Kill(aims[number % len(aims)], seed, earliest_s, options.kill_within)
        one = play(runtime, case, options.entries[0], options, kill=kill)
        show(one)
        killed += [one] if one.killed else []
    return killed


def verdicts(played: Sequence[Played]) -> list[dict[str, Any]]:
    """Return how the first entry does against the second, case by case and rule by rule."""
    found = []
    for one, other in zip(played[::2], played[1::2], strict=True):
        if one.score is None or other.score is None:
            valid = one if one.score else other if other.score else None
            found.append({"case": one.case, "winner": valid.entry if valid else None})
            continue
        judged = duel(np.array(one.score.per_row), np.array(other.score.per_row))
        found.append(
            {"case": one.case, "of": one.entry, "against": other.entry, **msgspec.to_builtins(judged)}
        )
    return found


def show(one: Played) -> None:
    """Print one line."""
    text = "; ".join(one.objections) or "valid"
    if found := one.score:
        text += f", loss {found.loss:.4f} (base {found.base_loss:.4f}, engine {found.engine_loss:.4f})"
    how = "killed" if one.status is None else f"status {one.status}"
    if found_at := one.killed:
        how += f" in {found_at.aim}, step {found_at.step}"
        how += ", exporting" * found_at.exporting + ", replacing" * found_at.replacing
    times = f"first {one.first_s} s, trained {one.trained_s} s"
    print(
        f"{one.fault or one.case:13} {one.entry:10} {how} after {one.seconds:.0f} s; {times}; {text}",
        flush=True,
    )


def summary(played: Sequence[Played], killed: Sequence[Played], seconds: float) -> dict[str, Any]:
    """Return the figures of the last line."""
    scores = [one.score for one in played if one.score]
    return {
        "containers": len(played),
        "valid": sum(not one.objections for one in played),
        "below_base": sum(one.loss < one.base_loss for one in scores),
        "worst_difference": max((abs(one.loss - one.engine_loss) for one in scores), default=None),
        "first_within_a_tenth": sum(
            one.first_s is not None and one.first_s <= FIRST_SHARE * seconds for one in played
        ),
        **kill_figures(killed),
    }


def kill_figures(killed: Sequence[Played]) -> dict[str, int]:
    """Return what was killed, and what it left."""
    moments = [one.killed for one in killed if one.killed]
    return {
        "kills": len(killed),
        "valid_after_kills": sum(not one.objections for one in killed),
        "training_when_killed": sum(moment.step > 0 for moment in moments),
        "exporting_when_killed": sum(moment.exporting for moment in moments),
        "replacing_when_killed": sum(moment.replacing for moment in moments),
        "trained_after_kills": sum(one.trained_s is not None for one in killed),
    }


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench tournament",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=2.0, help="of a task (default: %(default)s)")
    parser.add_argument("--entries", nargs="+", default=["auto"], help="profiles; two are judged")
    parser.add_argument("--kills", type=int, default=0, help="further containers, killed in training")
    parser.add_argument(
        "--aims", nargs="+", choices=list(Aim), default=list(Aim), help="what kills have to hit"
    )
    parser.add_argument(
        "--kill-within", type=float, default=math.inf, help="seconds after the first step (default: any)"
    )
    parser.add_argument("--kills-only", action="store_true", help="run none to its end")
    parser.add_argument(
        "--replacement-kills", type=int, default=200, help="of a process that replaces without a pause"
    )
    parser.add_argument(
        "--faults", nargs="*", choices=FAULTS, default=[], help="further containers with faults"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", help="run this Docker image")
    parser.add_argument("--code", type=Path, help="run this entry's code instead of the checkout's")
    parser.add_argument("--verbose", action="store_true", help="print each container's log")
    options = parser.parse_args()
    if len(options.entries) > 2:
        parser.error("--entries takes one or two")
    namespace = Namespace(options.code.absolute()) if options.code else Namespace()
    runtime = Docker(options.image) if options.image else namespace
    played = list[Played]()
    for case in [] if options.kills_only else options.cases:
        for entry in options.entries:
            played.append(play(runtime, case, entry, options))
            show(played[-1])
    killed = kills(runtime, options)
    faulty = list[Played]()
    for name in options.faults:
        faulty.append(play(runtime, "instruct", options.entries[0], options, fault=name))
        show(faulty[-1])
    figures = summary(played, killed, 60.0 * options.minutes)
    figures |= {"faults": len(faulty), "valid_after_faults": sum(not one.objections for one in faulty)}
    figures["replacements"] = msgspec.to_builtins(kill_replacements(options.replacement_kills, options.seed))
    if len(options.entries) == 2:
        figures["verdicts"] = verdicts(played)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
