"""Tokens and labels by the evaluator's own code: axolotl for text and chats, TRL for preference pairs.

    .venv-compat-2026/bin/python bench/evaluator/label_worker.py SPEC.json

`bench/evaluator/label_parity.py` runs it in an environment that has nothing of Podium's: no import from
this repository. SPEC names a folder, the tokenizers to build there, and cases with their rows. The last line
is one JSON object: versions, and for each case what its rows became: pairs of ids and labels, or null where
the evaluator's code raises.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from axolotl.prompt_strategies import chat_template, completion, user_defined
from axolotl.utils.chat_templates.base import get_chat_template
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

VOCABULARY = 600
Row = dict[str, Any]
Document = tuple[list[int], list[int]]


def main() -> None:
    """Build the tokenizers, then answer every case."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(spec["folder"])
    tokenizers = {
        name: build(folder / name, about, spec["text"]) for name, about in spec["tokenizers"].items()
    }
    answers = {case["name"]: answer(case, tokenizers[case["tokenizer"]]) for case in spec["cases"]}
    versions = {name: version(name) for name in ("axolotl", "transformers", "trl", "peft", "tokenizers")}
    print(json.dumps({"versions": versions, "answers": answers}))


def build(folder: Path, about: dict[str, Any], text: list[str]) -> PreTrainedTokenizerFast:
    """Train a small byte-level tokenizer with a family's special tokens; write it with its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=about["special"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    if bos := about["bos"]:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=about["eos"])
    fast.pad_token = about["eos"]
    if about["template"]:
        fast.chat_template = get_chat_template(about["template"])
    fast.save_pretrained(folder)
    tiny(fast).save_pretrained(folder)
    return fast


def tiny(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the configuration of a model with this vocabulary."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=1, num_key_value_heads=1, **sizes)


def answer(case: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[list[Document] | None]:
    """Return each row's documents: one, or chosen and rejected."""
    if case["kind"] == "dpo":
        return preference_pairs(case, tokenizer)
    strategy = {"chat": chat, "instruct": instruct, "completion": plain}[case["kind"]](case, tokenizer)
    return [documents(strategy, row) for row in case["rows"]]


def documents(strategy: Callable[[Row], Any], row: Row) -> list[Document] | None:
    """Return what the evaluator makes of a row, or None if its code raises."""
    try:
        found = strategy(row)
    except Exception as error:
        print(f"{type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
        return None
    if found["input_ids"] and isinstance(found["input_ids"][0], list):
        return list(zip(found["input_ids"], found["labels"], strict=True))
    return [(found["input_ids"], found["labels"])]


def settings(case: dict[str, Any]) -> DictDefault:
    """Return the evaluator's configuration."""
    return DictDefault({"sequence_len": case["length"], "train_on_inputs": False, "sample_packing": False})


def chat(case: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return the chat strategy, configured as upstream does."""
    columns = case["columns"]
    about = {
        "type": "chat_template",
        "chat_template": columns["chat_template"],
        "field_messages": columns["chat_column"],
        "message_property_mappings": {
            "role": columns["chat_role_field"],
            "content": columns["chat_content_field"],
        },
        "roles": {
            "assistant": [columns["chat_assistant_reference"]],
            "user": [columns["chat_user_reference"]],
        },
    }
    return chat_template.load(tokenizer, settings(case), about).tokenize_prompt


def instruct(case: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return the strategy of rows with an instruction and an output.

    Columns that a task doesn't name have the evaluator's names: `system` and `input`.
    """
    about = user_defined.UserDefinedDatasetConfig(**case["columns"])
    return user_defined.load(tokenizer, settings(case), about).tokenize_prompt


def plain(case: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Callable[[Row], Any]:
    """Return the strategy of rows that are one text."""
    strategy = completion.load(tokenizer, settings(case), {"field": case["columns"]["field_instruction"]})
    # It answers batches of rows, with all pieces of all texts.
    return lambda row: strategy.tokenize_prompt({name: [value] for name, value in row.items()})


def preference_pairs(case: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[list[Document] | None]:
    """Return what the trainer's own preparation and collator make of pairs."""
    names = {case["columns"][f"field_{name}"]: name for name in ("prompt", "chosen", "rejected")}
    rows = [{names[key]: value for key, value in row.items() if key in names} for row in case["rows"]]
    options = DPOConfig(
        output_dir=str(Path(sys.argv[1]).parent / "trl"),
        max_length=case["length"],
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=LlamaForCausalLM(tiny(tokenizer)),
        ref_model=LlamaForCausalLM(tiny(tokenizer)),
        args=options,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    found: list[list[Document] | None] = []
    for row in trainer.eval_dataset:
        batch = trainer.data_collator([row])
        both = zip(*(batch[name] for name in ("input_ids", "completion_mask", "attention_mask")), strict=True)
        pair = []
        for ids, scored, present in both:
            kept = ids[present.bool()].tolist()
            mask = scored[present.bool()].tolist()
            pair.append((kept, [token if label else -100 for token, label in zip(kept, mask, strict=True)]))
        found.append(pair)
    return found


if __name__ == "__main__":
    main()
