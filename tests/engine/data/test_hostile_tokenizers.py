"""Chat templates and tokenizers of strangers: a row that they fail on is counted, and the job goes on."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import CTRLTokenizer

from shared.errors import DataError, EngineError
from shared.messages.offers import DatasetType, TaskType
from shared.messages.runs import ErrorCode
from tests.engine.data.conftest import turn
from trainer_node.engine.data import encode
from trainer_node.engine.data import examples as examples_of
from trainer_node.engine.data.examples import MOST_REASONS, OTHER_REASONS, TOKENIZER_FAILS, tokenize
from trainer_node.engine.data.token_cache import _model_of
from trainer_node.engine.model.loading import load_tokenizer

TALK = DatasetType(
    chat_column="talk",
    chat_user_reference="human",
    chat_assistant_reference="gpt",
    chat_template="tokenizer_default",
)
PAIRS = DatasetType(field_instruction="q", field_output="a")
GOOD = {"talk": [turn("human", "Hello"), turn("gpt", "Good day")]}
EACH = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def with_template(tokenizer: Any, template: str) -> Any:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[2].content + 1 }}", "fails on it: TypeError"),
        ("{{ 1 // (3 - messages | length) }}", "fails on it: ZeroDivisionError"),
        ("{{ range(10 ** (3 * (messages | length))) }}", "fails on it: OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on it: RecursionError"),
        ("{% include '/etc/passwd' %}", "fails on it: TypeError: no loader for this environment"),
        ("{{ messages[2].content.__class__.__mro__ }}", "refuses it: access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__.os.getcwd() }}", "refuses it: access to attribute '__init__'"),
        ("{{ messages.append(1) }}", "refuses it: access to attribute 'append'"),
        ("{{ raise_exception('x' * 10000) }}", "refuses it: xxx"),
    ],
)
def test_a_row_on_which_the_template_fails_is_counted(tokenizer: Any, template: str, reason: str) -> None:
    own = with_template(tokenizer, f"{EACH}{{% if messages | length == 3 %}}{template}{{% endif %}}")
    rows = [GOOD, {"talk": [*GOOD["talk"], turn("human", "Bye")]}]
    examples, dropped = tokenize(rows, TaskType.CHAT, TALK, own, 256)
    assert len(examples) == 1
    (told,) = dropped
    assert told.startswith(f"the model's chat template {reason}")
    assert len(told) < 300


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.format.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_what_a_template_may_not_see_is_empty(tokenizer: Any, template: str) -> None:
    plain, _ = tokenize([GOOD], TaskType.CHAT, TALK, with_template(tokenizer, EACH), 256)
    found, _ = tokenize([GOOD], TaskType.CHAT, TALK, with_template(tokenizer, EACH + template), 256)
    assert found.fingerprint() == plain.fingerprint()


def test_a_template_that_is_none(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no usable row among 1: the model's chat template refuses it"):
        tokenize([GOOD], TaskType.CHAT, TALK, with_template(tokenizer, "{% if %}"), 256)


def test_reasons_that_are_others_for_each_row_are_counted_together(tokenizer: Any) -> None:
    own = with_template(
        tokenizer,
        EACH + "{% if messages | length == 3 %}{{ raise_exception(messages[2].content) }}{% endif %}",
    )
    rows = [GOOD, *({"talk": [*GOOD["talk"], turn("human", f"Bye {number}")]} for number in range(200))]
    _, dropped = tokenize(rows, TaskType.CHAT, TALK, own, 256)
    assert len(dropped) == MOST_REASONS + 1
    assert sum(dropped.values()) == 200
    assert dropped[OTHER_REASONS] == 200 - MOST_REASONS


def test_a_long_conversation_is_rendered_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []

    def count(tokenizer: Any, turns: list[Any], last: int) -> str:
        rendered.append(len(turns))
        return "".join(f"{text}\n" for _, text in turns)

    monkeypatch.setattr(encode, "_rendered", count)
    talk = {"talk": [turn("human", "Hello"), turn("gpt", "Good day")] * 2000}
    own = with_template(tokenizer, EACH)
    examples, dropped = tokenize([GOOD, talk], TaskType.CHAT, TALK, own, 256)
    assert len(examples) == 1
    assert dropped == {"longer than 256 tokens": 1}
    assert rendered.count(4000) == 1
    assert len(rendered) == 4  # the other row's: the whole, and both borders of its answer


# --- tokenizers


def with_parts(tiny_model: Path, folder: Path, **parts: Any) -> Any:
    path = Path(shutil.copytree(tiny_model, folder)) / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))
    return load_tokenizer(str(folder))


def splitting_by(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def test_a_row_on_which_the_tokenizer_fails_is_counted(tiny_model: Path, tmp_path: Path) -> None:
    own = with_parts(tiny_model, tmp_path / "model", pre_tokenizer=splitting_by("(a|aa)+b"))
    rows = [{"q": f"What is {i}?", "a": "A number."} for i in range(9)]
    rows.insert(4, {"q": "a" * 60, "a": "The pattern needs 2 ** 60 steps to say no."})
    examples, dropped = tokenize(rows, TaskType.INSTRUCT, PAIRS, own, 256)
    assert len(examples) == 9
    assert dropped == {TOKENIZER_FAILS: 1}


def test_bad_rows_at_the_end_are_no_bad_tokenizer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples_of, "CHUNK", 9)
    own = with_parts(tiny_model, tmp_path / "model", pre_tokenizer=splitting_by("(a|aa)+b"))
    rows = [{"q": f"What is {i}?", "a": "A number."} for i in range(9)]
    rows += [{"q": "a" * 60, "a": "The pattern needs 2 ** 60 steps to say no."}] * 2
    examples, dropped = tokenize(rows, TaskType.INSTRUCT, PAIRS, own, 256)
    assert (len(examples), dropped) == (9, {TOKENIZER_FAILS: 2})


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "a"}},
        {"model": {"type": "WordLevel", "unk_token": "none", "vocab": {"a": 0}}},
        {"model": {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": False}},
    ],
)
def test_a_tokenizer_that_fails_on_all_rows(parts: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    own = with_parts(tiny_model, tmp_path / "model", **parts)
    rows = [{"q": f"What is {i}?", "a": "A number."} for i in range(9)]
    with pytest.raises(EngineError, match="the model's tokenizer fails on each of 9 rows: ") as caught:
        tokenize(rows, TaskType.INSTRUCT, PAIRS, own, 256)
    assert caught.value.code is ErrorCode.UNSUPPORTED


# --- tokenizers that are written in Python


def in_python(folder: Path, merges: str = "t h") -> Any:
    folder.mkdir()
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz.?"))
    words = ["<unk>", *letters, *(f"{letter}@@" for letter in letters), "th@@"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    own = CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    own.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "ctrl"}')
    return load_tokenizer(str(folder))


def test_rows_by_a_tokenizer_in_python(tmp_path: Path) -> None:
    own = in_python(tmp_path / "model")
    assert not hasattr(own, "backend_tokenizer")
    found, dropped = tokenize([{"q": "what is this", "a": "that"}], TaskType.INSTRUCT, PAIRS, own, 256)
    assert (len(found), dropped) == (1, {})
    assert found.label_tokens == len(own("that")["input_ids"])


def test_tokenizers_in_python_are_told_apart(tmp_path: Path) -> None:
    first, again = in_python(tmp_path / "first"), load_tokenizer(str(tmp_path / "first"))
    assert _model_of(first) == _model_of(again)
    assert _model_of(first) != _model_of(in_python(tmp_path / "second", merges="h e"))
