"""torch.compile for the layers while they train, and nowhere else.

Compiled is only the step: scoring is a few passes over other lengths, without gradients, so that it would
compile every layer again (12 graphs on a model of 12 layers), in minutes that no reserve counts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
import torch._dynamo
from torch import nn


def compile_layers(layers: Iterable[nn.Module], *, recomputed: bool) -> None:
    """Compile each layer as a unit; again, with the other `recomputed`, it is as if only that had been said.

    A layer that is `recomputed` in the backward pass is checkpointed inside its own call, and what breaks the
    graph in there (attention over documents) makes the compiler leave all of it: then its parts are compiled.
    What can't be compiled runs uncompiled; torch logs that.
    """
    torch._dynamo.config.suppress_errors = True
    # Under DDP each layer would be cut where a bucket of gradients is full: graphs of 9 + 7 nodes, not of 13.
    # A graph per layer lets DDP send a layer's gradients during the next one's pass as it is.
    torch._dynamo.config.optimize_ddp = False
    for layer in layers:
        layer._compiled_call_impl = None  # all that nn.Module.compile sets
        for unit in layer.children() if recomputed else [layer]:
            unit.compile()


def missing_compiler(device: torch.device) -> str | None:
    """Return the compiler that is needed and not installed; None if one is found."""
    variable, names = ("CXX", ("g++", "clang++")) if device.type == "cpu" else ("CC", ("gcc", "clang", "cc"))
    if any(shutil.which(name) for name in (os.environ.get(variable, ""), *names) if name):
        return None
    return names[0]


def eager() -> AbstractContextManager[None]:
    """Compile nothing inside, and use nothing that was compiled before."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
