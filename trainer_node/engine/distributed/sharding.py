"""DDP and FSDP2 around a model; whole tensors in checkpoints, shards in memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import msgspec.structs
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shared.errors import EngineError
from shared.planning.architectures import Batching
from shared.planning.plan import Plan
from trainer_node.engine.distributed.process_group import ProcessGroup
from trainer_node.engine.distributed.weight_slices import Rows, cut, joined, rows_of, slices_of
from trainer_node.engine.model.adapters import Deltas, lora_starts, stable_name
from trainer_node.engine.model.compile import compile_layers
from trainer_node.engine.model.exactness import choose_batching
from trainer_node.engine.model.label_model import LabelModel


def fitted(plan: Plan, process_group: ProcessGroup) -> Plan:
    """Return the plan as these processes carry it out, whatever number of devices it was made for.

    The packs of a step stay: a run resumed on other devices sees the same rows in the same steps.
    """
    parallel = "single" if process_group.is_single else "ddp" if plan.parallel == "single" else plan.parallel
    return msgspec.structs.replace(plan, parallel=parallel, devices=process_group.world)


# --- the model


def spread(
    deltas: Deltas,
    plan: Plan,
    process_group: ProcessGroup,
    *,
    seed: int = 0,
    slices: Mapping[str, Rows] | None = None,
    fixed_steps: bool = True,
) -> tuple[Deltas, nn.Module]:
    """Collective: the deltas as this process holds them, and what the loop calls for gradients.

    Single: the model itself. DDP: a replica in every process. FSDP2: every parameter is cut over the
    processes, layer by layer, and this process's rows of it are read from `slices` onto its device; the
    deltas' parameters are DTensors then.
    """
    layers = decoder_layers(deltas.model)
    if plan.parallel == "fsdp2":
        assert slices is not None
        deltas = sharded(deltas, plan, process_group, slices, seed)
        check_sharded(deltas.model)
    if plan.compile:
        compile_layers(layers, recomputed=plan.activation_checkpointing)
    if plan.parallel == "ddp":
        forward = DistributedDataParallel(
            deltas.model,
            bucket_cap_mb=plan.ddp_bucket_mb,
            gradient_as_bucket_view=True,
            init_sync=False,  # the same file and the same seed: nothing to send
            # Not with several packs to a step: the first backward pass, which it learns from, would not sync.
            static_graph=fixed_steps and plan.packs_per_step <= process_group.world,
            **no_buffer_sync(DistributedDataParallel),
        )
        if not forward.static_graph:
            gradients_into_buckets(forward)
        return deltas, forward
    return deltas, deltas.model


def no_buffer_sync(kind: type) -> dict[str, bool]:
    """Return the argument of DDP's class that keeps it from sending buffers; torch 2.13 has renamed it."""
    known = inspect.signature(kind).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


def gradients_into_buckets(forward: DistributedDataParallel) -> None:
    """Collective: let the gradients be zeros in DDP's buckets, where packs are added up before they are sent.

    Else the first pack's gradients would be next to the buckets. DDP orders its buckets again after the first
    pass, and the gradients would stay in the old ones until the next sum: 4 bytes a weight more each time.
    """
    parameters = [parameter for parameter in forward.parameters() if parameter.requires_grad]
    for _ in range(2):  # the first tells DDP the order
        for parameter in parameters:
            parameter.grad = None
        forward.reducer._rebuild_buckets()
        forward.reducer.prepare_for_backward([])
        nothing = torch.stack([0.0 * parameter.flatten()[0].float() for parameter in parameters])
        nothing.sum().backward()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()  # also where a weight is no number


def decoder_layers(model: LabelModel) -> list[nn.Module]:
    """Return the transformer layers: what is sharded and compiled as a unit."""
    kinds = set(model.base._no_split_modules or ())
    return [module for module in model.base.modules() if type(module).__name__ in kinds]


def trains_outside_layers(model: LabelModel) -> bool:
    """Return whether a weight outside of the transformer layers is trained."""
    inside = {weight for layer in decoder_layers(model) for weight in layer.parameters()}
    return any(weight.requires_grad and weight not in inside for weight in model.parameters())


def shard_frozen(network: nn.Module, process_group: ProcessGroup) -> LabelModel:
    """Collective: a frozen model cut over the processes: one that fits no single device can be scored so.

    The network has no weights yet (`weight_slices.without_weights`).
    """
    slices = slices_of(network)
    assert slices is not None
    model = LabelModel(network, next(network.parameters()).dtype == torch.bfloat16)
    model.requires_grad_(False)
    mesh = init_device_mesh(process_group.device.type, (process_group.world,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    _fill(model, process_group, first_values(network, slices, process_group))
    check_sharded(model)
    return model


def first_values(
    network: nn.Module, slices: Mapping[str, Rows], process_group: ProcessGroup, seed: int = 0
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield, by the name of each weight, what gives this process's rows of it before the first step.

    One is read at a time, and before the next one is yielded.
    """
    starts = lora_starts(network, seed)
    for name, weight in network.named_parameters():
        first, end = rows_of(len(weight), process_group.rank, process_group.world)
        if ".lora_A." in name:
            _, start = next(starts)
            yield name, partial(start.__getitem__, slice(first, end))
        elif ".lora_" in name:  # the other factor starts at zero
            yield name, partial(torch.zeros, (end - first, *weight.shape[1:]))
        else:
            yield name, partial(slices[stable_name(name)], first, end)


def untrained(
    deltas: Deltas, process_group: ProcessGroup, slices: Mapping[str, Rows], seed: int
) -> dict[str, Tensor]:
    """Return sharded trained weights as they were before the first step."""
    found: dict[str, Tensor] = {}
    for name, read in first_values(deltas.network, slices, process_group, seed):
        if (weight := deltas.parameters.get(stable_name(name))) is not None:
            found[stable_name(name)] = with_rows(weight, read(), weight.dtype)
    return found


@torch.no_grad()
def _fill(
    model: LabelModel, process_group: ProcessGroup, first: Iterator[tuple[str, Callable[[], Tensor]]]
) -> None:
    """Give a sharded model without weights this process's rows of them."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    model.to_empty(device=process_group.device)
    moved = {id(value): value.to(process_group.device) for value in buffers.values()}
    for name, value in buffers.items():  # one that modules share is each's, and stays one
        place, _, leaf = name.rpartition(".")
        model.get_submodule(place)._buffers[leaf] = moved[id(value)]
    weights = dict(model.network.named_parameters())
    for name, read in first:
        local(weights[name].detach()).copy_(read())


def check_sharded(model: LabelModel) -> None:
    """Collective: check what a sharded model computes. Raises EngineError if it can't be trained."""
    register_fsdp_forward_method(model, "answer")
    try:
        choose_batching(model, [Batching.PACKED])
    except EngineError as error:
        raise EngineError(
            error.code,
            f"{error}; it is too large for one device, and documents that can't share a row can't be trained "
            "over several",
        ) from error


def sharded(
    deltas: Deltas, plan: Plan, process_group: ProcessGroup, slices: Mapping[str, Rows], seed: int
) -> Deltas:
    """Collective: FSDP2 over layers, with this process's rows of all weights; `check_sharded` follows.

    The embeddings, the last norm and the head are the root's. They stay gathered after a pass if none of them
    is trained: weights that are loaded into the model would not be seen before the next backward pass.
    What is frozen is bf16 and what is trained fp32: a group may hold both, as long as those that have
    gradients agree. Inputs aren't cast: autocast does what it does without sharding.
    """
    mesh = init_device_mesh(process_group.device.type, (process_group.world,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if plan.dtype == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    names = {id(parameter): name for name, parameter in deltas.parameters.items()}
    paths = {path: names[id(value)] for path, value in deltas.model.named_parameters() if id(value) in names}
    again = trains_outside_layers(deltas.model)
    for layer in decoder_layers(deltas.model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(deltas.model, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
    _fill(deltas.model, process_group, first_values(deltas.network, slices, process_group, seed))
    cut = dict(deltas.model.named_parameters())
    return replace(deltas, parameters={name: cut[path] for path, name in paths.items()})


def between(forward: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Around one pack's forward and backward pass: DDP adds gradients up locally until a step's last pack.

    FSDP2 reduces after every pack: whole gradients would be as large as the whole model in fp32.
    """
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    return nullcontext()


# --- whole tensors in checkpoints, shards in memory


def gathered(tensors: Mapping[str, Tensor], process_group: ProcessGroup) -> dict[str, Tensor]:
    """Collective: the tensors as they are on one device; shards are put together in rank 0's memory only."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            whole[name] = tensor
            continue
        full = tensor.full_tensor()
        if process_group.is_main:
            whole[name] = full.cpu()
    return whole


def placed(whole: Tensor | Sequence[Tensor], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor, whole or in blocks of rows, as `like` is held here: on its device and sharded."""
    if isinstance(whole, DTensor):
        return whole
    rows = [whole] if isinstance(whole, Tensor) else whole
    if not isinstance(like, DTensor):
        return joined(rows).to(like.device, dtype, copy=True)
    return with_rows(like, own_rows(rows, like), dtype)


def own_rows(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return what this process holds of a tensor in blocks of rows, if it is held as `like` is."""
    if not isinstance(like, DTensor):
        return joined(rows)
    group = like.device_mesh.get_group()
    return cut(rows, *rows_of(len(like), group.rank(), group.size()))


def with_rows(like: Tensor, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor that is held as `like` is, of which this process has these rows."""
    found = torch.empty_like(like, dtype=dtype or rows.dtype, requires_grad=False)
    local(found).copy_(rows)
    return found


def as_held(rows: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which this process has these rows, held as `like` are; whole ones as they are."""
    return {
        name: with_rows(like[name], value) if isinstance(like[name], DTensor) else value
        for name, value in rows.items()
    }


@torch.no_grad()
def load_rows(deltas: Deltas, rows: Mapping[str, Tensor]) -> None:
    """Set what this process holds of the trained weights; nothing is put next to them on the device."""
    for name, value in deltas.state().items():
        local(value).copy_(rows[name])


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
