"""Which linear modules are trained, and that nothing random is left while they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.architectures.samples import SAMPLES, SMALL, Sample
from bench.architectures.trial import batch_of, examples
from bench.architectures.zoo import build, config_of
from shared.errors import EngineError
from shared.messages.runs import ErrorCode
from trainer_node.engine.model.adapters import no_dropout, target_modules
from trainer_node.engine.model.exactness import label_model
from trainer_node.engine.model.linears import trainable_linears
from trainer_node.engine.model.shape import model_shape, shape_of

BY_NAME = {sample.name: sample for sample in SAMPLES}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
NAMES = {
    "llama": LLAMA,
    "gemma3": LLAMA,  # and not those of its vision tower
    "phi3": ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"],
    "mpt": ["Wqkv", "out_proj", "up_proj", "down_proj"],
    "mixtral": ATTENTION,  # its experts are one tensor, its router stays as it is
    "mamba": ["in_proj"],  # kernels are given the other weights
    # PEFT would take the names of shared experts and dense layers for those of single experts.
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "qwen2_moe": ATTENTION,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_the_linear_modules_of_the_layers_are_trained(name: str) -> None:
    found = trainable_linears(build(BY_NAME[name]))
    assert [linear.name for linear in found] == NAMES[name]
    assert all(linear.count == len(paths) for linear, paths in found.items())


@pytest.mark.filterwarnings("ignore")
def test_weights_that_lie_the_other_way_round_have_their_true_sizes() -> None:
    sizes = {
        linear.name: (linear.in_features, linear.out_features)
        for linear in trainable_linears(build(BY_NAME["gpt2"]))
    }
    assert sizes == {"c_attn": (64, 192), "attn.c_proj": (64, 64), "c_fc": (64, 128), "mlp.c_proj": (128, 64)}


def test_modules_whose_size_differs_from_layer_to_layer_are_kinds_of_their_own() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 256, bias=False)
    found = {
        linear.name: linear.out_features for linear in trainable_linears(model) if "up_proj" in linear.name
    }
    assert found == {"0.mlp.up_proj": 128, "1.mlp.up_proj": 256}


@pytest.mark.filterwarnings("ignore")
def test_a_name_that_a_vision_tower_has_as_well_is_written_as_paths() -> None:
    model = build(BY_NAME["gemma3"])
    kinds = {linear.name: paths for linear, paths in trainable_linears(model).items()}
    found = target_modules(model, {"q_proj": kinds["q_proj"]})
    assert found == [f"model.language_model.layers.{index}.self_attn.q_proj" for index in range(2)]
    assert target_modules(model, {"gate_proj": kinds["gate_proj"]}) == ["gate_proj"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_a_model_trains_as_it_is_scored(sample: Any) -> None:
    """The samples ask for dropout in every place that they know."""
    model = label_model(build(sample))
    no_dropout(model.base)
    batch = batch_of(examples())
    with torch.no_grad():
        scored, trained = model.eval()(batch), model.train()(batch)
    assert torch.equal(scored, trained)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mpt", "gemma3", "mixtral"])
def test_the_shape_is_the_models_own(name: str) -> None:
    model = build(BY_NAME[name])
    shape = model_shape(model.config)
    assert shape == shape_of(model)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert (shape.hidden, shape.layers, shape.heads, shape.vocab) == (64, 2, 4, 1000)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_every_architecture_has_a_shape(sample: Sample) -> None:
    shape = model_shape(config_of(sample))
    assert shape.layers >= 1
    assert shape.linears


def test_norms_without_weights_are_not_counted() -> None:
    assert model_shape(config_of(BY_NAME["diffllama"])).layer_norms == 2  # a third one has none


@pytest.mark.filterwarnings("ignore")
def test_half_of_four_experts_are_idle() -> None:
    shape = model_shape(build(BY_NAME["mixtral"]).config)
    assert shape.idle_parameters == 2 * 2 * 3 * 64 * 128  # layers, experts, matrices


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "whole"), [("llama", False), ("falcon", True), ("mixtral", True)])
def test_padded_models_and_mixtures_are_held_whole(name: str, whole: bool) -> None:
    assert model_shape(config_of(BY_NAME[name])).whole is whole


def test_an_odd_config_is_unsupported() -> None:
    config = LlamaConfig(**{**SMALL, "hidden_act": "nothing_known"})
    with pytest.raises(EngineError, match=r"model type 'llama' can't be trained: .*nothing_known") as caught:
        model_shape(config)
    assert caught.value.code is ErrorCode.UNSUPPORTED
