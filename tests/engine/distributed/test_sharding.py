"""Two gloo processes as one: the same numbers as alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.planning.plan import Plan
from tests.engine.distributed.sharded_run import run_together
from trainer_node.engine.distributed import sharding
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from trainer_node.engine.distributed.sharding import fitted
from trainer_node.engine.model.adapters import add_deltas
from trainer_node.engine.model.loading import load_model

SIDE = Path(__file__).with_name("parallel_side.py")


def test_a_plan_is_carried_out_on_the_devices_that_are_there(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(parallel="fsdp2", devices=4, packs_per_step=8)
    assert fitted(plan, ProcessGroup(0, 2)) == make_plan(parallel="fsdp2", devices=2, packs_per_step=8)
    assert fitted(plan, SINGLE_PROCESS).parallel == "single"
    assert fitted(make_plan(), ProcessGroup(1, 2)).parallel == "ddp"


class OlderDDP(torch.nn.Module):  # type: ignore[misc]
    """What torch 2.12's DistributedDataParallel takes, and nothing else."""

    def __init__(
        self,
        module: torch.nn.Module,
        broadcast_buffers: bool = True,
        init_sync: bool = True,
        bucket_cap_mb: float | None = None,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
    ) -> None:
        super().__init__()
        self.broadcast_buffers, self.static_graph = broadcast_buffers, static_graph


def test_buffers_are_not_sent_in_older_versions_of_torch_either(
    tiny_model: Path, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "DistributedDataParallel", OlderDDP)
    plan = make_plan(parallel="ddp", devices=2, packs_per_step=2)
    deltas = add_deltas(load_model(str(tiny_model), "float32"), plan, seed=0)
    _, forward = sharding.spread(deltas, plan, ProcessGroup(0, 2))
    assert isinstance(forward, OlderDDP)
    assert forward.broadcast_buffers is False


@pytest.fixture(scope="module")
def numbers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What one process and two report of the same few steps, by case, of every kind of plan."""
    folder = tmp_path_factory.mktemp("numbers")
    found = {}
    for world in (1, 2):
        run_together(world, [str(SIDE), str(tiny_model), str(folder / f"{world}.pt")])
        found.update(torch.load(folder / f"{world}.pt"))
    return found


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        (way, kind)
        for way in ("ddp", "fsdp2")
        for kind in ("lora", "dense", "mixed", "norms", "everything")  # the last one if memory runs out
    ],
)
def test_two_processes_compute_what_one_does(
    way: str, kind: str, numbers: dict[str, dict[str, torch.Tensor]]
) -> None:
    wanted, found = numbers[f"single-{kind}"], numbers[f"{way}-{kind}"]
    assert wanted.keys() == found.keys()
    assert torch.equal(found["tokens"], wanted["tokens"])
    assert torch.equal(found["scores"], wanted["scores"])  # before training: not one bit differs
    for name in wanted.keys() - {"tokens"}:
        most = 5e-6 if name == "half" else 1e-6  # losses of about 7, whose last bit is 5e-7
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=most)


@pytest.mark.parametrize("kind", ["bf16", "bf16-norms", "bf16-everything"])
def test_mixed_precision_is_the_same_sharded(kind: str, numbers: dict[str, dict[str, torch.Tensor]]) -> None:
    """Frozen bf16 and trained fp32 in one group; sums are rounded in another order."""
    wanted, found = numbers[f"ddp-{kind}"], numbers[f"fsdp2-{kind}"]
    assert wanted.keys() == found.keys()
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=0, atol=2e-2)
    assert found["losses"][-1] < found["losses"][0]
