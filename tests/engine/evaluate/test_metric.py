"""The metric against the numbers that the upstream evaluator printed, and those of contests' versions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.evaluator import oracle_2026
from podium.commands import score as command
from shared.messages.offers import TaskType, task_type_of
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.evaluate.metric import reference_logprobs, score_sft
from trainer_node.engine.export import verify
from trainer_node.engine.model.adapters import load_adapter
from trainer_node.engine.model.loading import load_model

DATA = Path(__file__).parents[2] / "data" / "oracle"
ALLOWED = json.loads((DATA / "expected.json").read_text())["tolerance"]
EXACT = 1e-6  # from plain logits, row by row, on the same machine: CPUs round products in bf16 differently
TINY = ["instruct", "instruct+input+system", "completion", "chat", "dpo"]


def plain_loss(case: dict[str, Any], adapter: str | None) -> float:
    """The mean over the case's examples as the evaluator has it: a batch of one, the loss of its logits."""
    columns, base = case["dataset_type"], str(DATA / "base")
    examples, _ = command.read_examples(base, str(DATA / case["data"]), columns, task_type_of(columns), base)
    network: torch.nn.Module = load_model(base, torch.bfloat16)
    if examples.group == 2:
        examples = examples.with_reference(reference_logprobs(network, examples, batch_tokens=1))
    if adapter:
        network = load_adapter(network, adapter)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        return float(
            np.mean([verify.stock_loss(network, examples.take([one])) for one in range(len(examples))])
        )


@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize("name", TINY)
def test_oracle(oracle: dict[str, Any], name: str, which: str) -> None:
    case = oracle[name]
    adapter = str(DATA / "adapter") if which == "adapter" else None
    task_type = task_type_of(case["dataset_type"])
    loss, _, _ = command.score(
        str(DATA / "base"), adapter, str(DATA / case["data"]), case["dataset_type"], task_type
    )
    assert loss == pytest.approx(case[which], abs=ALLOWED["dpo" if name == "dpo" else "tiny"])
    assert loss == pytest.approx(plain_loss(case, adapter), abs=EXACT)


@pytest.mark.parametrize("name", TINY)
def test_oracle_of_contests(name: str) -> None:
    kept = json.loads(oracle_2026.EXPECTED.read_text())
    (case,) = [one for one in kept["cases"] if one["name"] == name]
    found = oracle_2026.ours(case)
    assert [found[which] for which in ("tokens", "labels")] == [case["tokens"], case["labels"]]
    allowed = kept["tolerance"]["dpo" if name == "dpo" else "tiny"]
    for which in ("base", "adapter"):
        assert found[which] == pytest.approx(case[which], abs=allowed)


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["smollm2 instruct", "smollm2 chat"])
def test_oracle_smollm2(oracle: dict[str, Any], smollm2: Path, name: str) -> None:
    case = oracle[name]
    task_type = task_type_of(case["dataset_type"])
    loss, count, _ = command.score(
        str(smollm2), None, str(DATA / case["data"]), case["dataset_type"], task_type
    )
    assert count == 80
    assert loss == pytest.approx(case["base"], abs=5e-3)


def test_batches_change_nothing(tiny_model: Path, make_examples: Callable[..., Examples]) -> None:
    model = load_model(str(tiny_model), torch.float32)
    examples = make_examples([9, 30, 4, 17, 12, 40])
    one_by_one = score_sft(model, examples, batch_tokens=1)
    together = score_sft(model, examples, batch_tokens=1000)
    np.testing.assert_allclose(together.per_example, one_by_one.per_example, atol=2e-6)
    assert together.loss == pytest.approx(together.per_example.mean())
    assert score_sft(model, examples.take([3])).loss == pytest.approx(one_by_one.per_example[3], abs=2e-6)


def test_the_model_keeps_its_mode(tiny_model: Path, make_examples: Callable[..., Examples]) -> None:
    model = load_model(str(tiny_model), torch.float32)
    for training in (True, False):
        model.train(training)
        score_sft(model, make_examples([9]))
        assert all(module.training == training for module in model.modules())


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["score", *words])


def test_command(capsys: pytest.CaptureFixture[str], oracle: dict[str, Any]) -> None:
    columns = json.dumps({"field_instruction": "text"})
    args = parsed(
        "--model", str(DATA / "base"), "--data", str(DATA / "completion.json"), "--dataset-type", columns
    )
    assert args.run(args) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["loss"] == pytest.approx(plain_loss(oracle["completion"], None), abs=EXACT)
    assert last["task_type"] == TaskType.INSTRUCT


def test_command_takes_the_tokenizer_from_elsewhere(
    capsys: pytest.CaptureFixture[str], oracle: dict[str, Any], tmp_path: Path
) -> None:
    """A submission of whole weights has no tokenizer; the scorer uses the original one."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to((DATA / "base" / name).resolve())
    words = ("--model", str(tmp_path), "--data", str(DATA / "completion.json"))
    columns = ("--dataset-type", json.dumps({"field_instruction": "text"}))
    assert (args := parsed(*words, *columns)).run(args) == 1
    assert "has no tokenizer: name the original model's folder or hub id with --tokenizer" in (
        capsys.readouterr().err
    )
    assert (args := parsed(*words, *columns, "--tokenizer", str(DATA / "base"))).run(args) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["loss"] == pytest.approx(plain_loss(oracle["completion"], None), abs=EXACT)


def test_command_finds_the_base_models_tokenizer(
    capsys: pytest.CaptureFixture[str], oracle: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").symlink_to((DATA / "base" / "model.safetensors").resolve())
    config = json.loads((DATA / "base" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_name_or_path": str(DATA / "base")}))
    columns = json.dumps({"field_instruction": "text"})
    words = ("--model", str(tmp_path), "--data", str(DATA / "completion.json"), "--dataset-type", columns)
    assert (args := parsed(*words)).run(args) == 0
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1])["loss"] == pytest.approx(
        plain_loss(oracle["completion"], None), abs=EXACT
    )
    assert f"that of {DATA / 'base'} is used" in told.err


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"--dataset-type": "{"}, 2, "is invalid"),
        ({"--data": "nowhere.json"}, 1, "no such data file: nowhere.json"),
        ({"--model": "./nowhere"}, 1, "no model at ./nowhere"),
        ({"--adapter": "./nowhere"}, 1, "no adapter in ./nowhere"),
        ({"--dataset-type": '{"field_instruction": "absent"}'}, 1, "no row has the column 'absent'"),
    ],
)
def test_command_says_what_is_wrong(
    change: dict[str, str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "--model": str(DATA / "base"),
        "--data": str(DATA / "completion.json"),
        "--dataset-type": '{"field_instruction": "text"}',
        **change,
    }
    args = parsed(*[word for pair in words.items() for word in pair])
    assert args.run(args) == code
    assert message in capsys.readouterr().err
