"""Rows -> token ids and label masks, exactly as the upstream scorer makes them.

The scorer is axolotl 0.9.0 for instruct, completion and chat, and TRL for DPO: 0.17.0 for offers, 1.5.1 for
contests. Their behaviour in odd cases (an empty response, an empty turn, content that shares tokens with its
surroundings) is reproduced, not repaired. A document is (ids, labels): labels are the ids that are scored,
and -100 elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from string import Formatter
from typing import Any

from jinja2 import TemplateError

from shared.errors import DataError, in_a_line, is_failure
from shared.messages.offers import DatasetType, TaskType
from shared.messages.runs import Scorer
from trainer_node.engine.data.columns import asked_columns
from trainer_node.engine.data.conversations import Turn, UnusableError, form_of, turns_of
from trainer_node.engine.data.row_set import AskedColumns, Row, text_of
from trainer_node.engine.data.token_ids import token_ids

IGNORED = -100
COMPLETION_CHUNKS = 64  # a completion text is cut at this multiple of the scored length
DUMMY = "[[dummy_message]]"  # stands in for a turn's content when the scorer looks for its borders
FALLBACK = "tokenizer_default_fallback_"  # before the name of what a model without a template gets
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of a chat template; anything else is code
EOS_REACH = 3  # an end token so near after a turn belongs to it
DPO_LENGTH, DPO_PROMPT_LENGTH = 1024, 512


Document = tuple[list[int], list[int]]
Example = tuple[Document, ...]  # one document, or chosen and rejected
# rows -> for each row its examples, or why it can't be used
Encoder = Callable[[Sequence[Row]], list[list[Example] | str]]


def encoder(
    task_type: TaskType,
    columns: DatasetType,
    tokenizer: Any,
    length: int,
    scorer: Scorer = Scorer.OFFERS,
) -> Encoder:
    """Return the function that encodes rows.

    Raises DataError if a column isn't named, a format is malformed or the kind of task has no encoder.
    """
    asked = asked_columns(task_type, columns)
    if task_type is TaskType.INSTRUCT:
        if not columns.field_output:
            return _completion(asked.needed[0], tokenizer, length)
        return _instruct(asked, columns, tokenizer, length)
    if task_type is TaskType.CHAT:
        return _chat(columns, tokenizer, length, scorer)
    if task_type is TaskType.DPO:
        pairs = _whole_dpo if scorer is Scorer.CONTESTS else _dpo
        return pairs(asked.needed, tokenizer, length)
    raise DataError(f"there is no way to read data of a {task_type.value}")


def _optional(row: Row, column: str) -> str | None:
    try:
        return text_of(row.get(column))
    except TypeError as error:
        raise UnusableError(f"column {column!r} is not text") from error


def _text(row: Row, column: str) -> str:
    text = _optional(row, column)
    if text is None:
        raise UnusableError(f"column {column!r} is missing")
    return text


def _each(rows: Sequence[Any], read: Callable[[Any], Any]) -> tuple[list[Any], list[list[Any] | str]]:
    """Return what `read` makes of the usable rows, and the answers with the other rows' reasons."""
    parts: list[Any] = []
    answers: list[list[Any] | str] = []
    for row in rows:
        try:
            parts.append(read(row))
            answers.append([])
        except UnusableError as reason:
            answers.append(str(reason))
    return parts, answers


def _fill(answers: list[list[Any] | str], examples: Iterator[list[Any] | str]) -> list[list[Any] | str]:
    """Return the answers with the usable rows' examples put in, in order."""
    return [answer if isinstance(answer, str) else next(examples) for answer in answers]


# --- instruct and completion


def _instruct(asked: AskedColumns, columns: DatasetType, tokenizer: Any, length: int) -> Encoder:
    (instruction, output), (system_column, input_column) = asked
    with_input = columns.format or ("{instruction} {input}" if columns.field_input else "{instruction}")
    without_input = columns.no_input_format or "{instruction}"
    system_format = columns.system_format or "{system}"
    _check_format(with_input, {"instruction", "input"})
    _check_format(without_input, {"instruction"})
    _check_format(system_format, {"system"})

    def read(row: Row) -> tuple[str, str]:
        text, response = _text(row, instruction), _text(row, output)
        system = _optional(row, system_column) if system_column in row else columns.system_prompt
        extra = _optional(row, input_column)
        prompt = system_format.format(system=system) if system else ""
        prompt += (with_input if extra else without_input).format(instruction=text, input=extra)
        if not response:
            raise UnusableError(f"column {output!r} is empty")
        return prompt, response

    # Asked once: a tokenizer takes 40 us to say it, as long as to encode a short row.
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def encode(rows: Sequence[Row]) -> list[list[Example] | str]:
        parts, answers = _each(rows, read)
        cut = {"truncation": True, "max_length": length}
        prompts = token_ids(tokenizer, [prompt for prompt, _ in parts], **cut)
        responses = token_ids(tokenizer, [response for _, response in parts], **cut)
        pairs = zip(parts, prompts, responses, strict=True)
        return _fill(answers, ([(join(part[0], prompt, ids),)] for part, prompt, ids in pairs))

    def join(text: str, prompt: list[int], ids: list[int]) -> Document:
        prompt = prompt if text else []  # the scorer skips an empty prompt, with the start token it would get
        response = _ended(ids, end, length)
        response = response[1:] if response and response[0] == start else response
        return prompt + response, [IGNORED] * len(prompt) + response

    return encode


def _check_format(text: str, fields: set[str]) -> None:
    """Refuse formats with more than plain fields: `{a.b}` and `{a:>999999999}` reach further than text."""
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"malformed format {text!r:.80}: {error}") from error
    for _, field, spec, conversion in parts:
        if field is not None and (field not in fields or spec or conversion):
            known = " and ".join(f"{{{name}}}" for name in sorted(fields))
            raise DataError(f"the format {text!r:.80} may use nothing but {known}")


def _ended(ids: list[int], end: int | None, length: int) -> list[int]:
    """Append the end token, if the model has one, unless it is there or the text was cut."""
    if end is None:
        return ids
    return [*ids, end] if ids and ids[-1] != end and len(ids) < length else ids


def _completion(column: str, tokenizer: Any, length: int) -> Encoder:
    longest, end = length * COMPLETION_CHUNKS, tokenizer.eos_token_id

    def read(row: Row) -> str:
        if not (text := _text(row, column)):
            raise UnusableError(f"column {column!r} is empty")
        return text

    def encode(rows: Sequence[Row]) -> list[list[Example] | str]:
        texts, answers = _each(rows, read)
        return _fill(answers, map(cut, token_ids(tokenizer, texts, truncation=True, max_length=longest)))

    def cut(ids: list[int]) -> list[Example]:
        ids = _ended(ids, end, longest)
        chunks = (ids[start : start + length] for start in range(0, len(ids), length))
        return [((chunk, chunk),) for chunk in chunks]

    return encode


# --- chat


def _chat(columns: DatasetType, tokenizer: Any, length: int, scorer: Scorer) -> Encoder:
    form = form_of(columns)
    render = _renderer(columns.chat_template or "chatml", tokenizer)
    end = tokenizer.eos_token_id
    # Templates of axolotl's own, such as `qwen3`, treat the last turn specially and ask which one it is.
    tells_last = scorer is Scorer.CONTESTS

    def read(row: Row) -> tuple[list[Turn], str]:
        turns = turns_of(row, form)
        return turns, render(turns)

    def cut(whole: tuple[list[Turn], list[int]]) -> tuple[list[Turn], list[int], list[str]]:
        turns, ids = whole
        texts = list[str]()
        # One that is too long is dropped: its turns' borders would cost the square of their number.
        last = len(turns) - 1 if tells_last else 0
        for index in _assistant_turns(turns) if len(ids) <= length else []:
            texts += [
                render(turns[: index + 1], last),
                render([*turns[:index], (turns[index][0], DUMMY)], last),
            ]
        return turns, ids, texts

    def mark(turns: list[Turn], ids: list[int], found: Iterator[list[int]]) -> list[Example]:
        if len(ids) > length:
            return [((ids, [IGNORED] * len(ids)),)]
        return [(_mark(turns, ids, found, end),)]

    def encode(rows: Sequence[Row]) -> list[list[Example] | str]:
        conversations, answers = _each(rows, read)
        wholes = token_ids(tokenizer, [text for _, text in conversations], add_special_tokens=False)
        turns = [turns for turns, _ in conversations]
        parts, reasons = _each(list(zip(turns, wholes, strict=True)), cut)
        texts = [text for *_, some in parts for text in some]
        found = iter(token_ids(tokenizer, texts, add_special_tokens=False))
        marked = _fill(reasons, (mark(turns, ids, found) for turns, ids, _ in parts))
        return _fill(answers, iter(marked))

    return encode


def _renderer(template: str, tokenizer: Any) -> Callable[..., str]:
    """Return what renders turns; a second argument above 0 is the whole conversation's last turn."""
    if template.startswith(FALLBACK):
        template = "tokenizer_default" if tokenizer.chat_template else template.removeprefix(FALLBACK)
    if template == "chatml":
        return lambda turns, last=0: "".join(
            f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns
        )
    # A template's name, such as `llama3`, goes by the model's own: the scorer's copy of it says the same.
    if NAME.fullmatch(template) and tokenizer.chat_template:
        return lambda turns, last=0: _rendered(tokenizer, turns, last)
    raise DataError(
        f"chat template {template!r:.80} can't be used: it must be 'chatml', or a name where the model has a "
        "template of its own"
    )


def _rendered(tokenizer: Any, turns: list[Turn], last: int) -> str:
    """Return a conversation by the model's template. Raises UnusableError if that can't be had."""
    told = {"real_last_index": last} if last else {}
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **told)
    except TemplateError as error:
        raise UnusableError(f"the model's chat template refuses it: {error!s:.200}") from error
    except Exception as error:  # whatever a template does to a row that it wasn't made for
        if not is_failure(error):
            raise
        raise UnusableError(f"the model's chat template fails on it: {in_a_line(error)}") from error
    return text


def _assistant_turns(turns: list[Turn]) -> list[int]:
    return [index for index, (role, _) in enumerate(turns) if role == "assistant"]


def _mark(turns: list[Turn], ids: list[int], found: Iterator[list[int]], end_id: int | None) -> Document:
    """Label the content of assistant turns, and the end token that follows within reach."""
    labels = [IGNORED] * len(ids)
    for _ in _assistant_turns(turns):
        start, end = _borders(next(found), next(found))
        if end > start:
            labels[start:end] = ids[start:end]
        after = next((position for position in range(max(end, 0), len(ids)) if ids[position] == end_id), None)
        if after is not None and after - end <= EOS_REACH:
            labels[after] = ids[after]
    return ids, labels


def _borders(full: list[int], dummy: list[int]) -> tuple[int, int]:
    """Return the first and last tokens of the last turn's content; (-1, -1) if it is empty."""
    shorter = min(len(full), len(dummy))
    start = next((i for i in range(shorter) if full[i] != dummy[i]), None)
    end = next((len(full) - i for i in range(shorter) if full[-1 - i] != dummy[-1 - i]), None)
    return (-1, -1) if start is None or end is None or end <= start else (start, end)


# --- preference pairs


def _dpo(names: Sequence[str], tokenizer: Any, length: int) -> Encoder:
    longest = min(length, DPO_LENGTH)
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def read(row: Row) -> list[str]:
        return [_text(row, name) for name in names]

    def encode(rows: Sequence[Row]) -> list[list[Example] | str]:
        parts, answers = _each(rows, read)
        ids = iter(token_ids(tokenizer, [text for part in parts for text in part], add_special_tokens=False))
        return _fill(answers, ([pair(next(ids), next(ids), next(ids))] for _ in parts))

    def pair(prompt: list[int], *completions: list[int]) -> Example:
        prompt = prompt[-DPO_PROMPT_LENGTH:]
        return tuple(join(prompt, [*completion, *ending]) for completion in completions)

    def join(prompt: list[int], completion: list[int]) -> Document:
        ids, labels = prompt + completion, [IGNORED] * len(prompt) + completion
        return ids[-longest:], labels[-longest:]

    return encode


def _whole_dpo(names: Sequence[str], tokenizer: Any, length: int) -> Encoder:
    """Encode as TRL 1.5.1: prompt and completion are tokenised as one text, of which the start is kept.

    The completion is what follows the tokens of the prompt alone; the end token is added as text. What is cut
    away whole gives no loss, and so no example.
    """
    end = tokenizer.eos_token or ""

    def read(row: Row) -> list[str]:
        prompt, *completions = (_text(row, name) for name in names)
        ended = (text if text.endswith(end) else text + end for text in completions)
        return [prompt, *(prompt + text for text in ended)]

    def encode(rows: Sequence[Row]) -> list[list[Example] | str]:
        parts, answers = _each(rows, read)
        ids = iter(token_ids(tokenizer, [text for part in parts for text in part]))
        return _fill(answers, ([pair(next(ids), next(ids), next(ids))] for _ in parts))

    def pair(prompt: list[int], *wholes: list[int]) -> Example:
        return tuple(join(prompt, whole[len(prompt) :]) for whole in wholes)

    def join(prompt: list[int], completion: list[int]) -> Document:
        ids, labels = prompt + completion, [IGNORED] * len(prompt) + completion
        return ids[:length], labels[:length]

    return encode
