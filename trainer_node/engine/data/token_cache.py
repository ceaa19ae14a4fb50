"""A job's tokens, made once: kept in the run folder, and known again by what they were made of.

`tokens.safetensors` holds what `data.tokenize` made. A start that finds the same data, columns and tokenizer
reads it instead of tokenising again, which takes minutes for a large data set. A resume needs not even the
data.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from shared.files import file_digest, write_atomically
from shared.json_files import UNREADABLE
from shared.messages.runs import WorkerJob
from trainer_node.engine.data.examples import Examples, tokenize
from trainer_node.engine.data.formats.readers import DataFile
from trainer_node.engine.data.job_rows import read_job_rows
from trainer_node.engine.data.sources import located
from trainer_node.engine.reporter import Reporter

FILE = "tokens.safetensors"
DATA = "data"  # where a download stays
MOST_NOTICES = 20  # about the data; a hub's data set may have 2,000 files
READ_S = 900.0  # of reading 2.2 GB that only Python's own decoder can read, several times over


class TokenCache(Struct, frozen=True):
    """All usable rows of a job."""

    examples: Examples
    dropped: dict[str, int]  # reason -> rows
    rows: int  # also those dropped


def tokens_of(job: WorkerJob, folder: Path, tokenizer: Any, length: int, reporter: Reporter) -> TokenCache:
    """Return the job's rows as tokens, from the run's folder if they are there and made alike.

    Raises DataError if the data can't be had or used.
    """
    files = located(
        job.dataset,
        job.file_format,
        folder / DATA,
        allow_private_urls=job.allow_private_urls,
        tick=reporter.alive,
    )
    key = _key(job, files, tokenizer, length)
    if known := kept(folder, key):
        return known
    with reporter.patience(READ_S):
        found = read_job_rows(files, job.task_type, job.dataset_type)
    for text in found.notices[:MOST_NOTICES]:
        reporter.message(text)
    if more := found.notices[MOST_NOTICES:]:
        reporter.message(f"and {len(more)} more notices about the data")
    examples, unusable = tokenize(
        found.rows,
        job.task_type,
        job.dataset_type,
        tokenizer,
        length,
        source=job.dataset,
        scorer=job.scorer,
        tick=reporter.alive,
    )
    tokens = TokenCache(examples, found.dropped | unusable, len(found))
    _write(folder / FILE, tokens, key)
    return tokens


def kept(folder: Path, key: str | None = None) -> TokenCache | None:
    """Return what an earlier start left, if it is whole and, if a `key` is given, made with that key."""
    try:
        with safe_open(folder / FILE, "numpy") as file:
            about = file.metadata() or {}
            if key is not None and about.get("key") != key:
                return None
            ids, labels, offsets = (file.get_tensor(name) for name in ("ids", "labels", "offsets"))
            firsts = file.get_tensor("firsts").astype(bool) if "firsts" in file.keys() else None  # noqa: SIM118
        dropped = msgspec.json.decode(about["dropped"], type=dict[str, int])
        group, rows = int(about["group"]), int(about["rows"])
    except (FileNotFoundError, SafetensorError, KeyError, *UNREADABLE):
        return None
    return TokenCache(Examples(ids, labels, offsets, group, first_labelled=firsts), dropped, rows)


def _key(job: WorkerJob, files: list[DataFile], tokenizer: Any, length: int) -> str:
    """Hex sha256 of all that the tokens depend on."""
    made_of = [
        *(f"{file.format} {file_digest(file.path)}" for file in files if file.path.is_file()),
        job.task_type.value,
        job.scorer.value,
        msgspec.json.encode(job.dataset_type).decode(),
        str(length),
        _model_of(tokenizer),
        str(tokenizer.special_tokens_map),
        str(tokenizer.chat_template),
    ]
    return hashlib.sha256("\0".join(made_of).encode()).hexdigest()


def _model_of(tokenizer: Any) -> str:
    """Return a tokenizer's rules and vocabulary, without the last call's truncation and padding."""
    if not hasattr(tokenizer, "backend_tokenizer"):  # written in Python: its files have its rules
        files = [Path(tokenizer.name_or_path) / name for name in tokenizer.vocab_files_names.values()]
        digests = [file_digest(path) for path in files if path.is_file()]
        return f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items())} {digests}"
    about = msgspec.json.decode(tokenizer.backend_tokenizer.to_str(), type=dict[str, Any])
    return msgspec.json.encode({**about, "truncation": None, "padding": None}).decode()


def _write(path: Path, tokens: TokenCache, key: str) -> None:
    examples = tokens.examples
    arrays = {"ids": examples.ids, "labels": examples.labels, "offsets": examples.offsets}
    if examples.first_labelled is not None:
        arrays["firsts"] = examples.first_labelled.astype(np.int32)
    about = {
        "key": key,
        "group": str(examples.group),
        "rows": str(tokens.rows),
        "dropped": msgspec.json.encode(tokens.dropped).decode(),
    }
    write_atomically(path, save(arrays, about))
