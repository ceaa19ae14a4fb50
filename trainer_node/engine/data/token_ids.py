"""Texts -> token ids by the model's tokenizer, within the memory that the process may take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.errors import in_a_line, is_failure
from trainer_node.engine.limits import require_memory

TOKENIZER_BYTES = 320  # that a fast tokenizer takes for a byte of UTF-8: 20 to 260, most for "a a a"
TEXT_SIZE = 4  # what a text counts besides its bytes: one of two bytes takes 1,600
CALL_SIZE = 2 << 20  # bytes of text in one call: 512 usual rows, and 0.7 GB of memory


class TokenizerError(Exception):
    """The model's tokenizer fails on some of the texts that it was given."""


def token_ids(tokenizer: Any, texts: list[str], **options: Any) -> list[list[int]]:
    """Tokenize many texts together, which fast tokenizers do on all cores.

    Raises TokenizerError, or MemoryError before the tokenizer would abort the process.
    """
    found: list[list[int]] = []
    for size, some in calls(texts):
        require_memory(TOKENIZER_BYTES * size)
        try:
            found += tokenizer(some, return_attention_mask=False, **options)["input_ids"]
        except BaseException as error:
            if not is_failure(error):
                raise
            raise TokenizerError(in_a_line(error)) from error
    return found


def calls(texts: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Divide texts, in order, into what one call gets: a size of at most CALL_SIZE, or one text."""
    some: list[str] = []
    size = 0
    for text in texts:
        more = TEXT_SIZE + len(text.encode("utf-8", "surrogatepass"))
        if some and size + more > CALL_SIZE:
            yield size, some
            some, size = [], 0
        some.append(text)
        size += more
    if some:
        yield size, some
