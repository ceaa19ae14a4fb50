"""Draw the offers that one miner receives, with upstream's own statistics. Pure: one seed, one trace.

Upstream's scheduler runs every five minutes and adds a task while fewer than its cap are trained or
evaluated; customers' tasks arrive at random in between. Upstream's constants of a date determine which tasks
this miner is offered, their types and their hours. Properties that upstream doesn't publish (rows, models)
have a selectable prior. Times are simulated seconds.
"""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Iterator
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from bench.fake_validator import requests

TICK_S, HOUR_S, DAY_S = 300.0, 3600.0, 86400.0
WARM_UP_S = 3 * DAY_S  # an empty validator adds a task at every tick; that is over then
ORGANIC_PER_DAY = 9.0
MEAN_START_S, LONGEST_START_S = 60.0, 900.0
NEVER_STARTED, UNKNOWN_PARAMETERS = 0.02, 0.02
AGAIN, MOST_AGAIN, AGAIN_AFTER_S = 0.15, 6, 900.0  # organic tasks that nobody took
BURSTS_PER_DAY, BURST = 2.0, 5  # tasks that are offered at once
FAULTS = ("bad signature", "stale nonce")
FAULTY = 0.01  # of each kind, in addition to the offers
ORGANIC_HOURS = (1, 2, 3, 4, 5, 6, 7)
LEAST_ROWS, MOST_ROWS = 1_000, 500_000

Bins = tuple[tuple[int, int, int], ...]  # rows below, least hours, most hours


class Constants(Struct, frozen=True, kw_only=True):
    """Upstream's numbers of one date."""

    mix: dict[str, float]
    hours: Bins
    cap: int  # synthetic tasks in training or evaluation
    text_pool: tuple[int, int] = (8, 15)  # acceptances that are wanted
    image_pool: tuple[int, int] = (15, 25)
    big: float = 0.05  # share of models above 12 billion


JULY = Constants(
    mix={
        requests.INSTRUCT: 0.175,
        requests.CHAT: 0.175,
        requests.IMAGE: 0.25,
        requests.DPO: 0.15,
        requests.GRPO: 0.25,
    },
    hours=((10_000, 1, 3), (25_000, 3, 6), (50_000, 4, 8), (100_000, 5, 9), (500_000, 7, 10)),
    cap=12,
)
OCTOBER = Constants(
    mix={
        requests.INSTRUCT: 0.20,
        requests.CHAT: 0.20,
        requests.IMAGE: 0.20,
        requests.DPO: 0.15,
        requests.GRPO: 0.25,
    },
    hours=((10_000, 1, 3), (25_000, 2, 4), (50_000, 3, 5), (100_000, 3, 6), (500_000, 4, 6)),
    cap=10,
)
DATES = {"july": JULY, "october": OCTOBER}
IMAGE_HOURS = (1, 2)
EQUAL_BINS = ((20_000, 50_000), (50_000, 100_000), (100_000, 500_000))
PUBLISHED_SIZES = ((0.37, 0.1, 1.0), (0.29, 1.0, 7.0), (0.32, 7.0, 12.0), (0.02, 12.0, 71.0))
IMAGE_MODELS = (
    "stabilityai/stable-diffusion-xl-base-1.0",
    "black-forest-labs/FLUX.1-dev",
    "John6666/nova-xl",
)
FAMILIES = (
    "unsloth/Llama-3",
    "Qwen/Qwen2.5",
    "mistralai/Mistral",
    "google/gemma-2",
    "microsoft/phi-2",
    "HuggingFaceTB/SmolLM2",
    "EleutherAI/pythia",
    "NousResearch/Hermes",
)


class World(Struct, frozen=True, kw_only=True):
    """Assumptions about the rest of the network."""

    constants: Constants = JULY
    rows: str = "log"  # log-uniform over all, or "equal" bins above 20,000
    models: str = "published"  # or "log": log-uniform
    evaluation_h: float = 0.5  # how long a task waits for its evaluation
    nodes: int = 60  # miners that upstream can offer a task to
    acceptance: float = 0.3  # share of those asked that accept
    faulty: bool = True  # whether bad signatures, repeats and bursts come along


class Event(Struct, frozen=True, kw_only=True):
    """One offer at one moment."""

    at: float
    kind: str
    offer: dict[str, Any]
    start_after_s: float | None  # None: upstream never starts it
    organic: bool = False
    attempt: int = 1  # above 1: the same task, offered again because no miner accepted it
    fault: str | None = None  # what is wrong with the request; its offer must not be decided
    rows: int | None = None  # known to upstream, not sent
    image_model: str | None = None  # flux or sdxl, sent with the start


class Task(Struct, frozen=True):
    """A task of upstream, before it is offered to anyone."""

    at: float
    kind: str
    hours: float
    rows: int | None
    organic: bool


def draw_rows(world: World, chance: random.Random) -> int:
    """Rows of the primary data set; upstream takes from a thousand to half a million."""
    low, high = (LEAST_ROWS, MOST_ROWS) if world.rows == "log" else chance.choice(EQUAL_BINS)
    return min(MOST_ROWS - 1, int(math.exp(chance.uniform(math.log(low), math.log(high)))))


def draw_hours(constants: Constants, rows: int, chance: random.Random) -> int:
    """Whole hours, of the bin that the rows fall into; the model's size plays no part."""
    for below, least, most in constants.hours:
        if rows < below:
            return chance.randint(least, most)
    raise ValueError(f"upstream makes no task of {rows} rows")


def draw_parameters(world: World, chance: random.Random) -> int:
    """Parameters of a text model."""
    if world.models == "published":
        sizes = chance.choices(PUBLISHED_SIZES, [share for share, _, _ in PUBLISHED_SIZES])[0]
        low, high = sizes[1:]
    else:
        low, high = (12.0, 71.0) if chance.random() < world.constants.big else (0.1, 12.0)
    return int(math.exp(chance.uniform(math.log(low), math.log(high))) * 1e9)


def draw_kind(constants: Constants, chance: random.Random) -> str:
    """Draw a kind of task by the date's mix."""
    return chance.choices(list(constants.mix), list(constants.mix.values()))[0]


def scheduled(world: World, until_s: float, chance: random.Random) -> Iterator[Task]:
    """Yield the synthetic tasks: one at a tick, while fewer than the cap are under way."""
    ends: list[float] = []
    now = 0.0
    while now < until_s:
        ends = [end for end in ends if end > now]
        if len(ends) < world.constants.cap:
            kind = draw_kind(world.constants, chance)
            rows = None if kind == requests.IMAGE else draw_rows(world, chance)
            hours = (
                chance.randint(*IMAGE_HOURS) if rows is None else draw_hours(world.constants, rows, chance)
            )
            ends.append(now + (hours + world.evaluation_h) * HOUR_S)
            yield Task(now, kind, hours, rows, organic=False)
        now += TICK_S


def customers(world: World, until_s: float, chance: random.Random) -> Iterator[Task]:
    """Yield the organic tasks: by chance, of any length that the customer pays."""
    now = 0.0
    while (now := now + chance.expovariate(ORGANIC_PER_DAY / DAY_S)) < until_s:
        kind = draw_kind(world.constants, chance)
        hours = chance.choice(IMAGE_HOURS if kind == requests.IMAGE else ORGANIC_HOURS)
        yield Task(now, kind, hours, None, organic=True)


def asked(world: World, kind: str, chance: random.Random) -> bool:
    """Return whether upstream offers the task to this miner before enough others have accepted."""
    pool = world.constants.image_pool if kind == requests.IMAGE else world.constants.text_pool
    return chance.random() < chance.randint(*pool) / world.acceptance / world.nodes


def event_of(world: World, task: Task, chance: random.Random) -> Event:
    """Return the offer of a task, and when it would be started."""
    task_id = str(uuid.UUID(int=chance.getrandbits(128), version=4))
    image = task.kind == requests.IMAGE
    parameters = None if image else draw_parameters(world, chance)
    model = chance.choice(IMAGE_MODELS) if image else ""
    if parameters is not None:
        unknown = chance.random() < UNKNOWN_PARAMETERS
        size = "" if unknown else f"-{parameters / 1e9:.3g}B"
        model, parameters = chance.choice(FAMILIES) + size, None if unknown else parameters
    fields = {"model": model, "model_params_count": parameters, "hours_to_complete": task.hours}
    if image:
        fields["ds_size"] = chance.randint(10, 50)
    after = min(chance.expovariate(1 / MEAN_START_S), LONGEST_START_S)
    return Event(
        at=task.at,
        kind=task.kind,
        offer=requests.offer(task.kind, task_id, **fields),
        start_after_s=None if chance.random() < NEVER_STARTED else after,
        organic=task.organic,
        rows=task.rows,
        image_model=chance.choice(("flux", "sdxl")) if image else None,
    )


def offered_again(event: Event, chance: random.Random) -> Iterator[Event]:
    """Yield the same task, at least a quarter of an hour later each time, as long as nobody takes it."""
    at = event.at
    for attempt in range(2, 2 + MOST_AGAIN):
        if chance.random() >= AGAIN:
            return
        at += AGAIN_AFTER_S + chance.expovariate(1 / MEAN_START_S)
        yield replace(event, at=at, attempt=attempt)


def clustered(events: list[Event], days: float, chance: random.Random) -> list[Event]:
    """Return some offers and the four after each, within a second: five tasks are offered together."""
    events = list(events)
    for _ in range(round(BURSTS_PER_DAY * days)):
        if len(events) <= BURST:
            break
        first = chance.randrange(len(events) - BURST)
        for place in range(first + 1, first + BURST):
            events[place] = replace(events[place], at=events[first].at + chance.random())
    return sorted(events, key=lambda event: event.at)


def faulty(event: Event, fault: str, chance: random.Random) -> Event:
    """Return an offer of a task of its own with a wrong signature."""
    task_id = str(uuid.UUID(int=chance.getrandbits(128), version=4))
    return replace(event, offer=event.offer | {"task_id": task_id}, start_after_s=None, fault=fault)


def generate(world: World, hours: float, seed: int) -> list[Event]:
    """Return all offers of so many hours of a validator that has been running for days, in order."""
    chance = random.Random(seed)
    until_s = WARM_UP_S + hours * HOUR_S
    tasks = [*scheduled(world, until_s, chance), *customers(world, until_s, chance)]
    events = [
        event_of(world, replace(task, at=task.at - WARM_UP_S), chance)
        for task in sorted(tasks, key=lambda task: task.at)
        if task.at >= WARM_UP_S and asked(world, task.kind, chance)
    ]
    if world.faulty:
        events = clustered(events, hours * HOUR_S / DAY_S, chance)
        events += [again for event in events if event.organic for again in offered_again(event, chance)]
        events += [
            faulty(event, fault, chance) for event in events for fault in FAULTS if chance.random() < FAULTY
        ]
    return sorted((event for event in events if event.at < hours * HOUR_S), key=lambda event: event.at)


def tasks_per_day(world: World, days: float, seed: int) -> tuple[float, float, float]:
    """Synthetic tasks per day of the scheduler's loop alone, their mean hours, and those of text tasks."""
    chance = random.Random(seed)
    tasks = [task for task in scheduled(world, WARM_UP_S + days * DAY_S, chance) if task.at >= WARM_UP_S]
    text = [task.hours for task in tasks if task.kind != requests.IMAGE]
    return len(tasks) / days, sum(task.hours for task in tasks) / len(tasks), sum(text) / len(text)
