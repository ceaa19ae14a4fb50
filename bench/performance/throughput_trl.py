"""TRL's side of bench.throughput: its own trainers, their `train()` paused between rounds.

The trainers get the very tokens and labels that we train on. bf16 means here what it means on our side:
frozen weights in bf16, LoRA factors in fp32 (PEFT's default), products under bf16 autocast (`bf16=True`).
Gradient checkpointing, TRL's default, is off: it only costs time here.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from bench.performance import throughput_podium
from podium.demo.model import HOME
from trainer_node.engine.data.examples import IGNORED, Examples
from trainer_node.engine.model.loading import load_model, load_tokenizer

# SFT: packing of so many tokens. DPO, which TRL can't pack: pairs to a batch, and when the reference runs.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"max_length": 256}, {"max_length": 512}, {"max_length": 1024}],
    "dpo": [{"pairs": 2}, {"pairs": 4}, {"pairs": 8}, {"pairs": 4, "reference": "precomputed"}],
}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENDLESS = 100_000


class Rounds(TrainerCallback):
    """Holds `train()` at the end of a round until the driver wants the next one."""

    def __init__(self) -> None:
        self.tokens = 0
        self.extra_s_per_token = 0.0
        self._steps = 0
        self._until = 0.0
        self._began = 0.0
        self._requests: Iterator[float] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """After the warm steps: answer when the round's time is over, then wait for the next."""
        self._steps += 1
        if self._steps < throughput_podium.WARM_STEPS:
            return control
        spent = throughput_podium.now() - self._began
        if self._requests is None:
            self._requests = throughput_podium.requests()
        elif spent < self._until:
            return control
        else:
            throughput_podium.say(rate=self.tokens / (spent + self.extra_s_per_token * self.tokens))
        wish = next(self._requests, None)
        if wish is None:
            sys.exit(0)
        self._until, self.tokens, self._began = wish, 0, throughput_podium.now()
        return control


def _documents(examples: Examples) -> list[tuple[list[int], list[int]]]:
    borders = examples.offsets.tolist()
    spans = [slice(a, b) for a, b in itertools.pairwise(borders)]
    return [(examples.ids[span].tolist(), examples.labels[span].tolist()) for span in spans]


def _options(dtype: str) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "bf16": dtype == "bf16",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "learning_rate": throughput_podium.LEARNING_RATE,
        "max_steps": ENDLESS,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataset_num_proc": None,
        "seed": throughput_podium.SEED,
        "max_grad_norm": 1.0,
    }


def _parts(dtype: str) -> dict[str, Any]:
    return {
        "model": load_model(str(HOME), throughput_podium.TORCH_DTYPES[dtype]),
        "processing_class": load_tokenizer(str(HOME)),
        "peft_config": LoraConfig(
            task_type="CAUSAL_LM",
            r=throughput_podium.RANK,
            lora_alpha=int(throughput_podium.ALPHA),
            lora_dropout=0.0,
            target_modules=MODULES,
        ),
    }


def train_sft(examples: Examples, dtype: str, max_length: int) -> None:
    """SFTTrainer with packing=True."""
    rounds = Rounds()

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            rounds.tokens += inputs["input_ids"].numel()  # TRL's packs carry no padding
            return super().training_step(model, inputs, *rest)

    rows = [
        {"input_ids": ids, "completion_mask": [int(label != IGNORED) for label in labels]}
        for ids, labels in _documents(examples)
    ]
    config = SFTConfig(
        **_options(dtype),
        packing=True,
        max_length=max_length,
        per_device_train_batch_size=1,
        completion_only_loss=True,
    )
    dataset = Dataset.from_list(rows)
    Counting(args=config, train_dataset=dataset, callbacks=[rounds], **_parts(dtype)).train()


def train_dpo(examples: Examples, dtype: str, pairs: int, reference: str = "in every step") -> None:
    """DPOTrainer; where the reference is precomputed, each token pays for its share of that pass."""
    rounds = Rounds()
    spent = 0.0

    class Counting(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset  # tokenised already: equal tokens on both sides

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            nonlocal spent
            began = throughput_podium.now()
            found = super()._precompute_ref_logps(*arguments)
            spent = throughput_podium.now() - began
            return found

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            rounds.tokens += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *rest)

    documents = _documents(examples)
    rows = []
    for (chosen, labels), (rejected, _) in zip(documents[::2], documents[1::2], strict=True):
        prompt = next(index for index, label in enumerate(labels) if label != IGNORED)
        rows.append(
            {"prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]}
        )
    config = DPOConfig(
        **_options(dtype),
        per_device_train_batch_size=pairs,
        max_length=None,
        precompute_ref_log_probs=reference == "precomputed",
        beta=0.1,
    )
    dataset = Dataset.from_list(rows)
    trainer = Counting(args=config, train_dataset=dataset, callbacks=[rounds], **_parts(dtype))
    rounds.extra_s_per_token = spent / len(examples.ids)
    trainer.train()


def serve(task: str, dtype: str, **setting: Any) -> None:
    """Train until the driver has had enough."""
    examples = throughput_podium.examples_of(task)
    (train_sft if task == "sft" else train_dpo)(examples, dtype, **setting)
