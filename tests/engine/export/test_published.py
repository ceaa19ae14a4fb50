"""A whole model of each architecture is written as it was published, so that any version reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bench.architectures.samples import SAMPLES, Sample
from bench.architectures.zoo import write
from bench.harness.tiny_jobs import write_job
from shared.messages.runs import decode_worker_job
from trainer_node.engine.export.writer import write_model
from trainer_node.engine.model.loading import load_model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_names_tensors_and_logits_are_the_published_ones(sample: Sample, tmp_path: Path) -> None:
    base, export = write(sample, tmp_path / "base"), tmp_path / "export"
    job = write_job(tmp_path / "job", tmp_path / "rows.json", model_path=str(base))
    export.mkdir()
    write_model(load_model(str(base), torch.bfloat16), decode_worker_job(job.read_bytes()), export)
    published, written = load_file(base / "model.safetensors"), load_file(export / "model.safetensors")
    assert written.keys() == published.keys()
    for name, tensor in published.items():
        torch.testing.assert_close(written[name], tensor.to(written[name].dtype), rtol=0, atol=0)
    stock, info = AutoModelForCausalLM.from_pretrained(export, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    known = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(ids).logits, known.eval()(ids).logits, rtol=0, atol=0)
