"""What keeps a run from learning rows by heart: dropout, decay, noise; all of it only while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from bench.ablations.variants import Training
from shared.planning.plan import Plan
from trainer_node.engine.data.packing import Batch
from trainer_node.engine.objectives import Loss
from trainer_node.engine.train.state import TrainState


def with_dropout(training: Training, plan: Plan) -> tuple[str, Plan]:
    """Return a name for the arm and its plan with dropout: PEFT's layers have it from the start, or not."""
    if not training.dropout:
        return training.arm, plan
    return f"{training.arm}, dropout {training.dropout:g}", replace(plan, dropout=training.dropout)


def pull_towards(start: Mapping[str, Tensor], state: TrainState, strength: float) -> None:
    """Let each step end with W <- W - rate * strength * (W - W0), W0 being the weights in `start`.

    AdamW's own decay pulls a weight to zero, which is the base model for LoRA's second factor alone.
    """
    kept = {one: start[name].to(one.device) for name, one in state.deltas.parameters.items()}

    def pull(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.lerp_(kept[parameter], strength * group["lr"])

    state.optimizer.register_step_post_hook(pull)


def noisy_loss(loss: Loss, alpha: float) -> Loss:
    """Return the loss with NEFTune's noise on the embeddings: uniform, at most alpha / sqrt(L * H).

    L tokens of the document, H hidden size. The hook is there inside the loss alone, so nothing else sees it.
    """

    def noisy(model: Any, batch: Batch) -> Tensor:
        lengths_D = torch.tensor(batch.document_lengths, device=batch.ids_T.device)
        lengths_T = lengths_D.repeat_interleave(lengths_D)

        def add_noise(module: torch.nn.Module, inputs: Any, embedded_1TH: Tensor) -> Tensor:
            most_T1 = alpha / (lengths_T[:, None] * embedded_1TH.shape[-1]).sqrt()
            return embedded_1TH + (torch.rand_like(embedded_1TH) * 2 - 1) * most_T1.to(embedded_1TH.dtype)

        hook = model.base.get_input_embeddings().register_forward_hook(add_noise)
        try:
            return loss(model, batch)
        finally:
            hook.remove()

    return noisy
