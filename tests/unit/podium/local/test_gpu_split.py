from __future__ import annotations

import pytest

from podium.local.gpu_split import SlotShare, split
from shared.messages.hardware import GpuStatus
from shared.settings_sources import load_settings

GB = 2**30


def gpus(count: int, name: str = "NVIDIA H100 80GB HBM3") -> list[GpuStatus]:
    return [GpuStatus(index=i, name=name, memory_total=80 * GB, memory_used=0) for i in range(count)]


def test_eight_gpus_are_two_disjoint_halves() -> None:
    found = split(load_settings({}), gpus(8), expectation_set=False, cores=64)
    assert found.shares == [SlotShare("a", "0,1,2,3", 32), SlotShare("b", "4,5,6,7", 32)]
    assert found.expected_hardware == "4xH100-80GB"
    assert found.notes == []


def test_cpu_machine_is_expected_to_be_one_and_says_so() -> None:
    found = split(load_settings({}), [], expectation_set=False, cores=2)
    assert found.shares == [SlotShare("a", None, 1), SlotShare("b", None, 1)]
    assert found.expected_hardware == "cpu"
    assert len(found.notes) == 1


def test_operators_expectation_stands_even_where_no_gpu_is() -> None:
    found = split(load_settings({}), [], expectation_set=True, cores=2)
    assert found.expected_hardware == "4xH100-80GB"


@pytest.mark.parametrize(
    ("count", "each", "note"), [(7, "0,1,2", "1 of 7 GPUs stay idle"), (2, "0", "1xH100-80GB")]
)
def test_what_does_not_come_out_even_is_said(count: int, each: str, note: str) -> None:
    found = split(load_settings({}), gpus(count), expectation_set=False, cores=8)
    assert found.shares[0].gpus == each
    assert any(note in text for text in found.notes)


def test_fewer_gpus_than_slots_serve_fewer_slots() -> None:
    found = split(load_settings({}), gpus(1), expectation_set=False, cores=8)
    assert found.shares == [SlotShare("a", "0", 8)]
    assert "only a will run" in found.notes[0]


def test_gpu_indices_are_those_that_were_found() -> None:
    found = split(load_settings({}), gpus(8)[2:6], expectation_set=False, cores=8)
    assert [share.gpus for share in found.shares] == ["2,3", "4,5"]


def test_threads_setting_wins_over_the_share_of_cores() -> None:
    found = split(load_settings({}, threads=3), [], expectation_set=True, cores=64)
    assert {share.threads for share in found.shares} == {3}
