"""Several processes as one: who decides, how packs and rows are shared out, DDP and FSDP2 around a model.

Rank 0 decides whatever depends on a clock, a signal or a file, and tells the others; everything else follows
from the same plan in every process. So no two ranks can disagree about what comes next.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import msgspec.structs
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shared.clock import Clock
from shared.errors import EngineError
from shared.messages import ErrorCode, WorkerJob
from shared.planning.plan import Plan
from trainer_node.engine.model.compile import compile_layers
from trainer_node.engine.model.label_model import LabelModel
from trainer_node.engine.model.loading import Deltas

CPU = torch.device("cpu")
SHORTEST_TIMEOUT_S = 600.0
T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes that train one model; what is marked "all" must be called by every one of them."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def leads(self) -> bool:
        """Whether this process decides, reports and writes files."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.world == 1

    def tell(self, value: T) -> T:
        """All: rank 0's `value`, whatever the others gave."""
        if self.alone:
            return value
        box = [value if self.leads else None]
        dist.broadcast_object_list(box, src=0, device=CPU)
        return box[0]  # type: ignore[return-value]

    def agree(self, *numbers: float) -> tuple[float, ...]:
        """All: rank 0's numbers; the one collective of a step besides its gradients, between CPUs."""
        if self.alone:
            return numbers
        shared = torch.tensor(numbers, dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return tuple(shared.tolist())

    def total(self, value: Tensor) -> Tensor:
        """All: the sum of every process's `value`."""
        if not self.alone:
            dist.all_reduce(value)
        return value

    def merged(self, values: NDArray[Any]) -> NDArray[Any]:
        """All: one array of what each process has filled in, where the others have zeros."""
        return self.total(torch.from_numpy(values)).numpy()

    def share(self, items: Sequence[T]) -> list[tuple[int, T, bool]]:
        """This process's items, with their numbers: i * world + rank.

        Every process gets as many, as they compute in step: where the items run out the last one is repeated,
        marked False, and must not count.
        """
        numbers = [turn + self.rank for turn in range(0, len(items), self.world)]
        last = len(items) - 1
        return [(number, items[min(number, last)], number <= last) for number in numbers]


ALONE = Team()


@dataclass(frozen=True)
class TeamClock:
    """Rank 0's clock for all, so that whatever is decided by it is decided alike. All must look together."""

    clock: Clock
    team: Team

    def time(self) -> float:
        """Rank 0's time."""
        return self.team.agree(self.clock.time())[0]

    def advance(self, tokens: int) -> None:
        """Tokens were trained."""
        self.clock.advance(tokens)


def join(job: WorkerJob, left_s: float) -> Team:
    """Meet the worker's other processes, as torchrun's environment says; without one there are none.

    Nobody waits for another for longer than the job lasts. Raises EngineError(DEVICE) if there are fewer GPUs
    than processes.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = CPU
    if job.hardware.device != "cpu":
        seen = torch.cuda.device_count()
        if seen < world or not seen:
            raise EngineError(
                ErrorCode.DEVICE, f"torch sees {seen} GPUs, but this half has {world} of {job.hardware.name}"
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        timeout = timedelta(seconds=max(SHORTEST_TIMEOUT_S, left_s))
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout)
    return Team(rank, world, device)


def leave(team: Team) -> None:
    """All: part without a word of complaint from the library."""
    if not team.alone:
        dist.destroy_process_group()


def is_lost_peer(error: Exception) -> bool:
    """Whether an error says that another process is gone, or too late for a collective."""
    if not dist.is_initialized():
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in ("gloo", "nccl", "by peer"))
    )


def fitted(plan: Plan, team: Team) -> Plan:
    """A plan as this team carries it out, whatever number of devices it was made for.

    The packs of a step stay: a run that goes on with other devices sees the same rows in the same steps.
    """
    parallel = "single" if team.alone else "ddp" if plan.parallel == "single" else plan.parallel
    return msgspec.structs.replace(plan, parallel=parallel, devices=team.world)


# --- the model


def spread(deltas: Deltas, plan: Plan, team: Team) -> tuple[Deltas, nn.Module]:
    """All: the deltas as this process holds them, and what the loop calls for gradients.

    Single: the model itself. DDP: a replica in every process. FSDP2: every parameter is cut over the
    processes, layer by layer, and moved to this process's device; the deltas' parameters are DTensors then.
    """
    layers = decoder_layers(deltas.model)
    if plan.compile:
        compile_layers(layers, recomputed=plan.activation_checkpointing)
    if plan.parallel == "fsdp2":
        deltas = _shard(deltas, layers, plan, team)
    elif plan.parallel == "ddp":
        return deltas, DistributedDataParallel(
            deltas.model,
            bucket_cap_mb=plan.ddp_bucket_mb,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
            init_sync=False,  # the same file and the same seed: nothing to send
            # Not with several packs to a step: the first backward pass, which it learns from, would not sync.
            static_graph=plan.packs_per_step <= team.world,
        )
    return deltas, deltas.model


def decoder_layers(model: LabelModel) -> list[nn.Module]:
    """The transformer layers: what is sharded and compiled as a unit."""
    kinds = set(model.base._no_split_modules or ())
    return [module for module in model.base.modules() if type(module).__name__ in kinds]


def shard_frozen(model: LabelModel, team: Team) -> LabelModel:
    """All: cut a frozen model over the processes, so that one that fits no single device can be scored."""
    model.requires_grad_(False)
    mesh = init_device_mesh(team.device.type, (team.world,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def _shard(deltas: Deltas, layers: list[nn.Module], plan: Plan, team: Team) -> Deltas:
    """FSDP2 over layers; the embeddings, the last norm and the head are the root's and stay gathered.

    What is frozen is bf16 and what is trained fp32: a group may hold both, as long as those that have
    gradients agree. Inputs aren't cast: autocast does what it does without sharding.
    """
    mesh = init_device_mesh(team.device.type, (team.world,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if plan.dtype == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    names = {id(parameter): name for name, parameter in deltas.parameters.items()}
    paths = {path: names[id(value)] for path, value in deltas.model.named_parameters() if id(value) in names}
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(deltas.model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    sharded = dict(deltas.model.named_parameters())
    return replace(deltas, parameters={name: sharded[path] for path, name in paths.items()})


def between(forward: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Around one pack's forward and backward pass: DDP adds gradients up locally until a step's last pack.

    FSDP2 reduces after every pack: whole gradients would be as large as the whole model in fp32.
    """
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    return nullcontext()


# --- whole tensors in checkpoints, shards in memory


def gathered(tensors: Mapping[str, Tensor], team: Team) -> dict[str, Tensor]:
    """All: the tensors as they are on one device; shards are put together in rank 0's memory only."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            whole[name] = tensor
            continue
        full = tensor.full_tensor()
        if team.leads:
            whole[name] = full.cpu()
    return whole


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` is held here: on its device, cut if that is."""
    on_device = whole.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return on_device
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
