"""Rotary frequencies that depend on a row's length: each document computes as its own row does alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.architectures.samples import SAMPLES as ZOO
from bench.architectures.samples import Sample
from bench.architectures.zoo import build
from shared.messages.offers import TaskType
from shared.planning.plan import Plan
from tests.engine.step_state import step_state
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import collate
from trainer_node.engine.evaluate.metric import score
from trainer_node.engine.model.adapters import add_deltas
from trainer_node.engine.model.exactness import label_model
from trainer_node.engine.objectives import loss_for
from trainer_node.engine.signals import Stop
from trainer_node.engine.train.cpu_threads import CpuThreads
from trainer_node.engine.train.loop import gradients

LIMIT = 16
LENGTHS = [9, 30, 4, LIMIT, LIMIT + 1, 21, 30]  # on both sides of the limit, two of one length
EXACT = 1e-5


def _longrope(half: int) -> dict[str, Any]:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
        "original_max_position_embeddings": LIMIT,
    }
    return {"rope_parameters": rope, "original_max_position_embeddings": LIMIT}


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
BY_LAYER = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": DYNAMIC,
    },
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "max_position_embeddings": LIMIT,
}
SAMPLES = {
    "phi3 longrope": Sample("phi3", _longrope(8)),
    "llama longrope": Sample("llama", _longrope(8)),
    "llama dynamic": Sample("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
    "gemma3 dynamic": Sample("gemma3_text", BY_LAYER),
    "falcon longrope": Sample("falcon", _longrope(8), leave_out=("head_dim",)),  # padded
    "falcon dynamic": Sample(
        "falcon",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT},
        leave_out=("head_dim",),
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture(params=SAMPLES)
def network(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(SAMPLES[request.param])


def _alone(network: PreTrainedModel, rows: Examples) -> Tensor:
    """The labels' log-probabilities by the stock model, example by example; a pair is one batch, padded."""
    found = []
    for example in (rows.take([index]) for index in range(len(rows))):
        lengths = np.diff(example.offsets)
        ids = torch.zeros((example.group, int(lengths.max())), dtype=torch.int64)
        for document, (start, length) in enumerate(zip(example.offsets, lengths, strict=False)):
            ids[document, :length] = torch.from_numpy(example.ids[start : start + length])
        with torch.no_grad():
            network(input_ids=ids[:1, :1], use_cache=False)  # `dynamic` forgets the row before
            logp_BLV = torch.log_softmax(network(input_ids=ids, use_cache=False).logits, 2)
        batch = collate(example, [0], len(example.ids))
        starts_D = batch.cu_seqlens.long()[:-1]
        within_N = batch.label_positions_N - starts_D[batch.label_documents_N]
        found.append(logp_BLV[batch.label_documents_N, within_N, batch.labels_N])
    return torch.cat(found)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("padding", [0, 3, 5 * LIMIT])
def test_in_a_batch_each_row_is_as_alone(
    network: PreTrainedModel, group: int, padding: int, make_examples: Callable[..., Examples]
) -> None:
    """Also a pair's shorter document: the scorer pads it to the longer one, whose length counts for both."""
    rows = make_examples(LENGTHS[: len(LENGTHS) // group * group], group=group)
    wanted_N = _alone(network, rows)
    model = label_model(network)
    everything = list(range(len(rows)))
    with torch.no_grad():
        found_N = model(collate(rows, everything, len(rows.ids) + padding))
        again_N = model(collate(rows, everything, len(rows.ids)))
        short_N = model(collate(rows.take([0]), [0], len(rows.take([0]).ids)))
    assert float((found_N - wanted_N).abs().max()) <= EXACT
    assert torch.equal(found_N, again_N)
    assert float((short_N - wanted_N[: len(short_N)]).abs().max()) <= EXACT  # nothing of the long ones sticks


def test_without_it_a_row_has_the_frequencies_of_its_neighbours(
    network: PreTrainedModel, make_examples: Callable[..., Examples]
) -> None:
    rows = make_examples([LIMIT - 3, LIMIT + 5, 3 * LIMIT])
    wanted_N = _alone(network, rows)
    model = label_model(network)
    assert model.rotary_limit == LIMIT
    model.rotary_limit = None
    with torch.no_grad():
        found_N = model(collate(rows, [0, 1, 2], len(rows.ids)))
    assert float((found_N - wanted_N).abs().max()) > 100 * EXACT


def test_a_copy_of_the_model_computes_by_its_own_modules(
    network: PreTrainedModel, make_examples: Callable[..., Examples]
) -> None:
    rows = make_examples(LENGTHS)
    model = label_model(network)
    other = label_model(copy.deepcopy(network))
    batch = collate(rows, list(range(len(rows))), len(rows.ids))
    with torch.no_grad():
        assert torch.equal(model(batch), other(batch))
    mine, copied = (next(m for m in one.base.modules() if hasattr(m, "rope_type")) for one in (model, other))
    assert mine is not copied
    assert copied.forward._stock.__self__ is copied


@pytest.mark.parametrize("name", ["llama", "llama-llama3-rope", "qwen2-yarn", "gemma3_text", "mamba"])
def test_frequencies_that_are_the_same_for_all_rows_have_no_limit(name: str) -> None:
    model = label_model(build(next(sample for sample in ZOO if sample.name == name)))
    assert model.rotary_limit is None


def test_a_score_is_that_of_the_rows_alone(
    network: PreTrainedModel, make_examples: Callable[..., Examples]
) -> None:
    rows = make_examples(LENGTHS)
    logp_N = _alone(network, rows)
    counts = [int((rows.take([index]).labels >= 0).sum()) for index in range(len(rows))]
    wanted = [-float(part.mean()) for part in logp_N.split(counts)]
    found = score(network, rows, batch_tokens=64).per_example
    np.testing.assert_allclose(found, wanted, atol=EXACT)


@pytest.mark.parametrize("name", ["llama longrope", "llama dynamic"])
def test_threads_with_short_and_long_rows_do_not_disturb_each_other(
    name: str, make_examples: Callable[..., Examples], make_plan: Callable[..., Plan]
) -> None:
    plan, rows = make_plan(capacity=256), make_examples(LENGTHS)
    deltas = add_deltas(build(SAMPLES[name]), plan, seed=0)

    def step(threads: CpuThreads | None) -> tuple[float, list[Tensor]]:
        run = step_state(plan, deltas, rows, objective=loss_for(TaskType.INSTRUCT), cpu_threads=threads)
        found = gradients(run, [list(range(len(rows)))], Stop())
        assert found is not None
        return float(found[0]), [one.grad for one in deltas.parameters.values()]

    wanted, exact = step(None)
    found = []
    for _ in range(20):
        for one in deltas.parameters.values():
            one.grad = None
        found.append(step(CpuThreads(2, 2)))
    assert found[0][0] == pytest.approx(wanted, rel=EXACT)
    assert all(
        float((a - b).norm()) <= EXACT * float(b.norm()) for a, b in zip(found[0][1], exact, strict=True)
    )
    for loss, grads in found[1:]:
        assert loss == found[0][0]
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0][1], strict=True))
