"""Simulate upstream's offers: write a trace to a file, or play it against a real gateway in fast time.

    python -m bench upstream_sim --trace offers.jsonl --hours 24 [--date july] [--seed 0]
    python -m bench upstream_sim --play offers.jsonl --url http://127.0.0.1:7999 --miner SS58 \
        --dataset URL [--hour-seconds 10]     # an hour of the trace takes 10 s

The statistics are those of upstream's code of a date (bench/fake_validator/trace.py): mix of types, hours by
rows, the scheduler's loop and its cap, customers' offers by chance, gaps before a start; with offers that
are never started, that come again, that come five at a time, with bad signatures and stale nonces. A line
of a trace is `{"at": seconds, "kind": ..., "offer": {...}, "start_after_s": seconds or null, "fault":
null or what is wrong, ...}`; the same seed gives the same trace. While playing, hours stay as they are in
the messages: only the clock between them runs faster. The keys are made from `--validator`, a text; its
address is printed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from bench.fake_validator.player import Played, Player
from bench.fake_validator.trace import DATES, HOUR_S, Event, World, generate
from bench.fake_validator.validator import keys_from_seed


def write_trace(path: Path, events: list[Event]) -> None:
    """Write one JSON line for each event."""
    path.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))


def read_trace(path: Path) -> list[Event]:
    """Read a trace from its file."""
    return [msgspec.json.decode(line, type=Event) for line in path.read_bytes().splitlines()]


def summary(events: list[Event], hours: float) -> dict[str, Any]:
    """Return the figures of a trace."""
    good = [event for event in events if event.fault is None and event.attempt == 1]
    text = [event.offer["hours_to_complete"] for event in good if event.image_model is None]
    return {
        "offers": len(events),
        "tasks_per_day": round(len(good) / hours * 24, 1),
        "kinds": dict(Counter(event.kind for event in good)),
        "mean_text_hours": round(sum(text) / max(1, len(text)), 2),
        "organic": sum(event.organic for event in good),
        "again": sum(event.attempt > 1 for event in events),
        "faults": dict(Counter(event.fault for event in events if event.fault)),
        "never_started": sum(event.start_after_s is None for event in good),
    }


def outcome(played: list[Played]) -> dict[str, Any]:
    """Return the figures of a played trace."""
    decided = [one for one in played if one.offered.status == 200]
    taken = [one for one in played if one.accepted]
    started = [one for one in taken if one.started is not None]
    return {
        "offers": len(played),
        "decided": len(decided),
        "accepted": len(taken),
        "statuses": {str(status): n for status, n in Counter(one.offered.status for one in played).items()},
        "started": sum(one.started is not None and one.started.status == 200 for one in started),
        "submissions": sum(one.submission is not None and one.submission.status == 200 for one in started),
        "faults_accepted": sum(one.accepted and one.event.fault is not None for one in played),
        "reasons": dict(
            Counter(
                str(one.offered.body.get("message", "")).partition(" - ")[0][:60] for one in decided
            ).most_common(12)
        ),
    }


def main() -> int:
    """Make a trace, or play one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, help="write a trace to this file")
    parser.add_argument("--play", type=Path, help="play the trace in this file")
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--date", choices=sorted(DATES), default="july", help="whose constants")
    parser.add_argument("--rows", choices=("log", "equal"), default="log", help="prior of the rows")
    parser.add_argument("--models", choices=("published", "log"), default="published", help="prior of sizes")
    parser.add_argument("--url", default="http://127.0.0.1:7999", help="the gateway that is offered to")
    parser.add_argument("--miner", default="", help="its ss58 address; without it nothing is signed")
    parser.add_argument("--validator", default="validator", help="text that the validator's keys are made of")
    parser.add_argument("--dataset", default="https://example.org/train.json", help="data that a start names")
    parser.add_argument("--hour-seconds", type=float, default=10.0, help="real seconds of a simulated hour")
    args = parser.parse_args()
    if args.play:
        return play(args)
    if not args.trace:
        parser.error("say --trace FILE or --play FILE")
    world = World(constants=DATES[args.date], rows=args.rows, models=args.models)
    events = generate(world, args.hours, args.seed)
    write_trace(args.trace, events)
    print(json.dumps(summary(events, args.hours)))
    return 0


def play(args: argparse.Namespace) -> int:
    """Play a trace at a gateway that runs already."""
    keys = keys_from_seed(args.validator) if args.miner else None
    if keys:
        print(f"the validator is {keys.address}: it must be one of the gateway's PODIUM_UPSTREAM_VALIDATORS")
    player = Player(
        [args.url], keys, args.miner, scale=args.hour_seconds / HOUR_S, dataset=lambda event: args.dataset
    )
    played = asyncio.run(player.play(read_trace(args.play)))
    figures = outcome(played)
    print(json.dumps(figures))
    return 1 if figures["faults_accepted"] else 0


if __name__ == "__main__":
    sys.exit(main())
