"""The self-test of a slot: the same code on a CPU, with gloo between its processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.messages.hardware import Hardware
from shared.self_test import SelfTestRequest, faults_in, read_reports, warnings_in, write_request
from tests.engine.worker_run import ENVIRONMENT
from trainer_node.engine import self_test
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from trainer_node.engine.model import attention
from trainer_node.engine.model.compile import missing_compiler

CPU = Hardware(device="cpu", count=2, memory_bytes=4 * 2**30)
H100 = Hardware(device="H100", count=1, memory_bytes=80 * 2**30)
QUICK = ["driver", "memory", "arithmetic", "speed", "all_reduce", "disk"]


def test_two_processes_that_are_healthy(tmp_path: Path) -> None:
    write_request(tmp_path, SelfTestRequest(hardware=CPU, processes=2, checks=[*QUICK, "kernels"]))
    command = [sys.executable, "-m", "trainer_node.engine.self_test", str(tmp_path)]
    ended = subprocess.run(command, env=ENVIRONMENT, timeout=500, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    reports = read_reports(tmp_path, 2)
    assert faults_in(reports, "") == []
    found = [{result.name: result for result in report.results} for report in reports if report]
    assert set(found[0]) == {*QUICK, "kernels", "join"}
    assert set(found[1]) == set(found[0]) - {"disk"}  # one process is enough for the disk
    assert "over 2 processes" in found[1]["all_reduce"].what
    assert not (tmp_path / "written").exists()


def in_process(folder: Path, checks: list[str]) -> list[str]:
    request = SelfTestRequest(hardware=CPU, processes=1, checks=checks)
    write_request(folder, request)
    self_test.run_checks(folder, request, 0)
    return faults_in(read_reports(folder, 1), "")


@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="needs a C++ compiler")
def test_a_layer_is_compiled(tmp_path: Path) -> None:
    assert in_process(tmp_path, ["compile"]) == []
    (report,) = read_reports(tmp_path, 1)
    assert report is not None
    assert report.results[-1].what.startswith("a compiled layer's gradient is off by ")


def test_a_compiler_that_fails_is_no_fault_but_a_wrong_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(module: torch.nn.Module) -> None:
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(self_test, "missing_compiler", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", fails)
    assert in_process(tmp_path, ["compile"]) == []
    (report,) = read_reports(tmp_path, 1)
    assert report is not None
    assert report.results[-1].what == "layers will not be compiled: RuntimeError: no ptxas"

    def wrong(module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda module, given, out: 1.1 * out)

    monkeypatch.setattr(torch.nn.Module, "compile", wrong)
    (fault,) = in_process(tmp_path, ["compile"])
    assert fault.startswith("compile: a compiled layer's gradient is off by 0.")


def test_a_kernel_that_computes_wrong_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact: Callable[..., torch.Tensor] = attention._dense()
    monkeypatch.setattr(attention, "_dense", lambda: lambda *given: 1.2 * exact(*given))
    (fault,) = in_process(tmp_path, ["kernels", "arithmetic"])
    assert fault.startswith("kernels: EngineError: attention computes wrong on cpu")


def test_the_kernel_that_attends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert self_test.kernels(cpu) == "3 forms of attention are right: sdpa-per-document"
    names = iter(["flash-attn-4", "torch-varlen", "flash-attn-4"])
    chosen = [attention.Chosen(name, attention._dense()) for name in names]
    monkeypatch.setattr(self_test, "check_kernels", lambda device, forms: chosen)
    assert self_test.kernels(cpu) == "3 forms of attention are right: flash-attn-4 and torch-varlen"


@pytest.mark.parametrize(("capability", "warns"), [((9, 0), True), ((8, 0), True), ((7, 5), False)])
def test_attention_by_document_is_a_warning_where_a_kernel_should_work(
    capability: tuple[int, int], warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no fault: a slow slot delivers, and one that is offered no job doesn't."""
    slow = attention.Chosen(attention.PER_DOCUMENT, attention._dense(), "torch-varlen: no kernel image")
    monkeypatch.setattr(self_test, "check_kernels", lambda device, forms: [slow])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernels = self_test.kernels
    monkeypatch.setattr(self_test, "kernels", lambda device: kernels(torch.device("cuda", 0)))
    assert in_process(tmp_path, ["kernels"]) == []
    told = "kernels: training is slower: no attention kernel for whole packs works on this GPU"
    wanted = [f"{told} (torch-varlen: no kernel image)"] if warns else []
    assert warnings_in(read_reports(tmp_path, 1)) == wanted


def test_a_full_or_slow_disk_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "LEAST_DISK_BYTES_PER_S", 1e15)
    (fault,) = in_process(tmp_path, ["disk"])
    assert fault.startswith("disk: the disk writes ")
    monkeypatch.setattr(self_test, "LEAST_DISK_FREE", 2**60)
    (fault,) = in_process(tmp_path, ["disk"])
    assert "GiB of the disk are free" in fault


def test_products_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert self_test.arithmetic(torch.device("cpu")) == "exact in bf16 and fp32"
    exact = torch.Tensor.__matmul__

    def off_by_four(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        out = exact(left, right)
        if out.dtype is torch.bfloat16:
            out[3, 4] += 4
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", off_by_four)
    with pytest.raises(self_test.DeviceFault, match=r"1 of 65536 products in torch\.bfloat16 are wrong"):
        self_test.arithmetic(torch.device("cpu"))


def test_a_sum_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def total(self: ProcessGroup, value: torch.Tensor) -> torch.Tensor:
        value += 2.0
        value[7] -= 1.0
        return value

    monkeypatch.setattr(ProcessGroup, "total", total)
    with pytest.raises(self_test.DeviceFault, match="1 of 100 sums over 2 processes are wrong"):
        self_test.all_reduce(ProcessGroup(rank=0, world=2), 100)
    assert self_test.all_reduce(SINGLE_PROCESS) == "one process"


def test_memory_of_another_process_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "least_free_memory", lambda group: 30 * 2**30)
    request = SelfTestRequest(hardware=H100, processes=1)
    with pytest.raises(self_test.DeviceFault, match=r"30\.0 of 80\.0 GiB are free: another process"):
        self_test.memory(SINGLE_PROCESS, request)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_gpus_that_torch_cannot_use_are_named(tmp_path: Path) -> None:
    request = SelfTestRequest(hardware=H100, processes=1)
    write_request(tmp_path, request)
    assert self_test.run_checks(tmp_path, request, 0) == 1
    (fault,) = faults_in(read_reports(tmp_path, 1), "")
    assert fault.startswith("driver: ")


def test_a_check_that_kills_its_process_is_known_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> str:
        raise Killed

    monkeypatch.setattr(self_test, "kernels", killed)
    with pytest.raises(Killed):
        in_process(tmp_path, ["kernels"])
    (fault,) = faults_in(read_reports(tmp_path, 1), "no answer within 180 s")
    assert fault == "kernels: no answer within 180 s"
