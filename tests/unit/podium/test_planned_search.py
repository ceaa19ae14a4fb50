"""What is said of a search before anything is trained."""

import re

from msgspec.structs import replace

from podium.planned_search import TEXT, Scoring, probes_of, search_of
from shared.messages.hardware import Hardware
from shared.messages.offers import TaskType
from shared.planning.feasibility import ASSUMED_DATA
from shared.planning.model_shape import shape_from_params
from shared.planning.plan import DataStats
from shared.planning.planner import make_plan
from shared.planning.profiles import resolve

FEW = DataStats(examples=1000, tokens=300_000, label_tokens=150_000, max_length=1000)


def test_pairs_have_no_factors_and_their_short_trials_go_by_steps() -> None:
    hardware = Hardware(device="H100", count=1, memory_bytes=80 << 30)
    shape = shape_from_params(1_000_000_000, "llama")
    arms = [make_plan(resolve(name), shape, FEW, hardware, 3600.0) for name in ("auto", "lora_r32")]
    text, pairs = search_of(arms, FEW, TEXT), search_of(arms, FEW, Scoring(TaskType.DPO))
    assert "then at the rate that it asks for: three short runs at most" in text
    assert "then at a third of its rate, or three times it: three short runs at most" in pairs


def test_a_faster_method_has_time_for_more() -> None:
    """By LoRA's estimate one long run has more epochs than by that of dense deltas."""
    hardware = Hardware(device="H100", count=1, memory_bytes=80 << 30)
    shape = shape_from_params(1_000_000_000, "llama")
    own, lora = (
        make_plan(resolve(name), shape, ASSUMED_DATA, hardware, 900.0) for name in ("auto", "lora_r32")
    )
    slow = replace(lora, expected_tokens_per_s=own.expected_tokens_per_s)
    fast = replace(lora, expected_tokens_per_s=1.5 * own.expected_tokens_per_s)
    said = [search_of([own, arm], ASSUMED_DATA) for arm in (slow, fast)]
    by_slow, by_fast = (float(re.findall(r"([\d.]+) epochs", text)[0]) for text in said)
    assert by_slow < by_fast


def test_probes_of_weights_that_fit_no_device_are_one_run() -> None:
    recipe, hardware = resolve("winner_2026_06"), Hardware(device="H100", count=4, memory_bytes=80 << 30)
    sharded, whole = (
        make_plan(recipe, shape_from_params(count, "llama"), ASSUMED_DATA, hardware, 7200.0)
        for count in (8_000_000_000, 1_000_000_000)
    )
    assert (sharded.parallel, whole.parallel) == ("fsdp2", "ddp")
    alone = "One training run: with no method do the weights fit one device whole."
    assert probes_of([sharded], ASSUMED_DATA) == alone
    assert probes_of([sharded, sharded], ASSUMED_DATA) == alone
    assert probes_of([sharded, whole], ASSUMED_DATA) == probes_of([whole], ASSUMED_DATA)
    assert "Probes of about" in probes_of([whole], ASSUMED_DATA)
