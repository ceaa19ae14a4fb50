"""The dataset type as people write it: a name that Podium doesn't know is an error, not ignored."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import msgspec

from shared.errors import SettingsError
from shared.messages.offers import DatasetType

NAMES = DatasetType.__struct_fields__


def dataset_type(text: str) -> DatasetType:
    """Parse the columns from JSON, or from a JSON file. Raises SettingsError that says what is wrong."""
    content = text if text.lstrip().startswith("{") else _read(Path(text))
    try:
        fields = json.loads(content)
        columns = msgspec.convert(fields, DatasetType)
    except (ValueError, RecursionError) as error:  # msgspec's errors too
        raise SettingsError(f"--dataset-type is invalid: {error}") from error
    refuse_unknown(fields, "--dataset-type")
    return columns


def refuse_unknown(fields: object, where: str) -> None:
    """Raise SettingsError for names that mean nothing. A misspelt one would train something else."""
    unknown = sorted(fields.keys() - set(NAMES)) if isinstance(fields, dict) else []
    if not unknown:
        return
    if near := difflib.get_close_matches(unknown[0], NAMES, n=1):
        advice = f"is {near[0]!r} meant?"
    else:
        advice = f"the names are {', '.join(NAMES)}"
    raise SettingsError(f"{where}: unknown {', '.join(map(repr, unknown))}; {advice}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"--dataset-type is neither a JSON object nor a readable file: {error}"
        ) from error
