"""What the compiler makes of the layers: one graph for all of them and for every pack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from shared.planning.model_shape import Extras
from shared.planning.plan import Plan
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import collate
from trainer_node.engine.distributed.sharding import decoder_layers
from trainer_node.engine.evaluate.metric import score
from trainer_node.engine.model.adapters import add_deltas
from trainer_node.engine.model.compile import compile_layers, missing_compiler
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.objectives import sft

# The compiler itself looks at it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def test_no_layout_of_documents_compiles_a_layer_again(
    tiny_model: Path, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    """Compiled layers give what eager ones do, and one graph is for all packs."""
    examples, counter = make_examples([9, 20, 33, 12, 40, 7]), CompileCounter()
    deltas = add_deltas(load_model(str(tiny_model), "float32"), make_plan("lora"), 0)
    batches = [collate(examples, indices, 64) for indices in ([0, 1], [2, 3], [4, 5, 0], [2, 5, 0, 3], [4])]
    eager = [float(sft.loss(deltas.model, batch).detach()) for batch in batches]
    for layer in decoder_layers(deltas.model):
        layer.compile(backend=counter)
    graphs = []
    for batch, wanted in zip(batches, eager, strict=True):
        assert float(sft.loss(deltas.model, batch).detach()) == pytest.approx(wanted, rel=1e-6)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[1:] == graphs[:1] * 4


@pytest.mark.parametrize("method", ["lora", "dense"])
def test_a_layer_is_compiled_once_however_many_there_are(
    method: str,
    tiny_model: Path,
    tmp_path: Path,
    make_plan: Callable[..., Plan],
    make_examples: Callable[..., Examples],
) -> None:
    """Beyond 8 versions of one function the compiler gives up, and the layers left run eagerly."""
    torch.compiler.reset()
    config = AutoConfig.from_pretrained(tiny_model, num_hidden_layers=12)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    deltas = add_deltas(load_model(str(tmp_path), "float32"), make_plan(method), 0)
    counter = CompileCounter()
    for layer in decoder_layers(deltas.model):
        layer.compile(backend=counter)
    sft.loss(deltas.model, collate(make_examples([9, 20, 33]), [0, 1, 2], 64)).backward()
    assert 0 < counter.frame_count < 12


def test_trained_norms_compile_no_layer_again(
    tiny_model: Path, tmp_path: Path, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    """Norms whose weights are rounded have a class of their own, which must be one for all layers."""
    extras = Extras(norms=True, embeddings=True, parameters=1)
    counts = []
    for layers in (2, 12):
        torch.compiler.reset()
        config = AutoConfig.from_pretrained(tiny_model, num_hidden_layers=layers)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(layers))
        plan = make_plan("dense", dtype="bfloat16", extras=extras, lr_norms=1e-3, lr_embeddings=1e-3)
        deltas = add_deltas(load_model(str(tmp_path / str(layers)), "bfloat16"), plan, 0)
        counter = CompileCounter()
        for layer in decoder_layers(deltas.model):
            layer.compile(backend=counter)
        sft.loss(deltas.model, collate(make_examples([9, 20, 33]), [0, 1, 2], 64)).backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("recomputed", [False, True])
def test_training_is_compiled_and_scoring_is_not(
    recomputed: bool,
    tiny_model: Path,
    make_plan: Callable[..., Plan],
    make_examples: Callable[..., Examples],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer that is checkpointed is left by the compiler as a whole: its parts must be compiled."""
    torch.compiler.reset()
    examples, counter = make_examples([9, 20, 33, 12, 40, 7]), CompileCounter()
    deltas = add_deltas(load_model(str(tiny_model), "float32"), make_plan("lora"), 0)
    deltas.model.train()
    if recomputed:
        deltas.model.base.activation_checkpointing_enable()

    def step() -> list[torch.Tensor]:
        sft.loss(deltas.model, collate(examples, [0, 1, 2], 64)).backward()
        found = [parameter.grad for parameter in deltas.parameters.values() if parameter.grad is not None]
        deltas.model.zero_grad(set_to_none=True)
        return found

    wanted, plain = step(), score(deltas.model, examples)
    compile_unit = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_unit(self, backend=counter))
    for _ in range(2):  # again, as after memory ran out
        compile_layers(decoder_layers(deltas.model), recomputed=recomputed)
    found = step()
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7)
    graphs = counter.frame_count
    assert graphs > 0
    assert score(deltas.model, examples).loss == plain.loss
    step()
    assert counter.frame_count == graphs


def test_without_a_compiler_a_run_says_so_and_does_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert missing_compiler(torch.device("cuda")) == "gcc"
    assert missing_compiler(torch.device("cpu")) == "g++"
    (tmp_path / "clang").touch(0o755)
    assert missing_compiler(torch.device("cuda")) is None
    assert missing_compiler(torch.device("cpu")) == "g++"


def test_what_the_compiler_fails_at_runs_as_it_is(
    tiny_model: Path, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    torch.compiler.reset()

    def fails(*_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    batch = collate(make_examples([9, 20, 33]), [0, 1, 2], 64)
    deltas = add_deltas(load_model(str(tiny_model), "float32"), make_plan("lora"), 0)
    wanted = float(sft.loss(deltas.model, batch).detach())
    compile_layers([], recomputed=False)
    for layer in decoder_layers(deltas.model):
        layer.compile(backend=fails)
    assert float(sft.loss(deltas.model, batch).detach()) == wanted


class WideLayer(torch.nn.Module):  # type: ignore[misc]
    """Two matrices of 2.9 MB each."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(600, 1200), torch.nn.Linear(1200, 600)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.down(torch.nn.functional.silu(self.up(states)))


@torch._dynamo.config.patch(optimize_ddp=True)  # monkeypatch would delete the setting at the end
def test_ddp_does_not_cut_a_layers_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more than 1 MB of gradients in a layer the compiler would cut its graph at DDP's first bucket."""
    torch.compiler.reset()
    counter, compile_unit = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_unit(self, backend=counter))
    layers = [WideLayer() for _ in range(2)]
    compile_layers(layers, recomputed=False)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        forward = DistributedDataParallel(torch.nn.Sequential(*layers), init_sync=False)
        forward(torch.randn(4, 600))
    finally:
        torch.distributed.destroy_process_group()
        torch.compiler.reset()
    assert counter.frame_count == 2  # the first layer alone gets what has no gradient
