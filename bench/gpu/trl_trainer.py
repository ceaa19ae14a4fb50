"""TRL's own trainer on the same tokens and the same model as ours, where TRL is installed."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu import older_torch
from bench.gpu.check import Finding, Setting, Skip
from bench.gpu.shapes import config_of
from bench.gpu.training import Case, Training, device_of, release_memory, synchronize
from bench.harness.tiny_jobs import MODEL
from trainer_node.engine.data.examples import IGNORED, Examples

CASE = Case(model="qwen2.5-0.5b", rank=128, capacity=8192)
STEPS = 6


def beside_trl(setting: Setting) -> Finding:
    """Compare LoRA on a 0.5B model by tokens per second; TRL's packs are as long as ours."""
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
        raise Skip("TRL is not installed")
    older_torch.patch()
    training = Training(CASE, setting)
    ours, rows, capacity = training.steps(STEPS), training.rows, training.capacity
    del training
    release_memory()
    theirs = trl_rate(setting, rows, capacity)
    figures = {"ours": ours, "trl_tokens_per_s": round(theirs), "ratio": ours["tokens_per_s"] / theirs}
    return Finding(figures)


def trl_rate(setting: Setting, rows: Examples, capacity: int) -> float:
    """Tokens per second of SFTTrainer after its first two steps."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    device, seen = device_of(setting), {"tokens": 0, "steps": 0}
    clock = {"began": 0.0, "ended": 0.0}

    class Clocked(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            synchronize(device)
            seen["steps"] += 1
            if seen["steps"] == 2:
                clock["began"], seen["tokens"] = time.perf_counter(), 0
            clock["ended"] = time.perf_counter()
            return control

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            seen["tokens"] += inputs["input_ids"].numel()
            return super().training_step(model, inputs, *rest)

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(dir=setting.folder),
        bf16=True,
        use_cpu=setting.dry,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        max_steps=STEPS + 2,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        packing=True,
        max_length=capacity,
        per_device_train_batch_size=1,
        completion_only_loss=True,
    )
    with device:
        network = AutoModelForCausalLM.from_config(
            config_of(CASE.model, dry=setting.dry), dtype=torch.bfloat16
        )
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=CASE.rank or 16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear"
    )
    trainer = Counting(
        model=network,
        args=config,
        train_dataset=Dataset.from_list(8 * _documents(rows)),
        processing_class=AutoTokenizer.from_pretrained(Path(MODEL)),
        peft_config=lora,
        callbacks=[Clocked()],
    )
    trainer.train()
    return seen["tokens"] / (clock["ended"] - clock["began"])


def _documents(rows: Examples) -> list[dict[str, Any]]:
    spans = zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist(), strict=True)
    return [
        {
            "input_ids": rows.ids[start:end].tolist(),
            "completion_mask": [int(label != IGNORED) for label in rows.labels[start:end].tolist()],
        }
        for start, end in spans
    ]
