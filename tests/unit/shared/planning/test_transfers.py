"""What an offer's model and submission need of the network is no time to train in."""

from __future__ import annotations

import pytest

from shared.messages.offers import TaskType
from shared.planning.feasibility import Feasibility, check_offer
from shared.planning.hardware import parse_hardware
from shared.planning.transfers import UPLOAD_SHARE, Transfers

H100 = parse_hardware("4xH100-80GB")
SMOLLM, LLAMA_70B = ("HuggingFaceTB/SmolLM2-135M", 134_515_008), ("org/llama-70b", 70_000_000_000)


def check(model: tuple[str, int], hours: float, transfers: Transfers) -> Feasibility:
    return check_offer(*model, TaskType.INSTRUCT, hours, H100, "maximum_accuracy", None, transfers)


def test_times() -> None:
    transfers = Transfers(100e6, 50e6)
    assert transfers.download_s(8_000_000_000) == 160.0
    assert transfers.upload_s(16_000_000_000) == 320.0
    assert Transfers().download_s(10**12) == Transfers().upload_s(10**12) == 0.0


def test_what_is_left_after_the_download_must_be_enough_for_some_steps() -> None:
    """8B at 4.46 MB/s: 3,587 of 3,600 s."""
    llama = ("org/llama-8b", 8_000_000_000)
    assert check(llama, 1.0, Transfers(100e6)).ok
    assert not check(llama, 1.0, Transfers(4.46e6)).ok


def test_an_offer_that_is_over_before_its_model_has_arrived_is_refused() -> None:
    assert check(LLAMA_70B, 1.0, Transfers()).ok
    slow = check(LLAMA_70B, 1.0, Transfers(30e6))
    assert not slow.ok
    assert "the model's download takes 4667 s" in slow.cause


def test_a_submission_is_as_large_as_what_the_plan_exports() -> None:
    found = check(SMOLLM, 1.0, Transfers())
    assert found.plan is not None
    assert 0 < found.submission_bytes <= 2 * 150_000_000
    assert not check(SMOLLM, 1.0, Transfers(None, found.submission_bytes / 3600)).ok


@pytest.mark.parametrize(
    ("profile", "task_type", "billions", "whole"),
    [
        ("auto", TaskType.INSTRUCT, 13, True),
        ("auto", TaskType.DPO, 13, False),  # scored relative to the model as it is
        ("auto", TaskType.INSTRUCT, 30, False),
        ("maximum_accuracy", TaskType.INSTRUCT, 13, False),
    ],
)
def test_where_frozen_weights_may_be_restored_a_whole_model_may_be_submitted(
    profile: str, task_type: TaskType, billions: int, *, whole: bool
) -> None:
    size, single = billions * 10**9, parse_hardware("1xH100-80GB")
    found = check_offer("org/model", size, task_type, 4.0, single, profile)
    assert found.plan is not None
    assert {module.method for module in found.plan.modules} == {"lora"}
    assert (found.submission_bytes > 1.9 * size) == whole


def test_an_upload_that_takes_more_time_than_the_node_keeps_for_it_is_refused() -> None:
    """8B in 16 bits at 10 MB/s: 1,606 s, where the node keeps 900 s."""
    llama = ("org/llama-8b", 8_000_000_000)
    slow = check(llama, 1.0, Transfers(None, 10e6))
    assert not slow.ok
    assert "the submission's upload takes 1606 s" in slow.cause
    assert "900 s" in slow.cause
    least = check(llama, 1.0, Transfers()).submission_bytes / (UPLOAD_SHARE * 3600)
    assert not check(llama, 1.0, Transfers(None, 0.99 * least)).ok
    assert check(llama, 1.0, Transfers(None, 1.01 * least)).ok


def test_the_upload_of_a_model_that_is_restored_is_that_of_all_its_weights() -> None:
    """26 GB at 5 MB/s take 5,200 s; factors alone would be up in a fraction of that."""
    single = parse_hardware("1xH100-80GB")
    of_13b = ("org/model", 13 * 10**9, TaskType.INSTRUCT, 4.0, single)
    slow = Transfers(None, 5e6)
    factors = check_offer(*of_13b, "maximum_accuracy", None, slow)
    whole = check_offer(*of_13b, "auto", None, slow)
    assert factors.ok
    assert not whole.ok
    assert "the submission's upload takes 5" in whole.cause
