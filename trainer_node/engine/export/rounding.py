"""Round trained matrices to bf16 so that the outputs of their modules change least.

A submission's weights are bf16, and the nearest number is not the best one: a mean of two runs of
SmolLM2-135M loses .026 nat by it, and .002 by this (docs/experiments.md). A matrix is rounded one input after
the other. What the rounded weights are off is made up for by those that are still to be rounded, as far as
their inputs go together on training rows (Frantar et al. 2022, arXiv 2210.17323).

Shape letters: T tokens of a pack, I inputs of a module, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from trainer_node.engine.data.examples import Examples
from trainer_node.engine.evaluate.metric import reference_logprobs, score
from trainer_node.engine.model.adapters import Deltas
from trainer_node.engine.model.label_model import LabelModel

DAMPING = 0.01  # of the inputs' mean square: few rows say little of how inputs go together
BLOCK = 128  # inputs after which those behind them are corrected, all at once
MOST_TOKENS = 8192  # of the rows whose inputs are looked at
MOST_BYTES = 2**30  # of products of inputs at a time; for more modules the rows are passed again


class _TimeUp(Exception):
    """There is no time to look at more rows."""


def rounded(
    model: LabelModel, names: list[str], rows: Examples, has_time: Callable[[], bool]
) -> dict[str, Tensor]:
    """Return the matrices of these modules, rounded, in main memory; fewer if there is no more time.

    `names` are paths of linear modules in the Hugging Face model. `has_time` is asked before each, and at
    each in the passes over the rows.
    """
    rows = rows.take(np.arange(_count(rows)))
    found: dict[str, Tensor] = {}
    for part in _parts({name: model.base.get_submodule(name) for name in names}):
        if not has_time():
            break
        try:
            products = input_products(model, part, rows, has_time)
        except _TimeUp:
            break
        for name, products_II in products.items():
            if not has_time():
                break
            if (matrix := round_matrix(part[name].weight.detach(), products_II)) is not None:
                found[name] = matrix.cpu()
    return found


def matrices_of(deltas: Deltas) -> list[str]:
    """Return the paths of the linear modules whose own matrices are trained, the output matrix aside."""
    modules = dict(deltas.model.base.named_modules())
    apart = deltas.norms | deltas.embeddings
    paths = [name.removesuffix(".weight") for name in deltas.parameters if name not in apart]
    return [path for path in paths if isinstance(modules.get(path), nn.Linear)]


@torch.no_grad()
def input_products(
    model: LabelModel,
    modules: Mapping[str, nn.Module],
    rows: Examples,
    has_time: Callable[[], bool] = lambda: True,
) -> dict[str, Tensor]:
    """Return the sum over the rows' tokens of the products of each module's inputs, fp32[I, I].

    Raises _TimeUp if there is no more time.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not has_time():
                raise _TimeUp
            x_TI = inputs[0].detach().flatten(0, -2).float()
            with torch.autocast(x_TI.device.type, enabled=False):  # in bf16 their matrix isn't positive
                products_II = x_TI.T @ x_TI
            sums[name] = sums[name] + products_II if name in sums else products_II

        return add

    with _watched([(module, watch(name)) for name, module in modules.items()]):
        (reference_logprobs if rows.group == 2 else score)(model, rows)
    return sums


@torch.no_grad()
def round_matrix(weight_OI: Tensor, products_II: Tensor) -> Tensor | None:
    """Return the matrix with bf16 values, fp32[O, I]; None if the inputs' products are no numbers."""
    size = len(products_II)
    damped_II = products_II.double()
    damped_II.diagonal().add_(DAMPING * damped_II.diagonal().mean())
    try:
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
        # Row i: how an error of input i is made up for by those after it.
        shares_II = torch.linalg.cholesky(inverse_II, upper=True).float()
    except torch.linalg.LinAlgError:
        return None
    left_OI, result_OI = weight_OI.float().clone(), torch.empty_like(weight_OI, dtype=torch.float32)
    for start in range(0, size, BLOCK):
        end = min(size, start + BLOCK)
        errors = torch.empty_like(left_OI[:, start:end])
        for index in range(start, end):
            column = left_OI[:, index]
            result_OI[:, index] = column.to(torch.bfloat16)
            error = (column - result_OI[:, index]) / shares_II[index, index]
            left_OI[:, index:end] -= torch.outer(error, shares_II[index, index:end])
            errors[:, index - start] = error
        left_OI[:, end:] -= errors @ shares_II[start:end, end:]
    return result_OI if bool(result_OI.isfinite().all()) else None


def _parts(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Yield the modules in groups whose products of inputs take no more than MOST_BYTES, or one by one."""
    part: dict[str, nn.Module] = {}
    size = 0
    for name, module in modules.items():
        needed = 4 * module.in_features**2
        if part and size + needed > MOST_BYTES:
            yield part
            part, size = {}, 0
        part[name], size = module, size + needed
    if part:
        yield part


def _count(rows: Examples) -> int:
    """Return how many rows have MOST_TOKENS together; at least one."""
    return max(1, int(np.searchsorted(np.cumsum(rows.lengths), MOST_TOKENS, side="right")))


@contextmanager
def _watched(pairs: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Call functions with the modules' inputs. Scoring uses nothing that is compiled, which would not."""
    handles = [module.register_forward_pre_hook(function) for module, function in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
