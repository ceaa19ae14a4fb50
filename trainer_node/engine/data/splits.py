"""Which files of a hub data set are its training rows; pure, by the rules of the `datasets` library.

First what the data set's card says (`configs`: the default one, its `train` split), else the names: if any
folder or file is called after a split, those called after training; if none is, all of them.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from shared.errors import DataError
from shared.messages.offers import FileFormat

FORMATS = {
    ".parquet": FileFormat.PARQUET,
    ".jsonl": FileFormat.JSONL,
    ".ndjson": FileFormat.JSONL,
    ".json": FileFormat.JSON,
    ".csv": FileFormat.CSV,
    ".tsv": FileFormat.CSV,
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
NOT_DATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"}
TRAINING = ("train", "training")
SPLITS = (*TRAINING, "validation", "valid", "dev", "val", "test", "testing", "eval", "evaluation")
Config = dict[str, Any]


def training_files(paths: Iterable[str], configs: Sequence[Config] | None) -> list[str]:
    """Return the paths with training rows, all of one format, in order.

    Raises DataError that says what there is instead.
    """
    known = [path for path in sorted(paths) if _is_data(path)]
    if not known:
        raise DataError(f"it has no data file that could be read ({', '.join(sorted(FORMATS))})")
    config = _default(configs or [])
    if config and (folder := config.get("data_dir")):
        known = [path for path in known if PurePosixPath(path).is_relative_to(str(folder))]
    if config and config.get("data_files"):
        found = _matching(known, _train_patterns(config["data_files"]))
    else:
        found = _by_name(known)
    if not found:
        raise DataError(f"none of its {len(known)} data files is the training split")
    return _of_one_format(found)


def suffix_of(path: str) -> str:
    """Return the suffix that names a file's format, not its compression: `.jsonl` of `a.jsonl.gz`."""
    place = PurePosixPath(path)
    return PurePosixPath(place.stem).suffix if place.suffix in COMPRESSED else place.suffix


def format_of(path: str) -> FileFormat | None:
    """Return the format that a file's name promises; None if it promises none."""
    return FORMATS.get(suffix_of(path).lower())


def _is_data(path: str) -> bool:
    place = PurePosixPath(path)
    hidden = any(part.startswith((".", "_")) for part in place.parts)
    return suffix_of(path) in FORMATS and place.name not in NOT_DATA and not hidden


def _default(configs: Sequence[Config]) -> Config | None:
    """Return the configuration that is read when none is named."""
    if len(configs) <= 1:
        return configs[0] if configs else None
    for config in configs:
        if config.get("default") or config.get("config_name") == "default":
            return config
    names = ", ".join(str(config.get("config_name")) for config in configs)
    raise DataError(f"it has several configurations and no default one ({names}): give the URL of a file")


def _train_patterns(data_files: Any) -> list[str]:
    """Return the card's patterns of the training split; `data_files` is a path, a list, or names splits."""
    if isinstance(data_files, str):
        return [data_files]
    if isinstance(data_files, dict):
        entries: list[Any] = [{"split": split, "path": path} for split, path in data_files.items()]
    else:
        entries = list(data_files)
    if all(isinstance(entry, str) for entry in entries):
        return [str(entry) for entry in entries]
    splits = {str(entry.get("split")): entry.get("path") for entry in entries if isinstance(entry, dict)}
    if "train" not in splits:
        raise DataError(f"it has no split called train, only {', '.join(sorted(splits))}")
    path = splits["train"]
    return [str(item) for item in path] if isinstance(path, list) else [str(path)]


def _matching(paths: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the paths that match one of the patterns; `*` stands for anything and `**/` also for nothing."""
    every = [form for pattern in patterns for form in (pattern, pattern.replace("**/", ""))]
    return [path for path in paths if any(fnmatch.fnmatchcase(path, form) for form in every)]


def _by_name(paths: Sequence[str]) -> list[str]:
    words = {path: set(re.split(r"[^a-z]+", path.lower())) for path in paths}
    if not any(found & set(SPLITS) for found in words.values()):
        return list(paths)
    return [path for path in paths if words[path] & set(TRAINING)]


def _of_one_format(paths: Sequence[str]) -> list[str]:
    """Return the files of the most frequent format: the same rows are often there in two."""
    order = list(FORMATS)
    counts = Counter(suffix_of(path) for path in paths)
    best = min(counts, key=lambda suffix: (-counts[suffix], order.index(suffix)))
    return [path for path in paths if suffix_of(path) == best]
