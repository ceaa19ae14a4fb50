"""A submission of sharded weights: each process writes its rows into the files, and nothing is gathered.

Only for models that are published under the names and in the tensors that they train with; of others rank 0
writes all (`writer.write`). All processes see the same folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from msgspec.structs import replace
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from shared.files import write_all
from shared.messages.runs import Metrics, WorkerJob
from shared.planning.plan import Plan
from trainer_node.engine.damage.repair import restores_frozen
from trainer_node.engine.distributed.process_group import ProcessGroup, is_lost_peer
from trainer_node.engine.distributed.sharding import local
from trainer_node.engine.distributed.weight_slices import Rows, rows_of, slices_of
from trainer_node.engine.export import writer
from trainer_node.engine.export.dense_as_lora import fit_better
from trainer_node.engine.model.adapters import Deltas
from trainer_node.engine.safetensors_file import PIECE, bytes_of, header_of


@dataclass(frozen=True)
class FilePart:
    """One tensor of a file, of which each process writes some rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    first: int  # of this process's rows
    rows: Callable[[], Tensor | None]  # all call it, and its collectives; None: nothing to write here

    @property
    def empty(self) -> Tensor:
        """Return the tensor without its values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def keeps_names(base: Any) -> bool:
    """Return whether a model is published as it is in memory: neither renamed nor put together otherwise."""
    known = {
        plain: torch.empty(value.shape, dtype=value.dtype, device="meta")
        for plain, (_, value) in _weights(base).items()
    }
    found = writer.as_published(base, known)
    return found.keys() == known.keys() and all(found[name] is value for name, value in known.items())


def write(
    deltas: Deltas, plan: Plan, job: WorkerJob, metrics: Metrics, folder: Path, group: ProcessGroup
) -> Metrics:
    """Collective: write the submission into `folder`, which appears whole; metrics with its kind and size.

    What one process can't, such as write on a full disk, is raised in all.
    """
    restored = restores_frozen(plan.repair, set(deltas.parameters))
    whole = (
        restored
        or plan.extras.parameters > 0
        or (deltas.dense and not fit_better(plan, writer.base_of(deltas)))
    )
    kind = "model" if whole else "adapter"

    def fill(temporary: Path) -> None:
        if whole:
            write_model(deltas, job, temporary, group)
        else:
            parts = adapter_parts(deltas, plan, group)
            write_parts(temporary / "adapter_model.safetensors", parts, group)
            _on_main(lambda: writer.adapter_config(deltas, plan, job).save_pretrained(str(temporary)), group)

    return write_folder(fill, plan, job, replace(metrics, kind=kind), folder, group)


def write_folder(
    fill: Callable[[Path], None],
    plan: Plan,
    job: WorkerJob,
    metrics: Metrics,
    folder: Path,
    group: ProcessGroup,
) -> Metrics:
    """Collective: write a folder's files by `fill`, then let it appear; the metrics with its size."""
    temporary = folder.with_name(f".{folder.name}.{group.broadcast_object(os.getpid())}")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def end() -> None:
        nonlocal metrics
        metrics = writer.complete(temporary, folder, plan, job, metrics)

    try:
        _on_main(begin, group)
        fill(temporary)
        _on_main(end, group)
    finally:
        if group.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    return metrics


def write_model(deltas: Deltas, job: WorkerJob, folder: Path, group: ProcessGroup) -> None:
    """Collective: write a whole model, in bf16 and in files of one size, and its configuration."""
    base = writer.base_of(deltas)
    parts = model_parts(base, group.rank, group.world)
    split = split_torch_state_dict_into_shards(
        {name: part.empty for name, part in parts.items()}, max_shard_size=writer.SHARD
    )
    for name, keys in split.filename_to_tensors.items():
        write_parts(folder / name, {key: parts[key] for key in keys}, group)
    _on_main(lambda: writer.write_configs(base, job, split, folder), group)


def model_parts(base: Any, rank: int, world: int) -> dict[str, FilePart]:
    """Return all weights of the model, LoRA factors added to their matrices; tied ones once.

    In bf16, but for those that the model's own code keeps in fp32, as in `writer.full_state`.
    """
    layers = {
        f"{name}.base_layer.weight": module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer)
    }
    parts: dict[str, FilePart] = {}
    exact = writer.kept_in_fp32(base)
    for plain, (name, value) in _weights(base).items():
        dtype = torch.bfloat16 if value.is_floating_point() and plain not in exact else value.dtype
        rows = partial(_with_lora, layers[name], value, rank, world) if name in layers else None
        parts[plain] = _part(value, dtype, rank, world, rows)
    return parts


def _weights(base: Any) -> dict[str, tuple[str, Tensor]]:
    """Return the model's weights by the names that they have without LoRA; tied ones once."""
    found: dict[str, tuple[str, Tensor]] = {}
    seen: set[int] = set()
    for name, value in base.state_dict(keep_vars=True).items():
        if ".lora_" not in name and id(value) not in seen:
            seen.add(id(value))
            found[name.replace(".base_layer.", ".")] = name, value
    return found


def _part(
    value: Tensor, dtype: torch.dtype, rank: int, world: int, rows: Callable[[], Tensor | None] | None = None
) -> FilePart:
    """Return a tensor's part: of a shard the own rows, of anything else all of it, which rank 0 writes."""
    if isinstance(value, DTensor):
        first = rows_of(len(value), rank, world)[0]
        return FilePart(tuple(value.shape), dtype, first, rows or partial(local, value.detach()))
    mine = value.detach() if rank == 0 else None
    return FilePart(tuple(value.shape), dtype, 0, lambda: mine)


def _with_lora(layer: LoraLayer, value: DTensor, rank: int, world: int) -> Tensor:
    """Return the own rows of a matrix and its factors' product, fp32."""
    first, end = rows_of(len(value), rank, world)
    factors: list[Any] = [layer.lora_A[writer.ADAPTER].weight, layer.lora_B[writer.ADAPTER].weight]
    a, b = (one.detach().full_tensor() for one in factors)
    turned = isinstance(layer.get_base_layer(), Conv1D)
    change = a[:, first:end].T @ b.T if turned else b[first:end] @ a
    return local(value.detach()).float() + change * layer.scaling[writer.ADAPTER]


def adapter_parts(deltas: Deltas, plan: Plan, group: ProcessGroup) -> dict[str, FilePart]:
    """Return LoRA's factors in fp32, and the changes of dense matrices as factors in bf16."""
    parts: dict[str, FilePart] = {}
    if deltas.lora:
        found = get_peft_model_state_dict(
            deltas.network, adapter_name=writer.ADAPTER, save_embedding_layers=False
        )
        parts = {name: _part(value, torch.float32, group.rank, group.world) for name, value in found.items()}
    slices = slices_of(writer.base_of(deltas))
    assert slices is not None
    for name, weight in deltas.parameters.items():
        if ".lora_" not in name:
            path = name.removesuffix(".weight")
            module = writer.base_of(deltas).get_submodule(path)
            pair = _factors(cast(DTensor, weight.detach()), slices[name], plan, module, group)
            parts |= {f"base_model.model.{path}.{key}": part for key, part in pair}
    return parts


def _factors(
    weight: DTensor, base: Rows, plan: Plan, module: Any, group: ProcessGroup
) -> Iterator[tuple[str, FilePart]]:
    """Yield the two factors of a dense change: itself, and the identity (`dense_as_lora.factors`)."""
    computed, bf16 = getattr(torch, plan.dtype), torch.bfloat16
    first, end = rows_of(len(weight), group.rank, group.world)

    def change() -> Tensor:
        own = local(weight)
        before = base(first, end).to(own.device, bf16).float()
        return (own.to(computed).float() - before).to(bf16)

    shape, at, rows = tuple(weight.shape), first, cast("Callable[[], Tensor | None]", change)
    if isinstance(module, Conv1D):  # the other way round; PEFT's factors never are
        shape, at, rows = shape[::-1], 0, partial(_turned, weight, change, group)
    changed = FilePart(shape, bf16, at, rows)
    size = min(shape)
    identity = FilePart((size, size), bf16, 0, lambda: torch.eye(size, dtype=bf16) if group.is_main else None)
    names = ("lora_A.weight", "lora_B.weight")
    yield from zip(names, (changed, identity) if shape[0] <= shape[1] else (identity, changed), strict=True)


def _turned(weight: DTensor, change: Callable[[], Tensor], group: ProcessGroup) -> Tensor | None:
    """Collective: the whole change of a matrix that is held as inputs x outputs, for rank 0 to write."""
    error: Exception | None = None
    try:
        own = change()
    except Exception as failure:  # the others wait for this process
        own, error = torch.zeros_like(local(weight), dtype=torch.bfloat16), failure
    whole = DTensor.from_local(
        own, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
    )
    found = whole.full_tensor()
    if error is not None:
        raise error
    return found.T.contiguous() if group.is_main else None


def write_parts(path: Path, parts: Mapping[str, FilePart], group: ProcessGroup) -> None:
    """Collective: write a safetensors file, each process its rows. What one can't write is raised in all."""
    header, offsets, end = header_of({name: (part.dtype, part.shape) for name, part in parts.items()})

    def begin() -> None:
        with path.open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, len(header) + end)  # a full disk shows here
            write_all(file.fileno(), header)

    _on_main(begin, group)
    error: Exception | None = None
    for name, part in parts.items():
        try:
            rows = part.rows()  # also after an error: the others may wait for it
            if rows is not None and rows.numel() and error is None:
                row = part.dtype.itemsize * rows[0].numel() if part.shape else 0
                _write_at(path, rows.to(part.dtype), len(header) + offsets[name] + part.first * row)
        except Exception as failure:
            if is_lost_peer(failure):
                raise
            error = error or failure
    group.raise_in_all(error)


def _write_at(path: Path, rows: Tensor, offset: int) -> None:
    data = memoryview(bytes_of(rows))
    descriptor = os.open(path, os.O_WRONLY)
    try:
        while data:
            written = os.pwrite(descriptor, data[:PIECE], offset)
            data, offset = data[written:], offset + written
    finally:
        os.close(descriptor)


def _on_main(action: Callable[[], object], group: ProcessGroup) -> None:
    """Collective: rank 0 does something; what it can't is raised in all processes."""
    error: Exception | None = None
    if group.is_main:
        try:
            action()
        except Exception as failure:
            error = failure
    group.raise_in_all(error)
