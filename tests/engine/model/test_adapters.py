"""Trainable parts as the plan says, adapters from their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.architectures.samples import SMALL
from shared.errors import EngineError
from shared.messages.runs import ErrorCode
from shared.planning.plan import Plan
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import collate
from trainer_node.engine.evaluate.metric import score_sft
from trainer_node.engine.model.adapters import add_deltas, load_adapter
from trainer_node.engine.model.loading import load_model


@pytest.mark.parametrize("method", ["lora", "dense", "mixed"])
def test_only_what_the_plan_names_is_trained(
    method: str, tiny_model: Path, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(method, dtype="bfloat16")
    deltas = add_deltas(load_model(str(tiny_model), plan.dtype), plan, seed=0)
    wanted = {}
    for module in plan.modules:
        place = "self_attn" if module.name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        for layer in range(2):
            path = f"model.layers.{layer}.{place}.{module.name}"
            if module.method == "lora":
                wanted[f"{path}.lora_A.weight"] = (module.rank, module.in_features)
                wanted[f"{path}.lora_B.weight"] = (module.out_features, module.rank)
            else:
                wanted[f"{path}.weight"] = (module.out_features, module.in_features)
    assert {name: tuple(parameter.shape) for name, parameter in deltas.parameters.items()} == wanted
    assert {parameter.dtype for parameter in deltas.parameters.values()} == {torch.float32}
    frozen = [parameter for parameter in deltas.model.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    assert (deltas.lora, deltas.dense) == (method != "dense", method != "lora")
    groups = {group["name"]: group for group in deltas.param_groups(plan)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        name: rate for name, rate in (("lora", 1e-2), ("dense", 1e-3)) if method in (name, "mixed")
    }
    assert sum(len(group["params"]) for group in groups.values()) == len(wanted)


def test_scaling_follows_each_modules_own_rank_and_alpha(
    tiny_model: Path, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan("lora")
    network = add_deltas(load_model(str(tiny_model), "float32"), plan, seed=0).network
    for module in plan.modules:
        layers = [layer for name, layer in network.named_modules() if name.endswith(f".{module.name}")]
        assert [layer.scaling["default"] for layer in layers] == [module.alpha / module.rank] * 2


@pytest.mark.parametrize("method", ["lora", "dense", "mixed"])
def test_deltas_change_nothing_at_first(
    method: str, tiny_model: Path, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    examples = make_examples([9, 30])
    base = score_sft(load_model(str(tiny_model), "float32"), examples).loss
    deltas = add_deltas(load_model(str(tiny_model), "float32"), make_plan(method), seed=0)
    assert score_sft(deltas.model, examples).loss == pytest.approx(base, abs=1e-6)


def test_the_start_depends_on_the_seed_only(tiny_model: Path, make_plan: Callable[..., Plan]) -> None:
    states = []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(noise)
        states.append(add_deltas(load_model(str(tiny_model), "float32"), make_plan(), seed).state())
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0][name], states[2][name])
    bound = 64**-0.5
    assert 0.8 * bound < states[0][name].abs().max() <= bound


def test_state_goes_back_where_it_came_from(tiny_model: Path, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan("mixed")
    first = add_deltas(load_model(str(tiny_model), "float32"), plan, seed=0)
    for parameter in first.parameters.values():
        parameter.data.add_(1)
    second = add_deltas(load_model(str(tiny_model), "float32"), plan, seed=9)
    second.load_state(first.state())
    assert all(torch.equal(first.state()[name], weight) for name, weight in second.state().items())
    state = first.state()
    state["other"] = state.popitem()[1]
    with pytest.raises(ValueError, match="other trainable weights"):
        second.load_state(state)


def test_a_model_that_can_not_recompute_is_unsupported(
    tiny_model: Path, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(tiny_model), "float32")
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(EngineError, match="computed twice") as caught:
        add_deltas(model, make_plan(activation_checkpointing=True), seed=0)
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_an_adapter_is_loaded_and_a_missing_one_is_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no adapter in"):
        load_adapter(load_model(str(tiny_model), "float32"), str(tmp_path))


def test_a_model_without_the_planned_modules(tiny_model: Path, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    model = load_model(str(tiny_model), "float32")
    for layer in model.model.layers:
        layer.mlp.gate_up = layer.mlp.up_proj
        del layer.mlp.up_proj
    with pytest.raises(EngineError, match="no linear module up_proj") as caught:
        add_deltas(model, plan, seed=0)
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_another_family_untied_and_with_checkpointing(
    make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=False))
    deltas = add_deltas(model, make_plan("mixed", activation_checkpointing=True), seed=0)
    deltas.model.train()
    batch = collate(make_examples([9, 30]), [0, 1], 39)
    deltas.model(batch).sum().backward()
    with_checkpointing = {name: parameter.grad for name, parameter in deltas.parameters.items()}
    model.activation_checkpointing_disable()
    for parameter in deltas.parameters.values():
        parameter.grad = None
    deltas.model(batch).sum().backward()
    for name, parameter in deltas.parameters.items():
        torch.testing.assert_close(parameter.grad, with_checkpointing[name], atol=1e-6, rtol=1e-5)
    assert model.lm_head.weight.grad is None
