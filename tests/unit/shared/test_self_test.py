"""What the answers of a self-test's processes mean."""

from __future__ import annotations

from pathlib import Path

from shared.messages.hardware import Hardware
from shared.self_test import (
    CheckResult,
    ProcessReport,
    SelfTestRequest,
    faults_in,
    read_reports,
    read_request,
    warnings_in,
    write_report,
    write_request,
)


def result(name: str, what: str = "", *, ok: bool = True, warns: bool = False) -> CheckResult:
    return CheckResult(name=name, ok=ok, warns=warns, what=what, seconds=1.0)


GOOD = ProcessReport(results=[result("driver"), result("kernels")])
BAD = ProcessReport(results=[result("driver"), result("kernels", "off by 3", ok=False)])
HANGS = ProcessReport(results=[result("driver")], running="all_reduce")


def test_nothing_is_wrong() -> None:
    assert faults_in([GOOD, GOOD], "") == []


def test_a_fault_is_named_once_with_its_processes() -> None:
    assert faults_in([GOOD, BAD, GOOD, BAD], "") == ["kernels: off by 3 (process 1, 3)"]
    assert faults_in([BAD], "") == ["kernels: off by 3"]


def test_a_warning_is_no_fault_and_names_its_processes() -> None:
    slow = ProcessReport(results=[result("driver"), result("kernels", "slower", warns=True)])
    assert faults_in([slow], "") == []
    assert warnings_in([slow]) == ["kernels: slower"]
    assert warnings_in([GOOD, slow, None, slow]) == ["kernels: slower (process 1, 3)"]


def test_a_check_that_never_ended_is_a_fault() -> None:
    late = "no answer within 180 s"
    assert faults_in([HANGS, HANGS], late) == [f"all_reduce: {late} (process 0, 1)"]
    assert faults_in([GOOD, HANGS], "") == ["all_reduce: the test ended inside it (process 1)"]


def test_a_process_without_an_answer_is_a_fault() -> None:
    assert faults_in([None], "exit code 1") == ["the test did not start: exit code 1"]
    assert faults_in([None, GOOD], "") == ["the test did not start: no answer (process 0)"]


def test_an_end_in_another_manner_is_a_fault_of_its_own() -> None:
    assert faults_in([GOOD], "exit code 139") == ["exit code 139"]


def test_a_request_removes_earlier_answers(tmp_path: Path) -> None:
    request = SelfTestRequest(hardware=Hardware(device="cpu", count=1, memory_bytes=1), processes=2)
    folder = tmp_path / "new"
    write_request(folder, request)
    write_report(folder, 1, BAD)
    assert read_reports(folder, 2) == [None, BAD]
    (folder / "rank-0.json").write_bytes(b'{"running": "\xff"}')
    assert read_reports(folder, 2) == [None, BAD]
    write_request(folder, request)
    assert read_reports(folder, 2) == [None, None]
    assert read_request(folder) == request
