"""DDP and FSDP2 around a model; whole tensors in checkpoints, shards in memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import msgspec.structs
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shared.errors import EngineError
from shared.messages import ErrorCode
from shared.planning.architectures import Batching
from shared.planning.plan import Plan
from trainer_node.engine.distributed.process_group import ProcessGroup
from trainer_node.engine.model.adapters import Deltas
from trainer_node.engine.model.compile import compile_layers
from trainer_node.engine.model.label_model import LabelModel


def fitted(plan: Plan, process_group: ProcessGroup) -> Plan:
    """Return the plan as these processes carry it out, whatever number of devices it was made for.

    The packs of a step stay: a run resumed on other devices sees the same rows in the same steps.
    """
    parallel = "single" if process_group.is_single else "ddp" if plan.parallel == "single" else plan.parallel
    return msgspec.structs.replace(plan, parallel=parallel, devices=process_group.world)


# --- the model


def spread(
    deltas: Deltas, plan: Plan, process_group: ProcessGroup, *, fixed_steps: bool = True
) -> tuple[Deltas, nn.Module]:
    """All: the deltas as this process holds them, and what the loop calls for gradients.

    Single: the model itself. DDP: a replica in every process. FSDP2: every parameter is cut over the
    processes, layer by layer, and moved to this process's device; the deltas' parameters are DTensors then.
    """
    layers = decoder_layers(deltas.model)
    if plan.compile:
        compile_layers(layers, recomputed=plan.activation_checkpointing)
    if plan.parallel == "fsdp2":
        deltas = _shard(deltas, layers, plan, process_group)
    elif plan.parallel == "ddp":
        return deltas, DistributedDataParallel(
            deltas.model,
            bucket_cap_mb=plan.ddp_bucket_mb,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
            init_sync=False,  # the same file and the same seed: nothing to send
            # Not with several packs to a step: the first backward pass, which it learns from, would not sync.
            static_graph=fixed_steps and plan.packs_per_step <= process_group.world,
        )
    return deltas, deltas.model


def decoder_layers(model: LabelModel) -> list[nn.Module]:
    """Return the transformer layers: what is sharded and compiled as a unit."""
    kinds = set(model.base._no_split_modules or ())
    return [module for module in model.base.modules() if type(module).__name__ in kinds]


def shard_frozen(model: LabelModel, process_group: ProcessGroup) -> LabelModel:
    """All: cut a frozen model over the processes, so that one that fits no single device can be scored."""
    _refuse_padded(model)
    model.requires_grad_(False)
    mesh = init_device_mesh(process_group.device.type, (process_group.world,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def _shard(deltas: Deltas, layers: list[nn.Module], plan: Plan, process_group: ProcessGroup) -> Deltas:
    """FSDP2 over layers; the embeddings, the last norm and the head are the root's and stay gathered.

    What is frozen is bf16 and what is trained fp32: a group may hold both, as long as those that have
    gradients agree. Inputs aren't cast: autocast does what it does without sharding.
    """
    _refuse_padded(deltas.model)
    mesh = init_device_mesh(process_group.device.type, (process_group.world,))
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


def _refuse_padded(model: LabelModel) -> None:
    """Padded documents make as many passes as they need, and each pass gathers shards in all processes."""
    if model.batching is Batching.PADDED:
        raise EngineError(
            ErrorCode.UNSUPPORTED,
            f"{type(model.base).__name__} is too large for one device, and documents that can't share a row "
            "can't be trained over several",
        )


def between(forward: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Around one pack's forward and backward pass: DDP adds gradients up locally until a step's last pack.

    FSDP2 reduces after every pack: whole gradients would be as large as the whole model in fp32.
    """
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    return nullcontext()


# --- whole tensors in checkpoints, shards in memory


def gathered(tensors: Mapping[str, Tensor], process_group: ProcessGroup) -> dict[str, Tensor]:
    """All: the tensors as they are on one device; shards are put together in rank 0's memory only."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            whole[name] = tensor
            continue
        full = tensor.full_tensor()
        if process_group.is_main:
            whole[name] = full.cpu()
    return whole


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor as `like` is held here: on its device, sharded if that is."""
    on_device = whole.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return on_device
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
