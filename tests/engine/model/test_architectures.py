"""Every architecture of the zoo: exact in the batching that the engine finds, and no document leaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from bench.architectures.samples import SAMPLES, SMALL, Sample
from bench.architectures.trial import ALONE, try_model
from bench.architectures.zoo import build, config_of
from shared.errors import EngineError
from shared.messages.runs import ErrorCode
from shared.planning.architectures import ARCHITECTURES, Batching, facts_from_config
from trainer_node.engine.model.exactness import label_model
from trainer_node.engine.model.label_model import LabelModel
from trainer_node.engine.model.linears import expert_tensors, layers_of
from trainer_node.engine.model.shape import model_shape


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_documents_are_as_alone_and_do_not_leak(sample: Sample, tmp_path: Path) -> None:
    trial = try_model(sample, tmp_path)
    assert trial.cause == ""
    assert trial.batching == ARCHITECTURES[sample.model_type]
    assert trial.alone <= ALONE
    assert trial.moved == 0.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["falcon_h1", "recurrent_gemma", "mamba", "bamba", "qwen3_next"])
def test_states_that_run_through_a_pack_are_padded(name: str) -> None:
    sample = next(one for one in SAMPLES if one.name == name)
    assert label_model(build(sample)).batching is Batching.PADDED


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "phi", "minicpm3"])
def test_logits_that_are_more_than_a_product_have_the_own_gradient(name: str) -> None:
    """Soft caps, scales and biases of the head: gradients as the stock model's, through own_head."""
    sample = next(one for one in SAMPLES if one.name == name)
    network = build(sample)
    model = label_model(network)
    assert not model.plain_head
    weight = network.get_input_embeddings().weight
    from bench.architectures.trial import batch_of, examples, stock_logprobs

    rows = examples()
    (found,) = torch.autograd.grad(model(batch_of(rows)).sum(), weight)
    stock = build(sample)
    logps = [stock_logprobs(stock, rows.take([index])).sum() for index in range(len(rows))]
    (wanted,) = torch.autograd.grad(torch.stack(logps).sum(), stock.get_input_embeddings().weight)
    torch.testing.assert_close(found, wanted, atol=2e-4 * float(wanted.abs().max()), rtol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_gateway_and_engine_agree_on_what_each_device_holds_whole(sample: Sample) -> None:
    config = config_of(sample)
    facts = facts_from_config(config.to_dict())
    assert model_shape(config).whole is facts.whole
    if facts.batching is Batching.PACKED:
        assert facts.experts is bool(expert_tensors(layers_of(build(sample))[1]))


def test_the_list_that_the_gateway_asks_is_the_one_that_is_tried() -> None:
    assert {sample.model_type for sample in SAMPLES} == set(ARCHITECTURES)


def test_a_model_that_reads_from_both_sides_is_refused() -> None:
    torch.manual_seed(0)
    network = BertLMHeadModel(BertConfig(**SMALL))
    with pytest.raises(EngineError, match=r"no causal model: later tokens move earlier ones by") as caught:
        label_model(network)
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_a_model_whose_error_is_odd_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**SMALL))

    def forward(self: LabelModel, batch: object) -> None:
        raise ZeroDivisionError("an odd one")

    monkeypatch.setattr(LabelModel, "forward", forward)
    with pytest.raises(EngineError, match="packed, ZeroDivisionError: an odd one; padded, Zero") as caught:
        label_model(network)
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_memory_that_runs_out_is_none_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    network = LlamaForCausalLM(LlamaConfig(**SMALL))

    def forward(self: LabelModel, batch: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(LabelModel, "forward", forward)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        label_model(network)
