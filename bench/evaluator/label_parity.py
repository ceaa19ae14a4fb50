"""Our tokens and labels against the evaluator's own, row by row, for the chat templates of model families.

    make compat        # makes .venv-compat-2026 once: axolotl 0.18.0, transformers 5.12.1, TRL 1.5.1

`label_worker.py` builds small tokenizers with the special tokens of each family and the evaluator's own copy
of its chat template, and encodes rows: texts, instructions, conversations by `tokenizer_default` and by the
template's name, preference pairs. The engine encodes the same rows by the rules of contests. A row that one
of both can't use counts as equal only if the other can't either. Prints a table, then one JSON object:
cases, failed, rows, versions. Exit code 1 if a row differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from shared.messages.offers import DatasetType, TaskType
from shared.messages.runs import Scorer
from trainer_node.engine.data.encode import encoder
from trainer_node.engine.model.loading import load_tokenizer

ROOT: Final = Path(__file__).parents[2]
PYTHON: Final = ROOT / ".venv-compat-2026" / "bin" / "python"
WORKER: Final = Path(__file__).with_name("label_worker.py")
LENGTH: Final = 512
FORMS: Final = {  # upstream's own, where a task names none
    "system_format": "{system}",
    "format": "{instruction} {input}",
    "no_input_format": "{instruction}",
}

Row = dict[str, Any]


class Family(Struct, frozen=True):
    """A family's tokenizer: its special tokens, and the chat template that it comes with."""

    template: str | None  # by the evaluator's name
    special: tuple[str, ...]
    eos: str
    bos: str | None = None


IM: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA: Final = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>"),
)
FAMILIES: Final = {
    "chatml": Family("chatml", IM, "<|im_end|>"),
    "chatml, base model": Family("chatml", IM, "<|endoftext|>"),
    "no template": Family(None, ("<s>", "</s>"), "</s>", "<s>"),
    "llama3": Family("llama3", LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    "llama3, base model": Family("llama3", LLAMA, "<|end_of_text|>", "<|begin_of_text|>"),
    "qwen_25": Family("qwen_25", IM, "<|im_end|>"),
    "qwen3": Family("qwen3", (*IM, "<think>", "</think>"), "<|im_end|>"),
    "mistral_v2v3": Family("mistral_v2v3", ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>"),
    "gemma": Family("gemma", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>"),
    "phi_35": Family(
        "phi_35", ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "<|endoftext|>"
    ),
    "phi_4": Family("phi_4", (*IM, "<|im_sep|>"), "<|im_end|>"),
}


def talk(*turns: tuple[str, str], system: str | None = None) -> Row:
    """Return a row with a conversation."""
    row: Row = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    return row if system is None else {**row, "system": system}


TALKS: Final = [
    talk(("human", "What is 2 + 2?"), ("gpt", "It is 4.")),
    talk(
        ("human", "Hello"), ("gpt", "Hello"), ("human", "Again."), ("gpt", "Hello again."), ("human", "Bye")
    ),
    talk(("system", "Be brief."), ("human", "Name a colour."), ("gpt", "Red")),
    talk(("human", "Name a colour."), ("gpt", "Blue"), system="Be brief."),
    talk(("human", "Two lines"), ("gpt", "one\ntwo\n"), ("human", " spaces "), ("gpt", "  around  ")),
    talk(("human", "Grüße, 世界 👋"), ("gpt", "naïve — déjà vu")),
    talk(("human", "Say nothing."), ("gpt", ""), ("human", "Now?"), ("gpt", "Yes.")),
    talk(("gpt", "I begin."), ("human", "Do you?"), ("gpt", "I do.")),
    talk(
        ("human", "Think."), ("gpt", "<think>\nwell\n</think>\n\nDone."), ("human", "More."), ("gpt", "More.")
    ),
    talk(("human", "One"), ("human", "Two"), ("gpt", "Three"), ("gpt", "Four")),
    talk(("human", "A"), ("gpt", "<|im_end|>"), ("human", "B"), ("gpt", "</s>")),
]
TEXTS: Final = ["What is 2 + 2?", "It is 4.", "Grüße, 世界 👋", " spaces  and\nlines\n", "[[dummy_message]]"]
INSTRUCTIONS: Final = [
    {"q": "Add 2 and 2.", "i": "", "a": "4", "s": "Be brief."},
    {"q": "Translate.", "i": "Grüße", "a": "Greetings\n", "s": ""},
    {"q": "", "i": "", "a": "Nothing was asked.", "s": ""},
    {"q": " spaces ", "i": "x", "a": " around ", "s": "s"},
]
TWO: Final = {"field_instruction": "q", "field_output": "a"}
UNNAMED: Final = [
    {"q": "Add 2 and 2.", "input": "not asked for", "a": "4", "system": "Be brief."},
    {"q": "Translate.", "a": "Greetings", "system": ""},
]
PAIRS: Final = [
    {"p": "What is 2 + 2? ", "c": "It is 4.", "r": "It is 5."},
    {"p": "Ends in a word", "c": "s that go on", "r": " apart"},
    {"p": "Grüße", "c": "世界", "r": "👋"},
    {"p": "word " * 100, "c": "short", "r": "long " * 300},
]


def cases() -> list[dict[str, Any]]:
    """Return what both sides encode."""
    found = []
    for name, family in FAMILIES.items():
        words = ["tokenizer_default", family.template] if family.template else ["chatml"]
        words += ["tokenizer_default_fallback_chatml"] + (["chatml"] if family.template == "llama3" else [])
        for word in dict.fromkeys(words):
            columns = {
                "chat_template": word,
                "chat_column": "conversations",
                "chat_role_field": "from",
                "chat_content_field": "value",
                "chat_user_reference": "human",
                "chat_assistant_reference": "gpt",
            }
            found.append(case(f"{name}: chat by {word}", "chat", name, columns, TALKS))
        asked = {"field_instruction": "q", "field_output": "a", "field_system": "s", "field_input": "i"}
        found.append(case(f"{name}: instruct", "instruct", name, {**asked, **FORMS}, INSTRUCTIONS))
        bare = {**FORMS, "format": FORMS["no_input_format"]}  # upstream's where no column of inputs is named
        found.append(case(f"{name}: instruct, two columns", "instruct", name, {**TWO, **bare}, UNNAMED))
        texts = [{"t": text} for text in (*TEXTS, "long " * 700)]
        found.append(case(f"{name}: completion", "completion", name, {"field_instruction": "t"}, texts))
        pairs = {"field_prompt": "p", "field_chosen": "c", "field_rejected": "r"}
        found.append(case(f"{name}: dpo", "dpo", name, pairs, PAIRS))
    return found


def case(name: str, kind: str, tokenizer: str, columns: dict[str, str], rows: list[Row]) -> dict[str, Any]:
    """Return one case as the worker reads it."""
    about = {"name": name, "kind": kind, "tokenizer": tokenizer, "length": LENGTH}
    return {**about, "columns": columns, "rows": rows}


def ours(one: dict[str, Any], folder: Path) -> list[Any]:
    """Return what the engine makes of a case's rows: documents, or None for a row that it can't use."""
    kinds = {"chat": TaskType.CHAT, "dpo": TaskType.DPO}
    columns = msgspec.convert(one["columns"], DatasetType)
    encode = encoder(
        kinds.get(one["kind"], TaskType.INSTRUCT),
        columns,
        load_tokenizer(str(folder / one["tokenizer"])),
        one["length"],
        Scorer.CONTESTS,
    )
    answers = encode(one["rows"])
    return [
        None
        if isinstance(answer, str)
        else [list(map(list, document)) for example in answer for document in example]
        for answer in answers
    ]


def scored(documents: list[list[list[int]]] | None, length: int) -> list[list[list[int]]] | None:
    """Return the documents that the evaluator keeps: with something to score, and not too long."""
    kept = [
        [ids, labels]
        for ids, labels in documents or []
        if 2 <= len(ids) <= length and any(label != -100 for label in labels)
    ]
    return kept or None


def main() -> int:
    """Compare; 1 if a row differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=str(PYTHON), help="of the evaluator's environment")
    parser.add_argument("--only", default="", help="a part of a case's name")
    args = parser.parse_args()
    chosen = [one for one in cases() if args.only in one["name"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = {
            "folder": name,
            "text": [json.dumps(one["rows"], ensure_ascii=False) for one in chosen],
            "tokenizers": {name: msgspec.to_builtins(family) for name, family in FAMILIES.items()},
            "cases": chosen,
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        command = [args.python, str(WORKER), str(folder / "spec.json")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        failed = [one["name"] for one in chosen if not report(one, found["answers"][one["name"]], folder)]
    rows = sum(len(one["rows"]) for one in chosen)
    print(json.dumps({"cases": len(chosen), "failed": failed, "rows": rows, "versions": found["versions"]}))
    return 1 if failed else 0


def report(one: dict[str, Any], theirs: list[Any], folder: Path) -> bool:
    """Print one line; return whether all rows are equal."""
    mine = [scored(documents, one["length"]) for documents in ours(one, folder)]
    wanted = [scored(documents, one["length"]) for documents in theirs]
    wrong = [number for number, pair in enumerate(zip(mine, wanted, strict=True)) if pair[0] != pair[1]]
    unusable = sum(documents is None for documents in wanted)
    print(
        f"{one['name']:60} {len(mine):3} rows, {unusable} of no use, different: {wrong or 'none'}", flush=True
    )
    for number in wrong[:2]:
        print(f"    row {number}: {mine[number]}\n    instead of {wanted[number]}")
    return not wrong


if __name__ == "__main__":
    sys.exit(main())
