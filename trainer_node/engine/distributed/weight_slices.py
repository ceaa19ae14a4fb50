"""A model without its weights, and where each process reads the rows of them that it holds.

Rows are those of a weight's first dimension, which FSDP2 cuts. Where a model's files hold a weight as the
model does, its rows are read from there when they are needed. Whatever was converted while it was loaded
(experts that are joined, GGUF, pickled files) is kept as this process's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from msgspec import Struct
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from shared.json_files import DamagedFileError, load_json
from trainer_node.engine.model.loading import ShardIndex

Rows = Callable[[int, int], Tensor]  # from a first row to before a last one
ATTRIBUTE = "weight_slices"  # of a model without its weights


class _Named(Struct):
    """What a model's configuration says of its files."""

    transformers_weights: str | None = None


def rows_of(count: int, rank: int, world: int) -> tuple[int, int]:
    """Return a process's first row of `count`, and the one after its last, as FSDP2 cuts a weight."""
    size = -(-count // world)
    return min(rank * size, count), min((rank + 1) * size, count)


def joined(rows: Sequence[Tensor]) -> Tensor:
    """Return blocks of rows as one tensor; a single one as it is."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def cut(rows: Sequence[Tensor], first: int, end: int) -> Tensor:
    """Return the rows from `first` to before `end` of blocks that follow each other."""
    found, start = [], 0
    for block in rows:
        low, high = max(first - start, 0), min(end - start, len(block))
        if low < high:
            found.append(block[low:high])
        start += len(block)
    return joined(found) if found else rows[0][:0]


class WeightFiles:
    """The tensors in a model's safetensors files; rows are read, not mapped, which takes memory only once."""

    def __init__(self, path: str) -> None:
        self._files: dict[str, Any] = {}
        for place in _weight_files(_folder(path)) if path else ():
            try:
                file = safe_open(place, framework="pt", device="cpu", backend="pread")
                self._files.update({name: file for name in file.keys()})  # noqa: SIM118
            except (OSError, SafetensorError):
                continue  # loading it has reported it; what isn't found here is taken from the loaded model

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return a tensor's shape; None if no file has it."""
        return tuple(self._files[name].get_slice(name).get_shape()) if name in self._files else None

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Read some rows of a tensor."""
        return cast(Tensor, self._files[name].get_slice(name)[first:end])


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads a folder's model from; none of another kind.

    Others may be next to them: an average, adapters, parts of an earlier state.
    """
    try:
        config = load_json(folder / "config.json", _Named)
        name = config.transformers_weights or SAFE_WEIGHTS_NAME
        if config.transformers_weights is None and not (folder / name).is_file():
            name = SAFE_WEIGHTS_INDEX_NAME
        if not name.endswith(".index.json"):
            return [folder / name]
        index = load_json(folder / name, ShardIndex)
    except (OSError, DamagedFileError):
        return []
    return [folder / file for file in sorted(set(index.weight_map.values()))]


def _folder(path: str) -> Path:
    """Return the folder with a model's files, also of one in the hub's cache."""
    if not Path(path).exists():
        cached = cached_file(
            path, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
        return Path(cached).parent if cached else Path(path)
    return Path(path)


def without_weights(
    model: nn.Module, path: str, rank: int, world: int, dtype: torch.dtype | None = None
) -> nn.Module:
    """Put a model's weights on the meta device, and note where this process's rows of each come from.

    With a `dtype` weights that have the model's own get that one: the rows are cast where they are used.
    """
    files, slices = WeightFiles(path), dict[str, Rows]()
    own = cast(torch.dtype, model.dtype)
    names: dict[int, list[str]] = {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        names.setdefault(id(weight), []).append(name)
    for aliases in names.values():  # several of a tied weight
        weight = weights[aliases[0]]
        stored = next((name for name in aliases if files.shape(name) == tuple(weight.shape)), None)
        rows = partial(files.rows, stored) if stored else _kept_rows(weight, rank, world)
        empty = _on_meta(weight, dtype if dtype and weight.dtype == own else weight.dtype)
        for name in aliases:
            slices[name] = rows
            place, _, leaf = name.rpartition(".")
            model.get_submodule(place)._parameters[leaf] = empty
    if dtype:
        _cast_stored_buffers(model, own, dtype)
    setattr(model, ATTRIBUTE, slices)
    return model


def slices_of(model: nn.Module) -> dict[str, Rows] | None:
    """Return where the weights of a model are read that has none; None of a model that has its weights."""
    return cast("dict[str, Rows] | None", getattr(model, ATTRIBUTE, None))


def _on_meta(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(weight, dtype=dtype, device="meta"), weight.requires_grad)


def _kept_rows(weight: Tensor, rank: int, world: int) -> Rows:
    """Keep a process's rows of a weight, which itself is freed."""
    first, end = rows_of(len(weight), rank, world)
    kept = weight.detach()[first:end].clone()
    return lambda start, stop: kept[start - first : stop - first]


def _cast_stored_buffers(model: nn.Module, own: torch.dtype, dtype: torch.dtype) -> None:
    """Cast buffers that are stored with a model; the others, such as rotary frequencies, stay as they are."""
    found = dict(model.named_buffers(remove_duplicate=False))
    stored = {name: found[name] for name in model.state_dict() if name in found}
    narrow = {id(value): value.to(dtype) for value in stored.values() if value.dtype == own}
    for name, value in stored.items():  # modules may share one
        if id(value) in narrow:
            place, _, leaf = name.rpartition(".")
            model.get_submodule(place)._buffers[leaf] = narrow[id(value)]
